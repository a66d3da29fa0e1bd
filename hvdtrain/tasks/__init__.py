"""What a model is trained for. A task is one file and one line in this table."""

from typing import Literal

from hvdtrain.options import Options, option
from hvdtrain.tasks.classify import Classification, ClassifyOptions
from hvdtrain.tasks.lm import LanguageModel, LanguageModelOptions
from hvdtrain.tasks.seq2seq import Seq2SeqOptions, SequenceToSequence
from hvdtrain.tasks.task import Task

TASKS = {
    "lm": LanguageModel,
    "seq2seq": SequenceToSequence,
    "classify": Classification,
}


class TaskOptions(Options):
    name: Literal["lm", "seq2seq", "classify"] = option(
        "lm", "lm: predict the next token; seq2seq: a target from a source; classify: a text's label"
    )
    lm: LanguageModelOptions = LanguageModelOptions()
    seq2seq: Seq2SeqOptions = Seq2SeqOptions()
    classify: ClassifyOptions = ClassifyOptions()


def make_task(options: TaskOptions) -> Task:
    return TASKS[options.name](getattr(options, options.name))
