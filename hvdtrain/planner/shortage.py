"""Out of memory: what the run needs, by the plan, and what to lower."""

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator

from hvdtrain.config import RunConfig
from hvdtrain.errors import EXIT_OUT_OF_MEMORY, MemoryLimitError, RankError, describe_crash, is_out_of_memory
from hvdtrain.machine.malloc import give_back_freed_memory

_MIB = 1 << 20


@contextlib.contextmanager
def memory_explained(config: RunConfig, ranks: int, ranks_per_node: int = 0) -> Iterator[None]:
    """Around a whole run of the recipe ``config``: MemoryLimitError for what Python, torch or CUDA raise (local).

    The body's tensors must be held by functions that it calls, not by the ``with``'s own: they are let go of, so that
    there is room to make the plan. Without room for it the message goes without.
    """
    try:
        yield
    except Exception as error:
        is_agreed = isinstance(error, RankError) and error.exit_code == EXIT_OUT_OF_MEMORY
        if not (is_agreed or is_out_of_memory(error)):
            raise
        what = str(error) if is_agreed else describe_crash(error)
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = error.__context__ = None
        _let_go()
        message = f"{what[:300]}\n{_plan_words(config, ranks, ranks_per_node)}"
        raise (RankError(message, EXIT_OUT_OF_MEMORY) if is_agreed else MemoryLimitError(message)) from None


def _let_go() -> None:
    gc.collect()
    give_back_freed_memory()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _plan_words(config: RunConfig, ranks: int, ranks_per_node: int) -> str:
    try:
        from hvdtrain.planner.estimate import estimate

        found = estimate(config, ranks, ranks_per_node)
    except Exception:  # there may be no room left, or data that are gone
        return f"lower {_cures(config, config.train.microbatch, in_evaluation=True)}"
    held, load = found.memory, found.load
    parts = sorted(((size, name) for name, size in held.parts.items() if size >= _MIB), reverse=True)
    table = ", ".join(f"{name} {size / _MIB:,.0f}" for size, name in parts)
    on_node = f" ({held.total * load.ranks_per_node / _MIB:,.0f} on a node)" if load.ranks_per_node > 1 else ""
    return (
        f"planned for a rank, MiB: {held.total / _MIB:,.0f}{on_node}: {table}\n"
        f"lower {_cures(found.config, load.microbatch, held.parts.get('evaluation', 0) > 0)}"
    )


def _cures(config: RunConfig, microbatch: int, in_evaluation: bool) -> str:
    """What would help, the cheapest first. ``microbatch``: in use; 0: not known."""
    cures = []
    if microbatch != 1:
        cures.append(f"train.microbatch (now {microbatch or 'all of the rank'}; the result stays the same)")
    if in_evaluation and config.eval.rows > 1:
        cures.append(f"eval.rows (now {config.eval.rows})")
    cures.append(f"model.context (now {config.model.context})")
    others = []
    if config.recompute.name == "none":
        others.append("recompute.name=selective or full")
    if config.precision == "fp32":
        others.append("precision=bf16")
    settings = f", or set {' or '.join(others)}" if others else ""
    return f"{' or '.join(cures)}{settings}; `hvdtrain plan` tells what it saves"
