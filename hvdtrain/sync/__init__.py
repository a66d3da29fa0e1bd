"""How replicas agree. A sync is one file and one line in this table."""

from collections.abc import Sequence
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.sync import Sync

SYNCS = {
    "allreduce": AllReduceSync,
}


class SyncOptions(Options):
    name: Literal["allreduce"] = option("allreduce", "how replicas agree; allreduce: sum gradients every step")
    allreduce: AllReduceOptions = AllReduceOptions()


def make_sync(
    options: SyncOptions,
    slices: Sequence[Slice],
    computing: Sequence[torch.Tensor],
    mesh: Mesh,
    uses: Sequence[int] | None = None,
) -> Sync:
    """The sync of a replica's slices. computing, uses: for each slice what backward gives a gradient, and how many in a
    microbatch (None: one), see ``Replica``. Collective.
    """
    return SYNCS[options.name](slices, computing, mesh, getattr(options, options.name), uses)
