"""How a trained model answers texts: from a text to tokens, from tokens to what a line of output says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import ValidationError

from hvdtrain.data.shards import Manifest
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.files import read_text
from hvdtrain.options import Options

if TYPE_CHECKING:  # training needs no tokenizer
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Answer:
    """``score``: a label's probability, or of a text what the search says: log p / tokens^length_penalty.

    ``is_cut``: the text came to the end of the model's context before its own.
    """

    text: str
    score: float
    is_cut: bool = False


@dataclass(frozen=True)
class Row:
    """A text to be answered: its tokens, and its place in all that was asked, over all ranks."""

    text: str
    tokens: list[int]
    number: int = 0


@dataclass(frozen=True)
class Asked:
    """What answers are made with. context: positions of the model. given: settings of the search on top of the run's
    own, by their names in ``SearchOptions``.
    """

    manifest: Manifest
    tokenizer: "Tokenizer"
    context: int
    given: Mapping[str, Any]

    def encode(self, text: str) -> list[int]:
        """Its tokens. Errors: DataError for a word that has none, and nothing stands for unknown words."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"the run's tokenizer cannot encode {text[:80]!r}: {error}") from None


class Prediction(NamedTuple):
    """What a model answers a question of a split. number: in the split. none: how probable it is that the paragraph has
    no answer, half at the run's threshold; 0 where all questions have one. text: the best answer all the same.
    """

    number: int
    id: str
    text: str
    none: float

    @property
    def decided(self) -> str:
        """Empty where there is none."""
        return "" if self.none > 0.5 else self.text


@dataclass(frozen=True)
class Predictions:
    """This rank's share of a split's questions: ``count`` batches, and what ``answer`` finds in one (local; without
    autograd).
    """

    count: int
    batches: Callable[[], Iterable[Any]]
    answer: Callable[[Any, Any], Iterable[Prediction]]  # model, batch


class Answers(Protocol):
    """Of one task's model to texts; made by ``Task.answers``.

    tokens_at_once: of rows that are answered together, each as long as the longest.
    room: most tokens of a row; None: any number, of which the model sees the newest.
    """

    tokens_at_once: int
    room: int | None

    def encode(self, text: str) -> list[int]:
        """Its tokens as the model reads them; none where the tokenizer knows nothing of it. Errors: DataError."""

    def cut(self, tokens: list[int]) -> list[int]:
        """``room`` of them: what matters most to the answer."""

    def answer(self, model: Any, rows: Sequence[Row]) -> list[list[Answer]]:
        """Of each row the best first, one at least (local)."""

    def line(self, answers: Sequence[Answer]) -> str:
        """What a line of text says of them."""


def given_over(defaults: Options, given: Mapping[str, Any]) -> Any:
    """``defaults`` with what was given on the command line. Errors: ConfigError that names the word."""
    try:
        return type(defaults)(**{**defaults.model_dump(), **given})
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise ConfigError(str(problem["ctx"]["error"])) from None
        word = {str(problem["loc"][0]): None}
        raise ConfigError(f"{flags(word)} {problem['input']}: {problem['msg'].lower()}") from None


def refuse_given(given: Mapping[str, Any], task: str) -> None:
    """Errors: ConfigError for settings of a search where nothing is searched."""
    if given:
        raise ConfigError(f"{flags(given)}: task.name={task} searches for no text")


def flags(given: Mapping[str, Any]) -> str:
    return ", ".join(f"--{word.replace('_', '-')}" for word in given)


def open_tokenizer(path: Path) -> "Tokenizer":
    """As in data_prep, "[SEP]" in a text is text, never the special token. Errors: DataError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(read_text(path))
        tokenizer.encode_special_tokens = True
        return tokenizer
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
