"""Which device does this rank compute on?"""

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.world import World, shares_gpus
from hvdtrain.errors import ConfigError


def pick_device(request: str, world: World, group: Group) -> tuple[torch.device, list[str]]:
    """The rank's device for ``request`` (auto, cpu, cuda), and what has to be said about it (local).

    HVDTRAIN_SHARE_GPUS=1: ranks may share a GPU (to try things out: it is slow).

    Errors: ConfigError where a GPU is asked for and there is none, or fewer than ranks on this node.
    """
    if request == "cpu":
        return torch.device("cpu"), []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        if request == "cuda":
            raise ConfigError("device=cuda, but torch finds no GPU; see `python -m hvdtrain doctor`, or set device=cpu")
        return torch.device("cpu"), ["no GPU: computing on the CPU"]
    # These may show each rank its own GPU only; then that one is number 0.
    if gpus == 1 and world.launcher in ("srun", "jsrun", "flux run"):
        number = 0
    elif world.local_rank < gpus or shares_gpus():
        number = world.local_rank % gpus
    else:
        raise ConfigError(
            f"{world.local_size} ranks on a node with {gpus} GPUs: start one rank per GPU, set "
            "device=cpu, or let ranks share a GPU with HVDTRAIN_SHARE_GPUS=1 (slow: NCCL takes a GPU only once)"
        )
    torch.cuda.set_device(number)
    notes = []
    if group.size > 1 and group.backend != "nccl":
        why = "HVDTRAIN_SHARE_GPUS=1" if shares_gpus() else "this Horovod was built without NCCL"
        notes.append(f"gradients travel through host memory ({group.backend}): {why}")
    return torch.device("cuda", number), notes
