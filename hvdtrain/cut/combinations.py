"""What may be combined with what, and why not: one table, which ``train``, ``plan`` and docs/cuts.md read.

A row is a thing that a recipe may ask for; a column is a cut of the model, or of the optimizer's state. What no line of
``REFUSED`` forbids fits, and a test trains it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import ascii_letters
from typing import Any, NamedTuple

from hvdtrain.cut.checker import Costs, check
from hvdtrain.cut.schedules import SCHEDULES, with_transfers
from hvdtrain.errors import ConfigError, plural
from hvdtrain.tasks import TASKS

Settings = Mapping[str, Any]  # dotted key of the recipe -> value


class Feature(NamedTuple):
    """``name``: in the table. ``asked``: do these settings ask for it? ``key``: whose value says so."""

    name: str
    asked: Callable[[Settings], bool]
    key: str

    def said(self, settings: Settings) -> str:
        return f"{self.key}={settings[self.key]}"


class Refused(NamedTuple):
    """``row`` and ``column`` do not go together: ``why``, and the way out."""

    row: Feature
    column: Feature
    why: str
    cure: str


def _is(key: str, value: Any, only_with: Feature | None = None) -> Feature:
    name = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
    return Feature(name, lambda s: s.get(key) == value and (only_with is None or only_with.asked(s)), key)


def _one_of(name: str, key: str, *values: Any) -> Feature:
    return Feature(name, lambda s: s.get(key) in values, key)


def _above(key: str, least: float, only_with: Feature | None = None) -> Feature:
    name = f"{key} above {least:g}"
    return Feature(name, lambda s: s[key] > least and (only_with is None or only_with.asked(s)), key)


# --- what there is -----------------------------------------------------------------------------------------------

TENSOR = _above("mesh.tensor", 1)
PIPELINE = _above("mesh.pipeline", 1)
SEQUENCE = _is("cut.sequence", True, only_with=TENSOR)
ONE_STAGE = _is("cut.stages_per_rank", 1, only_with=PIPELINE)
SEVERAL_STAGES = _above("cut.stages_per_rank", 1, only_with=PIPELINE)
OF_SCHEDULES = {name: _is("cut.schedule", name, only_with=PIPELINE) for name in SCHEDULES}
ZERO = _is("sync.name", "zero")
ZERO_1, ZERO_2 = (_is("sync.zero.stage", stage, only_with=ZERO) for stage in (1, 2))
SERVER = _is("sync.name", "parameter_server")
ASYNCHRONOUS = _is("sync.parameter_server.mode", "asynchronous", only_with=SERVER)
BESIDE_WORK = _is("sync.parameter_server.servers", 0, only_with=ASYNCHRONOUS)
SEVERAL_SERVERS = _above("sync.parameter_server.servers", 1, only_with=ASYNCHRONOUS)
POWERSGD, SIGN, TOPK = COMPRESSED = [_is("sync.name", name) for name in ("powersgd", "sign", "topk")]
PRECISIONS = {name: _is("precision", name) for name in ("fp32", "bf16", "bf16-weights", "fp16")}
RAMP = _above("train.ramp_start", 0)
OPTIMIZERS = {name: _is("optim.name", name) for name in ("adamw", "lamb", "lars", "muon", "sgd")}
MOMENTUM = _above("optim.momentum", 0, only_with=OPTIMIZERS["sgd"])
CLIPS = _above("optim.clip_norm", 0)
SPIKES = _above("guard.spike_norm", 0)
COMPILE_BLOCKS, COMPILE_MODEL = (_is("compile", how) for how in ("blocks", "model"))
ADASUM = _is("sync.allreduce.combine", "adasum")
TWO_BYTES = [_is("sync.allreduce.wire", name) for name in ("bf16", "fp16")]
APART = _one_of("steps apart", "sync.name", "local_sgd", "gossip", "average")
EMA = _above("ema.decay", 0)
SKIP = _is("guard.policy", "skip")
BALANCE = _above("balance.every", 0)
LENGTHS = _one_of("rows that are not alike", "task.name", *(n for n, task in TASKS.items() if not task.rows_are_alike))

_ONLY_WITH = {SEQUENCE: TENSOR, ONE_STAGE: PIPELINE, SEVERAL_STAGES: PIPELINE}
_ONLY_WITH |= {ASYNCHRONOUS: SERVER, BESIDE_WORK: ASYNCHRONOUS, SEVERAL_SERVERS: ASYNCHRONOUS}

COLUMNS = {"tensor": TENSOR, "sequence": SEQUENCE, **OF_SCHEDULES, "zero 1": ZERO_1, "zero 2": ZERO_2}
COLUMNS |= {"async": ASYNCHRONOUS, "async, 2 up": SEVERAL_SERVERS}
COLUMNS |= {"powersgd": POWERSGD, "sign": SIGN, "topk": TOPK, "apart": APART, "balance": BALANCE, "adasum": ADASUM}
ROWS = (
    TENSOR,
    SEQUENCE,
    PIPELINE,
    ONE_STAGE,
    SEVERAL_STAGES,
    ZERO_1,
    ZERO_2,
    SERVER,
    ASYNCHRONOUS,
    BESIDE_WORK,
    SEVERAL_SERVERS,
    *PRECISIONS.values(),
    COMPILE_BLOCKS,
    COMPILE_MODEL,
    *(_is("recompute.name", name) for name in ("full", "selective")),
    *OPTIMIZERS.values(),
    MOMENTUM,
    CLIPS,
    SPIKES,
    EMA,
    SKIP,
    *TWO_BYTES,
    Feature("model.lora", lambda s: any(key.startswith("model.lora.") for key in s), "model.lora"),
    Feature("optim.freeze", lambda s: s["optim.freeze"] != "", "optim.freeze"),
    RAMP,
    LENGTHS,
    BALANCE,
)

# --- what does not fit -------------------------------------------------------------------------------------------

_SECOND_MOMENT = "it gives signs, whose second moment is 1"

REFUSED = (
    Refused(
        ZERO_2,
        PIPELINE,
        "ZeRO 2 reduces gradients at every microbatch, and a pipeline has several microbatches under way at once",
        "set sync.zero.stage=1",
    ),
    *(
        Refused(
            cut,
            APART,
            "replicas that step by themselves are whole on their ranks, where alone a gradient is complete",
            "set sync.name=allreduce",
        )
        for cut in (TENSOR, PIPELINE)
    ),
    *(Refused(zero, APART, "these are two ways to agree", "set sync.name to one of them") for zero in (ZERO_1, ZERO_2)),
    Refused(
        EMA,
        APART,
        "between two meetings no replica has the weights that are to be averaged",
        "set ema.decay=0, and average checkpoints with `hvdtrain average`",
    ),
    Refused(
        SKIP,
        APART,
        "each replica would leave out steps by itself, and they no longer know alike when to give up",
        "set guard.policy=stop",
    ),
    *(
        Refused(
            SERVER,
            cut,
            "a server keeps parameters of replicas that are whole",
            "set sync.name=allreduce or zero",
        )
        for cut in (TENSOR, PIPELINE)
    ),
    *(
        Refused(SERVER, other, "these are two ways to agree", "set sync.name to one of them")
        for other in (ZERO_1, ZERO_2, APART)
    ),
    *(
        Refused(
            ADASUM,
            cut,
            "Horovod's Adasum is of all ranks, and these have different parts of a gradient",
            "set sync.allreduce.combine=sum",
        )
        for cut in (TENSOR, PIPELINE)
    ),
    *(
        Refused(
            ADASUM,
            other,
            "only sync.name=allreduce combines whole gradients of all ranks at once",
            "set sync.allreduce.combine=sum",
        )
        for other in (ZERO_1, ZERO_2, *COMPRESSED, APART, SERVER)
    ),
    Refused(
        BALANCE,
        ADASUM,
        "each rank's mean counts as much, so that the model would depend on which rank is how fast",
        "set sync.allreduce.combine=sum",
    ),
    *(Refused(ADASUM, wire, "Horovod's Adasum sends fp32", "set sync.allreduce.wire=fp32") for wire in TWO_BYTES),
    Refused(
        BESIDE_WORK,
        ASYNCHRONOUS,
        "a rank that computes its own rows cannot answer the others meanwhile",
        "set sync.parameter_server.servers=1 or more",
    ),
    *(
        Refused(
            OPTIMIZERS[name],
            SEVERAL_SERVERS,
            "norms of whole tensors would have to be summed over all servers at every push",
            "set sync.parameter_server.servers=1, or optim.name=adamw",
        )
        for name in ("lamb", "lars")
    ),
    Refused(
        OPTIMIZERS["muon"],
        ASYNCHRONOUS,
        "all workers would wait for a server that makes matrices orthogonal at every push",
        "set optim.name=adamw, or sync.parameter_server.mode=synchronous",
    ),
    Refused(
        PRECISIONS["fp16"],
        ASYNCHRONOUS,
        "each worker would need a scale of the loss of its own",
        "set precision=bf16",
    ),
    Refused(
        SKIP,
        ASYNCHRONOUS,
        "a push is judged where it is taken, and the other ranks do not learn of it",
        "set guard.policy=stop",
    ),
    Refused(RAMP, ASYNCHRONOUS, "rows are dealt in shares of one size", "set train.ramp_start=0"),
    Refused(
        COMPILE_MODEL,
        PIPELINE,
        "a model over several stages is no single graph",
        "set compile=blocks",
    ),
    Refused(
        COMPILE_BLOCKS,
        OF_SCHEDULES["zero_bubble"],
        "a compiled block makes all of its gradients at once",
        "set compile=none, or cut.schedule=1f1b",
    ),
    *(
        Refused(SEVERAL_STAGES, schedule, "it has one stage a rank", "set cut.schedule=interleaved")
        for name, schedule in OF_SCHEDULES.items()
        if name != "interleaved"
    ),
    Refused(
        ONE_STAGE, OF_SCHEDULES["interleaved"], "there is nothing to interleave", "set cut.stages_per_rank=2 or more"
    ),
    *(
        Refused(cut, sync, "it compresses gradients of replicas that are whole on a rank", "set sync.name=allreduce")
        for sync in COMPRESSED
        for cut in (TENSOR, PIPELINE)
    ),
    *(
        Refused(zero, sync, "these are two ways to agree", "set sync.name to one of them")
        for sync in COMPRESSED
        for zero in (ZERO_1, ZERO_2)
    ),
    *(
        Refused(OPTIMIZERS[name], SIGN, why, "set optim.name=sgd, and a third of AdamW's lr")
        for name, why in (
            ("adamw", _SECOND_MOMENT),
            ("lamb", _SECOND_MOMENT),
            ("lars", "it gives signs, whose norm says only how many they are"),
            ("muon", "it gives signs, whose directions are none of the gradient's"),
        )
    ),
    Refused(MOMENTUM, SIGN, "each rank has a momentum of its own already", "set optim.momentum=0"),
    Refused(CLIPS, SIGN, "signs have no size that could be clipped", "set optim.clip_norm=0"),
    Refused(SPIKES, SIGN, "all signs are of one size", "set guard.spike_norm=0"),
    *(
        Refused(
            cut,
            BALANCE,
            "ranks of one replica wait for one another within a pass, so that no rank's time tells its speed",
            "set balance.every=0",
        )
        for cut in (TENSOR, PIPELINE)
    ),
    Refused(BALANCE, ASYNCHRONOUS, "whoever is fast asks for more rows already", "set balance.every=0"),
    Refused(BALANCE, SIGN, "a rank has one vote, however many rows it has", "set balance.every=0"),
    Refused(
        BALANCE,
        APART,
        "between two meetings no rank waits for another, and where they meet each counts alike",
        "set balance.every=0",
    ),
    *(
        Refused(how, BALANCE, "every new number of rows is compiled anew", "set compile=none, or balance.every=0")
        for how in (COMPILE_BLOCKS, COMPILE_MODEL)
    ),
    Refused(
        LENGTHS,
        BALANCE,
        "how many rows a rank has says little of the time that they take",
        "set balance.every=0",
    ),
)


# --- asking ------------------------------------------------------------------------------------------------------


def check_combination(settings: Settings) -> None:
    """Errors: ConfigError, one message for all that does not fit (local; the same on every rank)."""
    problems = [
        f"{one.row.said(settings)} does not go with {one.column.said(settings)}: {one.why}; {one.cure}"
        for one in REFUSED
        if one.row.asked(settings) and one.column.asked(settings)
    ]
    problems += _heads(settings)
    if problems:
        raise ConfigError("; ".join(problems))


def _heads(settings: Settings) -> Iterator[str]:
    """Each rank of the tensor axis has as many heads as the others, and the key heads that these read."""
    tensor, heads = settings["mesh.tensor"], settings["model.heads"]
    key_heads = settings["model.kv_heads"] or heads
    key, number = ("model.heads", heads) if heads % tensor else ("model.kv_heads", key_heads)
    if number % tensor:
        fit = [n for n in range(1, key_heads + 1) if math.gcd(heads, key_heads) % n == 0]
        up = -(-number // tensor) * tensor
        yield (
            f"mesh.tensor={tensor} does not divide {key}={number}; set mesh.tensor={_either(fit)}, "
            f"or {key}={up} for another model"
        )


def bubble(settings: Settings, microbatches: int) -> float:
    """Share of a step in which the ranks of a pipeline wait for one another, where all stages cost alike."""
    ranks, stages_per_rank = settings["mesh.pipeline"], settings["cut.stages_per_rank"]
    if ranks == 1:
        return 0.0
    passes = SCHEDULES[settings["cut.schedule"]](ranks, microbatches, stages_per_rank)
    return check(with_transfers(passes), Costs.alike(ranks * stages_per_rank)).bubble


def notes_on(settings: Settings, microbatches: int) -> list[str]:
    """What a user should know of a combination that fits. microbatches: of a step."""
    stages = settings["mesh.pipeline"]
    if microbatches >= stages:
        return []
    return [
        f"mesh.pipeline={stages} has more stages than a step has microbatches ({microbatches}): a rank waits for "
        f"others in {bubble(settings, microbatches):.0%} of a step; lower train.microbatch"
    ]


def notes_on_sync(settings: Settings) -> list[str]:
    """What a user should know of a way to agree that fits."""
    if not (TOPK.asked(settings) and OPTIMIZERS["adamw"].asked(settings)):
        return []
    return [
        "sync.name=topk with optim.name=adamw: what waits in the residual comes late and in lumps, which AdamW takes "
        "for noise (validation loss 27 % higher at 1 %); sync.name=powersgd sends less and loses less"
    ]


def note_on_nodes(tensor: int, ranks_per_node: int, nodes: int) -> list[str]:
    """What a user should know where ranks that share each layer are on several nodes."""
    if nodes == 1 or ranks_per_node % tensor == 0:
        return []
    here = plural(ranks_per_node, "rank")
    return [
        f"mesh.tensor={tensor} does not divide the {here} of a node: ranks that share a layer are on several nodes, "
        "and wait for the network in every layer; `hvdtrain doctor --job` measures how long"
    ]


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


# --- telling -----------------------------------------------------------------------------------------------------


def table() -> str:
    """Rows by columns in text: ``yes`` fits, a letter stands for why not."""
    letters: dict[str, str] = {}
    lines = [f"{'':<28}" + "".join(f"{name:<13}" for name in COLUMNS)]
    for row in ROWS:
        cells = []
        for column in COLUMNS.values():
            found = _refusal(row, column)
            reason = "" if found is None else f"{found.why}; {found.cure}"
            cells.append(letters.setdefault(reason, ascii_letters[len(letters)]) if reason else "yes")
        lines.append(f"{row.name:<28}" + "".join(f"{cell:<13}" for cell in cells))
    lines += ["", *(f"{letter}  {reason}" for reason, letter in letters.items())]
    return "\n".join(line.rstrip() for line in lines)


def _refusal(row: Feature, column: Feature) -> Refused | None:
    """What is refused of a pipeline is refused of each of its schedules, and what of a cut, of its own options."""
    columns = (column, *(PIPELINE for one in OF_SCHEDULES.values() if one is column), *_general(column))
    pairs = [pair for one in columns for this in (row, *_general(row)) for pair in ((this, one), (one, this))]
    return next((one for one in REFUSED if (one.row, one.column) in pairs), None)


def _general(feature: Feature) -> tuple[Feature, ...]:
    return (_ONLY_WITH[feature],) if feature in _ONLY_WITH else ()
