"""The families that are known: which one a config.json is of, which one our options fit."""

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.models.hf.bart import BARTS
from hvdtrain.models.hf.bert import BERT
from hvdtrain.models.hf.family import Architecture, Config, Family
from hvdtrain.models.hf.gpt2 import GPT2
from hvdtrain.models.hf.llama import LLAMA, MISTRAL, QWEN2
from hvdtrain.models.hf.starcoder2 import STARCODER2
from hvdtrain.models.hf.t5 import T5
from hvdtrain.models.options import TransformerOptions

# The first that fits is taken: a plain Llama is no Mistral without a window.
FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, STARCODER2, BERT, *BARTS, T5)


def family_of(config: Config, where: str) -> tuple[Family, Architecture]:
    """Whose folder this is. Errors: CheckpointError that lists those that are known; ``where`` begins it."""
    known = {family.model_type: family for family in FAMILIES}
    family = known.get(config.get("model_type") or "")
    if family is None:
        raise CheckpointError(f"{where}: model_type={config.get('model_type')!r} is not among {', '.join(known)}")
    given = config.get("architectures") or [family.architectures[0].theirs]
    for architecture in family.architectures:
        if [architecture.theirs] == given:
            return family, architecture
    named = ", ".join(architecture.theirs for architecture in family.architectures)
    raise CheckpointError(f"{where}: architectures={given} is not among {named}")


def family_for(options: TransformerOptions, model: str, bare: bool = False) -> tuple[Family, Architecture]:
    """The family with the same model as ours, whose class is ``model``. bare: without its head.

    Errors: ConfigError that names every option that does not fit, family by family.
    """
    refused = []
    for family in FAMILIES:
        for architecture in family.architectures:
            if architecture.model == model and bool(architecture.without) == bare:
                misfits = family.misfits(options, model)
                if not misfits:
                    return family, architecture
                refused.append(f"  {family.model_type}: {', '.join(misfits)}")
                break
    raise ConfigError(
        "\n".join(["no model of transformers has these options of model.*; what does not fit:", *refused])
    )
