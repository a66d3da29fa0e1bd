# shellcheck shell=bash disable=SC2034
# An example for CPU nodes of two sockets: a rank per socket, with all its cores.
#
#   HVDTRAIN_SITE=example-cpu sbatch --ntasks-per-node=2 --cpus-per-task=32 slurm/train.sbatch ... precision=bf16

# module load gcc openmpi

# Slurm binds a rank to its 32 cores; hvdtrain then takes a thread for each of them.
site_srun=(--cpu-bind=cores --distribution=block:block --hint=nomultithread)
site_mpirun=(--map-by "ppr:1:socket:PE=${SLURM_CPUS_PER_TASK:-1}" --bind-to core)

# Open MPI between nodes: UCX where there is InfiniBand or RoCE (OMPI_MCA_pml=ucx), else TCP on the network that the
# nodes share. Without a name it tries every interface, virtual ones too, and waits for those that lead nowhere.
# export OMPI_MCA_btl_tcp_if_include=eth0
# export HOROVOD_GLOO_IFACE=eth0
