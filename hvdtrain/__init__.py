"""Train Transformers as batch jobs: HDF5 token shards, Horovod all-reduce, Slurm."""

from hvdtrain.version import __version__

__all__ = ["__version__"]
