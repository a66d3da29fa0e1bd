"""What a model is trained for. A task is one file and one line in this table."""

from typing import Literal

from hvdtrain.options import Options, option
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "lm": LanguageModel,
}


class TaskOptions(Options):
    name: Literal["lm"] = option("lm", "lm: predict the next token")
