"""A family of Hugging Face models, described once and used both ways.

    config.json   --options-->   TransformerOptions        each ``Entry`` knows one thing in both
                  <--config---

An option set fits a family where reading what was written gives it back: so an option that a family does not know
can never be lost without a word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from hvdtrain.models.options import TransformerOptions

Config = Mapping[str, Any]  # a config.json
Names = dict[str, str | tuple[str, ...]]  # modules and tensors: ours -> theirs
HAS_OUTPUT = "has lm_head.weight"  # a key beside those of the file: is such a tensor in the folder?


class Misfit(Exception):
    """What a config.json asks for and our models do not do; or the ``option`` of ours that it cannot say."""

    def __init__(self, what: str, option: str = ""):
        super().__init__(what)
        self.option = option


class Entry(Protocol):
    """One thing that config.json says and our options say, each in its words."""

    def read(self, config: Config) -> dict[str, Any]:
        """The options. Errors: Misfit."""

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json, of options as ``settled`` has them. Errors: Misfit."""


class Key:
    """An option that one key holds, or several that must be equal; ``default``: where it is absent or null, perhaps
    worked out from the whole config.json.
    """

    def __init__(self, ours: str, *theirs: str, default: Any | Callable[[Config], Any], least: int | None = None):
        self._ours, self._theirs, self._default, self._least = ours, theirs, default, least

    def read(self, config: Config) -> dict[str, Any]:
        values = [value_of(config, key, self._default) for key in self._theirs]
        if any(value != values[0] for value in values):
            raise Misfit(" differs from ".join(f"{k}={v}" for k, v in zip(self._theirs, values, strict=True)))
        return {self._ours: values[0]}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        value = options[self._ours]
        if self._least is not None and value < self._least:
            raise Misfit(f"{self._ours}={value} (at least {self._least})", self._ours)
        return dict.fromkeys(self._theirs, value)


class Word:
    """An option that is one of several words; ``words``: ours -> theirs, of which the first is written."""

    def __init__(self, ours: str, theirs: str, words: Mapping[str, tuple[str, ...]], default: str):
        self._ours, self._theirs, self._words, self._default = ours, theirs, words, default

    def read(self, config: Config) -> dict[str, Any]:
        given = value_of(config, self._theirs, self._default)
        for ours, theirs in self._words.items():
            if given in theirs:
                return {self._ours: ours}
        known = ", ".join(word for theirs in self._words.values() for word in theirs)
        raise Misfit(f"{self._theirs}={given!r} (known: {known})")

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        given = options[self._ours]
        if given not in self._words:
            raise Misfit(f"{self._ours}={given} (only {', '.join(self._words)})", self._ours)
        return {self._theirs: self._words[given][0]}


class Fixed:
    """Options in which the family has no choice."""

    def __init__(self, **options: Any):
        self._options = options

    def read(self, config: Config) -> dict[str, Any]:
        return self._options

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Only:
    """A key that changes the numbers, of which our models do one value alone: where it is absent, that is it."""

    def __init__(self, key: str, value: Any):
        self._key, self._value = key, value

    def read(self, config: Config) -> dict[str, Any]:
        given = value_of(config, self._key, self._value)
        if given != self._value:
            raise Misfit(f"{self._key}={given!r} (known: {self._value!r})")
        return {}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self._key: self._value}


class Dropout:
    """The first key is read; training may differ in the others, evaluation does not."""

    def __init__(self, *keys: str, default: float = 0.1):
        self._keys, self._default = keys, default

    def read(self, config: Config) -> dict[str, Any]:
        return {"dropout": value_of(config, self._keys[0], self._default)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self._keys, options["dropout"])


def value_of(config: Config, key: str, default: Any) -> Any:
    """What config.json holds under a key; null counts as absent."""
    value = config.get(key)
    if value is None:
        return default(config) if callable(default) else default
    return value


