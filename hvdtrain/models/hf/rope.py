"""Rotary positions as config.json has them: ``rope_parameters``, and before transformers 5 ``rope_theta`` with
``rope_scaling``.
"""

import math
from collections.abc import Mapping
from typing import Any

from hvdtrain.models.hf.family import Config, Misfit, value_of

# Of each type: our names of its numbers -> theirs. Defaults are RotaryOptions'.
_NUMBERS = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_factor": "low_freq_factor",
        "high_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "fast_turns": "beta_fast",
        "slow_turns": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
_KNOWN = {"rope_type", "type", "rope_theta"}


class Rope:
    """``positions=rotary`` and its group of options."""

    def read(self, config: Config) -> dict[str, Any]:
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise Misfit("rope_parameters of their own for some layers")
        given = {key: value for key, value in given.items() if value is not None}
        base = given.get("rope_theta", value_of(config, "rope_theta", 10_000.0))
        kind = given.get("rope_type", given.get("type", "default"))
        kind = "none" if kind == "default" else kind
        if kind not in _NUMBERS:
            raise Misfit(f"rope_type={kind!r} (known: default, {', '.join(list(_NUMBERS)[1:])})")
        if (part := given.pop("partial_rotary_factor", value_of(config, "partial_rotary_factor", 1.0))) != 1:
            raise Misfit(f"partial_rotary_factor={part} (known: 1.0)")
        found = {"base": base, "scaling": kind} | self._numbers(kind, given, config)
        return {"positions": "rotary", "rotary": found}

    def _numbers(self, kind: str, given: dict[str, Any], config: Config) -> dict[str, Any]:
        names = _NUMBERS[kind]
        if "original_context" in names:
            # A key of config.json itself wins, as in transformers
            own = value_of(config, "original_max_position_embeddings", None)
            original = own or given.get("original_max_position_embeddings", config.get("max_position_embeddings"))
            given["original_max_position_embeddings"] = original
        if kind == "yarn":
            _read_yarn(given, config)
        if kind == "none":
            return {}
        if unknown := sorted(given.keys() - _KNOWN - set(names.values())):
            raise Misfit(", ".join(f"{key}={given[key]!r} of rope_type {kind}" for key in unknown))
        return {ours: given[theirs] for ours, theirs in names.items() if theirs in given}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """In both ways, so that transformers before 5 does not take its default base."""
        rotary = options["rotary"]
        kind = rotary["scaling"]
        numbers = {theirs: rotary[ours] for ours, theirs in _NUMBERS[kind].items()}
        if not numbers.get("attention_factor", 1):
            del numbers["attention_factor"]
        both = {"rope_theta": rotary["base"]}
        if kind == "none":
            return {**both, "rope_parameters": {"rope_type": "default", **both}}
        scaling = {"rope_type": kind, **numbers}
        return {**both, "rope_parameters": {**scaling, **both}, "rope_scaling": scaling}


def _read_yarn(given: dict[str, Any], config: Config) -> None:
    """What yarn's keys mean where some are absent, in place."""
    if not given.pop("truncate", True):
        raise Misfit("truncate=false of rope_type yarn (known: true)")
    factor = given.setdefault("factor", config["max_position_embeddings"] / given["original_max_position_embeddings"])
    scales = given.pop("mscale", 0), given.pop("mscale_all_dim", 0)
    if "attention_factor" not in given and all(scales) and factor > 1:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
        given["attention_factor"] = above / below
