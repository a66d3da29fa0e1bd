"""Which parameters are trained. A frozen one is in the model and in checkpoints, and has no gradient and no moments."""

from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.depth import chosen, grouped
from hvdtrain.models.flops import Trained
from hvdtrain.models.lora import LoraOptions, is_adapter

_HEADS = ("head", "pooler")  # what lies between the blocks' output and the loss


def freeze(model: nn.Module, which: int | str, lora: LoraOptions | None, scores_tokens: bool) -> None:
    """which: ``optim.freeze``. lora: then only adapters are trained, and what it names beside them. scores_tokens: the
    model's head is that of its vocabulary; another is trained beside adapters too.

    Errors: ConfigError where a name matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set(chosen(names, which, "optim.freeze")) if which != "" else set()
    if lora is not None:
        kept = set(chosen(names, lora.also, "model.lora.also")) if lora.also else set()
        kept |= {name for name in names if is_adapter(name)}
        kept |= set() if scores_tokens else {name for name in names if name.partition(".")[0] in _HEADS}
        frozen |= set(names) - kept
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if len(frozen) == len(names):
        raise ConfigError(f"optim.freeze={which} leaves nothing to train; there is: {grouped(names)}")
    model.trained = Trained(model)
