"""How replicas agree. A sync is one file and one line in this table."""

from collections.abc import Sequence
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.sync import Sync
from hvdtrain.sync.zero import ZeroOptions, ZeroSync

SYNCS = {
    "allreduce": AllReduceSync,
    "zero": ZeroSync,
}


class SyncOptions(Options):
    name: Literal["allreduce", "zero"] = option(
        "allreduce",
        "how replicas agree; allreduce: sum gradients every step; zero: that, and share the optimizer's state",
    )
    allreduce: AllReduceOptions = AllReduceOptions()
    zero: ZeroOptions = ZeroOptions()


def make_sync(
    options: SyncOptions,
    slices: Sequence[Slice],
    computing: Sequence[torch.Tensor],
    mesh: Mesh,
    uses: Sequence[int] | None = None,
) -> Sync:
    """The sync of a replica's slices. computing, uses: for each slice what backward gives a gradient, and how many in a
    microbatch (None: one), see ``Replica``. Collective.

    Errors: ConfigError where the options do not fit the mesh.
    """
    if options.name == "zero" and mesh.replicas == 1:
        zero = options.zero
        alone = AllReduceSync(
            slices, computing, mesh, AllReduceOptions(bucket_mib=zero.bucket_mib, wire=zero.wire), uses
        )
        alone.notes.append("sync.name=zero: there is one replica, which shares its optimizer's state with nobody")
        return alone
    return SYNCS[options.name](slices, computing, mesh, getattr(options, options.name), uses)
