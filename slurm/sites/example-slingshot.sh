# shellcheck shell=bash disable=SC2034
# An example for GPU nodes on HPE Slingshot 11. Copy it under the cluster's name, and change what depends on it.

# Modules: Cray MPICH, and NCCL's plugin for libfabric, under whatever name the cluster gives it.
# module load cray-mpich cudatoolkit aws-ofi-nccl

# Cray MPICH is started through Slurm's own plugin for it; there is no mpirun.
site_launchers="cray_shasta pmi2 gloo"
site_srun=(--cpu-bind=cores --gpu-bind=none)

# Fail where the plugin is not found, rather than train over TCP at a fraction of the speed (CSCS saw 5 GB/s, not 122).
export NCCL_NET=${NCCL_NET:-"AWS Libfabric"}
# The network cards are hsn0, hsn1, ...
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-hsn}
export HOROVOD_GLOO_IFACE=${HOROVOD_GLOO_IFACE:-hsn0}
export NCCL_CROSS_NIC=${NCCL_CROSS_NIC:-1}
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PHB}
# libfabric's provider for Slingshot, as centres that have it document: its memory cache must see what CUDA frees, and
# its default queue is too short for NCCL.
export FI_MR_CACHE_MONITOR=${FI_MR_CACHE_MONITOR:-userfaultfd}
export FI_CXI_DISABLE_HOST_REGISTER=${FI_CXI_DISABLE_HOST_REGISTER:-1}
export FI_CXI_DEFAULT_CQ_SIZE=${FI_CXI_DEFAULT_CQ_SIZE:-131072}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
