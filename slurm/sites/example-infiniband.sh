# shellcheck shell=bash disable=SC2034
# An example for GPU nodes on InfiniBand. Copy it under the cluster's name, and change what depends on it.

# Modules of the cluster: the MPI and CUDA that `make env` found.
# module load gcc cuda openmpi

site_srun=(--cpu-bind=cores --gpu-bind=none)
site_mpirun=(--bind-to none)

# NCCL brings its own InfiniBand transport. A name is a prefix: mlx5 is every such adapter. Where some of them lead into
# a storage network, name those for computing: NCCL_IB_HCA==mlx5_0,mlx5_1 (`ibdev2netdev` lists them; "==" is exact).
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
# TCP is used only to find one another: the interface whose addresses all nodes reach (ib0, or a management network).
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
# Gloo has no InfiniBand transport; over ib0 its TCP is faster than over Ethernet.
export HOROVOD_GLOO_IFACE=${HOROVOD_GLOO_IFACE:-ib0}
# Open MPI over UCX, for the small collectives. Where UCX takes a wrong port: UCX_NET_DEVICES=mlx5_0:1 (`ucx_info -d`).
export OMPI_MCA_pml=${OMPI_MCA_pml:-ucx}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
