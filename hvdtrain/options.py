"""The base of every room's Options: frozen, strict, each field with its meaning, unit and default."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Settings of one room. Unknown keys and wrong types are errors; nothing is coerced."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, serialize_by_alias=True
    )


def option(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field with its default, what it means (with the unit) and its bounds (``gt``, ``ge``, ``lt``, ``le``)."""
    return Field(default, description=meaning, **bounds)
