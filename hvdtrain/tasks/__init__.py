"""What a model is trained for. A task is one file and one line in this table."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import create_model

from hvdtrain.options import Options, option
from hvdtrain.tasks.classify import Classification
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.mlm import MaskedText
from hvdtrain.tasks.seq2seq import SequenceToSequence
from hvdtrain.tasks.span_qa import SpanAnswering
from hvdtrain.tasks.task import Task

TASKS: dict[str, type[Task[Any, Any]]] = {
    task.name: task
    for task in (
        LanguageModel,
        MaskedText,
        SequenceToSequence,
        Classification,
        SpanAnswering,
    )
}


def options_of(tasks: Mapping[str, type[Task[Any, Any]]]) -> type[Options]:
    """``name``, the first of ``tasks`` unless it is given, and under each task's name its own options."""
    meaning = "; ".join(f"{name}: {task.about}" for name, task in tasks.items())
    fields: dict[str, Any] = {"name": (Literal[*tasks], option(next(iter(tasks)), meaning))}
    fields |= {name: (task.options, task.options()) for name, task in tasks.items()}
    return create_model("TaskOptions", __base__=Options, **fields)


class TaskOptions(options_of(TASKS)):  # type: ignore[misc]  # a base that is made is none to mypy
    """Which task, and the options of each."""


def make_task(options: TaskOptions) -> Task[Any, Any]:
    """The task that is chosen, with its own options."""
    return TASKS[options.name](getattr(options, options.name))
