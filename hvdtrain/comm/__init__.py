"""Who am I among how many, and how do we talk? The only room that imports Horovod or mpi4py."""
