"""How replicas agree. A way to agree is one file and one line in this table."""

from typing import Literal

from hvdtrain.options import Options, option
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync

SYNCS = {
    "allreduce": AllReduceSync,
}


class SyncOptions(Options):
    name: Literal["allreduce"] = option("allreduce", "how replicas agree; allreduce: sum gradients every step")
    allreduce: AllReduceOptions = AllReduceOptions()
