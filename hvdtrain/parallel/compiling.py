"""torch.compile under Horovod.

blocks   each Transformer block by itself: one compilation serves all of them, so it starts sooner, and gradients leave
         while backward runs, because each block's come when it is done
model    all in one graph: a little faster, longer to start; the gradients come all at once, at the end of backward
"""

import importlib.util
import os
import shutil
import time

import torch
from torch import nn
from torch._dynamo.callback import callback_handler

from hvdtrain.errors import ConfigError
from hvdtrain.models.layers import Block, CrossBlock

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


def compile_model(model: nn.Module, how: str) -> None:
    """Have ``model`` compiled where it is first called; names of parameters and modules stay."""
    if how == "model":
        model.compile()
    elif how == "blocks":
        for module in model.modules():
            if isinstance(module, Block | CrossBlock):
                module.compile()


class CompileClock:
    """Seconds that torch.compile has taken in this process since ``start``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def start(self) -> "CompileClock":
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        return self

    def stop(self) -> None:
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)

    def _begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
