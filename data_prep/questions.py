"""SQuAD's JSON -> token shards for extractive question answering.

A question and its paragraph become  [cls] question [sep] paragraph [sep].  A paragraph that is too long is cut into
windows that begin every ``stride`` tokens (Devlin et al. 2018). ``spans`` holds the first and the last token of the
answer, or 0, 0 where the window has none; ``examples`` the number of the question in the file, over all its windows.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.corpus import InputFile
from data_prep.encoder import Encoder
from data_prep.labels import check_room
from data_prep.pieces import Piece, Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item
from hvdtrain.comm.ranks import Ranks
from hvdtrain.errors import DataError


@dataclass(frozen=True)
class SquadReader:
    """``.json`` files as SQuAD 1.1 and 2.0 have them.

    Item: (number, question, paragraph, answer's first character, answer). A question without an
    answer has -1 and an empty text. A file is read whole.
    """

    files: Sequence[InputFile]

    can_begin_anywhere: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        return {}

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        return [Piece(file, 0, file.bytes, file.split) for file in self.files if file.bytes]

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        path = piece.file.path
        number = 0
        for article, paragraph in _paragraphs(piece.file):
            try:
                context, items = paragraph["context"], []
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    start, answer = (answers[0]["answer_start"], answers[0]["text"]) if answers else (-1, "")
                    if answers and context[start : start + len(answer)] != answer:
                        raise DataError(
                            f"{path}: the answer {answer!r} of question {question.get('id')!r} does not stand at "
                            f"character {start} of its paragraph"
                        )
                    fields = (str(number), question["question"], context, str(start), answer)
                    items.append(tuple(field.encode() for field in fields))
                    number += 1
            except (KeyError, TypeError, IndexError, AttributeError, UnicodeEncodeError) as error:
                raise DataError(
                    f"{path}: article {article} is not as SQuAD has it ({type(error).__name__}: {error})"
                ) from None
            yield items


def _paragraphs(file: InputFile) -> Iterator[tuple[int, dict]]:
    try:
        articles = json.loads(file.read_all())["data"]
        yield from (
            (number, paragraph) for number, article in enumerate(articles) for paragraph in article["paragraphs"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file.path} is not SQuAD JSON ({type(error).__name__}: {error})") from None


@dataclass
class QuestionsKind:
    """``frame``: ids of [cls] and [sep]. Of the question, the first ``question_tokens`` are kept.

    Errors: ConfigError where ``max_tokens`` leave no room for the paragraph.
    """

    reader: SquadReader
    frame: tuple[int, int]
    max_tokens: int = 384
    stride: int = 128
    question_tokens: int = 64

    name = "qa"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_room(self.max_tokens, self.question_tokens + 3)

    def identity(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "stride": self.stride, "question_tokens": self.question_tokens}

    def begin(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        pass

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        rows, spans, examples = [], [], []
        first, last = self.frame
        texts = [[item[field].decode() for item in items] for field in (1, 2, 4)]
        # Characters of answers are wanted, so this is one for the library that gives each token's place in the text.
        encoded = [self._encoder.encodings(side, counts) for side in texts[:2]]
        for number, (question, context) in enumerate(zip(*encoded, strict=True)):
            start = int(items[number][3])
            answer = self._tokens_of(context.offsets, start, start + len(texts[2][number])) if start >= 0 else None
            head = [first, *question.ids[: self.question_tokens], last]
            room = self.max_tokens - len(head) - 1
            begin = 0
            while True:
                window = context.ids[begin : begin + room]
                rows.append([*head, *window, last])
                inside = answer and begin <= answer[0] and answer[1] < begin + len(window)
                spans.append([len(head) + at - begin for at in answer] if inside else [0, 0])
                examples.append(int(items[number][0]))
                if begin + room >= len(context.ids):
                    break
                counts["overlapping_windows"] += 1
                begin += min(self.stride, room)
        return {
            "tokens": np.array([token for row in rows for token in row], np.int64),
            "doc_offsets": np.array([len(row) for row in rows], np.int64),
            "spans": np.array(spans, np.int64).reshape(-1, 2),
            "examples": np.array(examples, np.int64),
        }

    @staticmethod
    def _tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
        """First and last token that hold characters ``start`` to ``end``."""
        touching = [number for number, (a, b) in enumerate(offsets) if a < end and b > start]
        return (touching[0], touching[-1]) if touching else None
