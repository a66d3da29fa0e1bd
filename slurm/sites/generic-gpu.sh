# shellcheck shell=bash disable=SC2034
# Any cluster with NVIDIA GPUs. Ask for a task per GPU: sbatch --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8
#
# Every task sees all GPUs of its node and takes the one of its local rank. A task that sees only its own
# (--gpus-per-task=1) works too, but then NCCL cannot go from GPU to GPU directly on many systems.
site_srun=(--cpu-bind=cores --gpu-bind=none)
site_mpirun=(--bind-to none)
# Only what goes wrong; NCCL_DEBUG=INFO shows which network was found (NET/IB, NET/OFI; NET/Socket is the slow one).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