@dataclass(frozen=True)
class Architecture:
    """theirs: its class in transformers. model: ours. without: modules of ours that it has not."""

    theirs: str
    model: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """model_type: of config.json. architectures: the first of a model of ours is the one written.

    names: module or tensor of ours -> theirs, ``*`` for the number of a layer; several of theirs: their rows follow one
        another in ours. They may follow the options (T5's activation) and our model's class (what a ``head`` is).
    prefix: which some folders leave out.  transposed: last names of modules whose matrices are [in, out].
    copies: tensor -> others that transformers ties to it: written where it unties them, and not needed where read.
    doubles: tensor -> another that is written beside it, since theirs has two where ours may share one.
    tables: sinusoidal positions, which some files have though they are worked out.
    zeros: a vector over the vocabulary, in theirs a matrix of one row, that either may lack: zeros then.
    unread: of their tensors, those that say nothing to our models: regular expression for a name without the prefix.
    written: keys of config.json that only transformers needs.
    """

    model_type: str
    architectures: Sequence[Architecture]
    entries: Sequence[Entry]
    names: Callable[[TransformerOptions, str], Names]
    prefix: str = ""
    transposed: frozenset[str] = frozenset()
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    doubles: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    zeros: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""
    written: Mapping[str, Any] = field(default_factory=dict)

    def options(self, config: Config) -> dict[str, Any]:
        """Of TransformerOptions. Errors: Misfit, which names all that does not fit."""
        found, misfits = _gathered([(entry.read, config) for entry in self.entries])
        if not misfits:
            try:
                TransformerOptions(**found)
            except ValidationError as error:
                misfits = [Misfit(_said(problem)) for problem in error.errors()]
        if misfits:
            raise Misfit("; ".join(map(str, misfits)))
        return found

    def config(self, options: TransformerOptions) -> dict[str, Any]:
        """The keys of config.json that tell what the model is; where ``misfits`` finds none."""
        return {"model_type": self.model_type, **self.written, **self._write(options)[0]}

    def misfits(self, options: TransformerOptions, model: str) -> list[str]:
        """Options with which the family has no such model; each with what it has in their place."""
        config, misfits = self._write(options)
        back, unread = _gathered([(entry.read, config) for entry in self.entries])
        wanted, back = _of(options), settled(back)
        passed = self._free(model) | {misfit.option for misfit in misfits}
        unlike = [name for name in wanted if name not in passed and wanted[name] != back[name]]
        shown = [f"{name}={_shown(wanted[name])} (only {_shown(back[name])})" for name in unlike]
        return [*map(str, misfits), *map(str, unread), *shown]

    def _write(self, options: TransformerOptions) -> tuple[dict[str, Any], list[Misfit]]:
        return _gathered([(entry.write, _of(options)) for entry in self.entries])

    def _free(self, model: str) -> set[str]:
        """Options that mean nothing to such a model, or nothing that is written down."""
        free = {"dropout", "vocab_multiple", "ff_ratio", "preset", "init"}
        if self.zeros:
            free |= {"head_bias"}
        if self.doubles:
            free |= {"separate_positions"}
        if model in ("Classifier", "SpanModel"):
            free |= {"tied", "head_bias", "head_scale"}
        return free if model == "Seq2Seq" else free | {"encoder_layers", "separate_positions"}


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options, defaults too, with numbers in place of the 0 that means "as the others say"."""
    full = {**_DEFAULTS, **options}
    full["rotary"] = {**_DEFAULTS["rotary"], **full["rotary"]}
    full["encoder_layers"] = full["encoder_layers"] or full["layers"]
    full["kv_heads"] = full["kv_heads"] or full["heads"]
    full["head_width"] = full["head_width"] or full["width"] // full["heads"]
    if full["qkv_bias"] == "as_bias":
        full["qkv_bias"] = "yes" if full["bias"] else "no"
    return full


_DEFAULTS = TransformerOptions().model_dump()


def _of(options: TransformerOptions) -> dict[str, Any]:
    """Settled; without what a run's settings have beside them."""
    own = {name: value for name, value in options.model_dump().items() if name in _DEFAULTS}
    return settled(own | {"ff_width": options.hidden_width})


def _gathered(calls: Sequence[tuple[Callable[..., dict[str, Any]], Any]]) -> tuple[dict[str, Any], list[Misfit]]:
    """What all of them say together, and what did not fit."""
    found: dict[str, Any] = {}
    misfits = []
    for call, given in calls:
        try:
            found |= call(given)
        except Misfit as misfit:
            misfits.append(misfit)
    return found, misfits


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _said(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    what = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"].lower()
    return f"{where}={problem['input']}: {what}" if where else what
