"""torch.compile under Horovod.

blocks   each Transformer block by itself: one compilation serves all of them, so it starts sooner, and gradients leave
         while backward runs, because each block's come when it is done
model    all in one graph: a little faster, longer to start; the gradients come all at once, at the end of backward
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import time

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.recompute import AnyBlock

COMPILES = ("none", "blocks", "model")


def check_compiler(how: str, device: torch.device) -> None:
    """Errors: ConfigError where there is nothing to compile with."""
    if how == "none":
        return
    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):
        raise ConfigError(f"compile={how} needs a C++ compiler: there is no {compiler}; install one, or set CXX")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise ConfigError(f"compile={how} needs Triton, which this torch lacks; pip install triton")


def uncompiled() -> contextlib.AbstractContextManager:
    """What runs inside is not compiled, and nothing of the compiler is loaded for it."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def compile_model(model: nn.Module, how: str) -> None:
    """Have ``model`` compiled where it is first called; names of parameters and modules stay."""
    if how == "model":
        model.compile()
    elif how == "blocks":
        for module in model.modules():
            if isinstance(module, AnyBlock):
                module.compile()


class CompileClock:
    """Seconds that torch.compile has taken in this process since this was made. Making it loads torch's compiler."""

    def __init__(self) -> None:
        from torch._dynamo.callback import callback_handler

        self.seconds = 0.0
        self._began = 0.0
        self._handler = callback_handler
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def close(self) -> None:
        self._handler.remove_start_callback(self._begin)
        self._handler.remove_end_callback(self._end)

    def _begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
