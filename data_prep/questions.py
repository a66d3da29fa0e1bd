"""SQuAD's JSON -> token shards for extractive question answering.

A question and its paragraph become  [cls] question [sep] paragraph [sep].  A paragraph that is too long is cut into
windows that begin every ``stride`` tokens (Devlin et al. 2018). ``spans`` holds the first and the last token of the
answer, or 0, 0 where the window has none; ``examples`` the number of the question in the file, over all its windows.

What a score needs is kept beside the tokens, a question at a time: its id, the paragraph as it was, all answers that
the file gives, and which characters of the paragraph each token stands for (as Unicode counts them, not bytes).
``hvdtrain/data/shards.py`` has the layout. Of several answers the first that is found is learned from; all are scored
by.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.bad import KINDS, leave_out
from data_prep.corpus import InputFile
from data_prep.encoder import TokenEncoder
from data_prep.labels import check_room
from data_prep.pieces import Piece, Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.cleaning import EXACT, BadItem, Cleaning
from hvdtrain.data.questions import Question, text_of, windows_of
from hvdtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class SquadReader:
    """``.json`` files as SQuAD 1.1 and 2.0 have them; those of a test set need not tell the answers.

    Item: (number, question, paragraph, answer's first character, answer, id, all answers). A question without an answer
    has -1 and an empty text; of several answers the first that is found counts. All answers are a list in JSON, or null
    where they are not told. A file is read whole.
    """

    files: Sequence[InputFile]
    cleaning: Cleaning = EXACT
    skip_bad: bool = False

    can_begin_anywhere: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.cleaning.nfc:
            raise ConfigError("--normalise nfc would move the answers of SQuAD's files; leave it out")

    def identity(self) -> dict[str, Any]:
        return {"invalid_utf8": self.cleaning.invalid, "skip_bad": self.skip_bad}

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        return [Piece(file, 0, file.bytes, file.split) for file in self.files if file.bytes]

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        number = 0
        for place, paragraph in _paragraphs(piece.file):
            items = []
            for question in _questions(paragraph):
                counts["questions"] += 1
                try:
                    items.append((str(number).encode(), *self._item(paragraph, question, piece.file, counts)))
                except BadItem as bad:
                    name = repr(question["id"]) if isinstance(question, dict) and "id" in question else "without id"
                    message = f"{piece.file.path}, {place}: question {name} {bad}"
                    leave_out(BadItem(bad.kind, message), self.skip_bad, counts)
                number += 1
            yield items

    def _item(self, paragraph: Any, question: Any, file: InputFile, counts: Counter) -> Item:
        """All but the number. Errors: BadItem, whose message begins with the verb."""
        context = self._text(paragraph, "context", file, counts)
        asked = self._text(question, "question", file, counts)
        is_number = type(question.get("id")) is int
        name = str(question["id"]).encode() if is_number else self._text(question, "id", file, counts)
        start, answer, answers = self._answer(context.decode(), question, file, counts)
        return asked, context, str(start).encode(), answer.encode(), name, json.dumps(answers).encode()

    def _answer(
        self, context: str, question: dict[str, Any], file: InputFile, counts: Counter
    ) -> tuple[int, str, list[str] | None]:
        """Where the answer to learn from stands (-1: nowhere), its text, and all answers (None: they are not told)."""
        impossible = question.get("is_impossible", False)
        if not isinstance(impossible, bool):
            raise BadItem("question", f"has is_impossible {impossible!r}, which is neither true nor false")
        if not impossible and "answers" not in question:
            if file.split != "test":
                raise BadItem("question", 'has no "answers"; a test set without them is given as --test-input')
            counts["questions_unlabelled"] += 1
            return -1, "", None
        answers = [] if impossible else question["answers"]
        if not isinstance(answers, list):
            raise BadItem("question", f'has "answers" that are no list but {type(answers).__name__}')
        if not answers:
            counts["questions_without_answer"] += 1
            return -1, "", []
        texts = [self._text(answer, "text", file, counts).decode() for answer in answers]
        for text, answer in zip(texts, answers, strict=True):
            start = answer.get("answer_start")
            if type(start) is not int:
                raise BadItem("question", f'has an "answer_start" of {start!r}, which is no whole number')
            if (found := find_answer(context, text, start)) is not None:
                counts["questions_answered"] += 1
                if found != (start, text):
                    counts["answers_moved"] += 1
                return *found, texts
        raise BadItem("answer", f"has the answer {text!r} at character {start}, which is not in its paragraph")

    def _text(self, holder: Any, name: str, file: InputFile, counts: Counter) -> bytes:
        value = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(value, str):
            raise BadItem("question", f'has no text as its "{name}"')
        try:
            return self.cleaning.clean_text(value, file.path, 0, counts)
        except BadItem as bad:
            raise BadItem(bad.kind, f'is {KINDS[bad.kind]} in its "{name}" (--invalid-utf8 replace)') from None


def find_answer(context: str, answer: str, start: int) -> tuple[int, str] | None:
    """Where the answer stands, and its text there; None where it does not stand in the paragraph, or may be elsewhere.

    Tools count differently: ``start`` may count bytes or UTF-16, or be wrong by some white space. Where it is wrong
    otherwise, the nearest place with the same text is taken; where it lies outside the paragraph, only the one place
    that has the text.
    """
    if start >= 0 and answer and context.startswith(answer, start):
        return start, answer
    forms = [unicodedata.normalize(form, answer.strip()) for form in ("NFC", "NFD")]
    for text in dict.fromkeys([answer, answer.strip(), *forms]):
        places = [at for at in range(len(context)) if text and context.startswith(text, at)]
        for at in (start, _characters(context, start, "utf-16-le", 2), _characters(context, start, "utf-8", 1)):
            if at in places:
                return at, text
        if places and (0 <= start < len(context) or len(places) == 1):
            return min(places, key=lambda at: abs(at - start)), text
    return None


def _characters(text: str, count: int, encoding: str, unit: int) -> int:
    """How many characters come before ``count`` units of an encoding."""
    return len(text.encode(encoding)[: count * unit].decode(encoding, "ignore")) if count >= 0 else -1


def _paragraphs(file: InputFile) -> Iterator[tuple[str, Any]]:
    """(where it is, paragraph). Errors: DataError where there are none to be found."""
    raw = file.read_all()
    try:
        articles = json.loads(raw)["data"]
        for number, article in enumerate(articles):
            for place, paragraph in enumerate(article["paragraphs"]):
                yield f"article {number}, paragraph {place}", paragraph
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file.path} is not SQuAD JSON ({type(error).__name__}: {error})") from None


def _questions(paragraph: Any) -> list[Any]:
    """The questions of a paragraph; where they cannot be found, one None, which is then refused."""
    questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
    return questions if isinstance(questions, list) else [None]


@dataclass
class QuestionsKind:
    """``frame``: ids of [cls] and [sep]. Of the question, the first ``question_tokens`` are kept; longer ones are
    counted, as are answers that no window holds, whose question then has none.

    Errors: ConfigError where ``max_tokens`` leave no room for the paragraph.
    """

    reader: SquadReader
    frame: tuple[int, int]
    max_tokens: int = 384
    stride: int = 128
    question_tokens: int = 64

    name = "qa"
    label_names: tuple[str, ...] = ()
    version = 2

    def __post_init__(self) -> None:
        if not self.max_tokens:
            raise ConfigError("--max-tokens 0: a window of SQuAD's paragraphs has a length")
        check_room(self.max_tokens, self.question_tokens + 3)

    def identity(self) -> dict[str, Any]:
        sizes = {"max_tokens": self.max_tokens, "stride": self.stride, "question_tokens": self.question_tokens}
        return {**sizes, "version": self.version}

    def begin(self, encoder: TokenEncoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        pass

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        rows, places, per_question, chars, texts = [], [], [], [], []
        spans, examples = [], []
        # Characters of answers are wanted, so this is one for the library that gives each token's place in the text.
        asked, contexts = ([item[field].decode() for item in items] for field in (1, 2))
        encoded = [self._encoder.encodings(side, counts) for side in (asked, contexts)]
        for item, question, context in zip(items, *encoded, strict=True):
            start = int(item[3])
            answer = self._tokens_of(context.offsets, start, start + len(item[4].decode())) if start >= 0 else None
            if len(question.ids) > self.question_tokens:
                counts["questions_cut"] += 1
            head = [self.frame[0], *question.ids[: self.question_tokens], self.frame[1]]
            windows = windows_of(len(context.ids), self.max_tokens - len(head) - 1, self.stride)
            counts["overlapping_windows"] += len(windows) - 1
            fits = start < 0
            for begin, end in windows:
                rows.append([*head, *context.ids[begin:end], self.frame[1]])
                inside = answer and begin <= answer[0] and answer[1] < end
                fits = fits or bool(inside)
                spans.append([len(head) + at - begin for at in answer] if inside else [0, 0])
                places.append([len(head), begin])
                examples.append(int(item[0]))
            if not fits:
                counts["answers_in_no_window"] += 1
            per_question.append(len(windows))
            chars.append(np.array(context.offsets, np.int32).reshape(-1, 2))
            answers = json.loads(item[6])
            told = None if answers is None else tuple(answers)
            texts.append(text_of(Question(item[5].decode(), item[2].decode(), told)))
        return {
            "tokens": np.array([token for row in rows for token in row], np.int64),
            "doc_offsets": np.array([len(row) for row in rows], np.int64),
            "spans": np.array(spans, np.int64).reshape(-1, 2),
            "examples": np.array(examples, np.int64),
            "windows": np.array(places, np.int64).reshape(-1, 2),
            "question_offsets": np.array(per_question, np.int64),
            "chars": np.concatenate(chars),
            "char_offsets": np.array([len(one) for one in chars], np.int64),
            "texts": np.frombuffer(b"".join(texts), np.uint8),
            "text_offsets": np.array([len(one) for one in texts], np.int64),
        }

    @staticmethod
    def _tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
        """First and last token that hold characters ``start`` to ``end``."""
        touching = [number for number, (a, b) in enumerate(offsets) if a < end and b > start]
        return (touching[0], touching[-1]) if touching else None
