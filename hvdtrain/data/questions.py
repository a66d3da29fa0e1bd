"""Questions of one split by their number: their windows among the records, their paragraph and its characters, and
their answers. ``shards.py`` has the layout.
"""

import json
from dataclasses import dataclass

import numpy as np

from hvdtrain.data.records import Records


@dataclass(frozen=True)
class Question:
    """``id``, ``context`` and ``answers`` as the file has them. No answers: the paragraph has none; None: not told."""

    id: str
    context: str
    answers: tuple[str, ...] | None


def question_of(text: np.ndarray) -> Question:
    """From JSON in UTF-8, uint8 [bytes]. Errors: ValueError where it is another text."""
    said = json.loads(text.tobytes())
    if not isinstance(said, dict) or said.keys() != {"id", "context", "answers"}:
        raise ValueError("it is no object of id, context and answers")
    name, context, answers = said["id"], said["context"], said["answers"]
    if not isinstance(answers, list | None) or not all(isinstance(o, str) for o in (name, context, *(answers or ()))):
        raise ValueError("its id, context and answers are no texts")
    return Question(name, context, None if answers is None else tuple(answers))


def text_of(question: Question) -> bytes:
    """What ``question_of`` reads."""
    answers = None if question.answers is None else list(question.answers)
    said = {"id": question.id, "context": question.context, "answers": answers}
    return json.dumps(said, ensure_ascii=False).encode()


def windows_of(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Windows over a paragraph of so many tokens, ``room`` in each: its first token, and the one behind its last."""
    #   10 tokens, room 4, stride 3     0 1 2 3
    #                                         3 4 5 6
    #                                               6 7 8 9
    step = min(stride, room)
    count = 1 + max(0, -(-(tokens - room) // step))
    return [(begin, min(begin + room, tokens)) for begin in range(0, count * step, step)]


class Questions:
    """``len(questions)`` of them. ``first_rows``: int64 [questions + 1]; the windows of question j are the rows
    ``first_rows[j]`` to ``first_rows[j + 1]`` of the records.
    """

    def __init__(self, records: Records):
        self._shards = [shard for _, shard in records.shards]
        counts = [len(shard["question_offsets"]) - 1 for shard in self._shards]
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts
        offsets = [first + shard["question_offsets"][:-1] for first, shard in records.shards]
        self.first_rows = np.concatenate([*offsets, [len(records)]])

    def __len__(self) -> int:
        return len(self.first_rows) - 1

    def __getitem__(self, number: int) -> Question:
        return question_of(self._part("texts", "text_offsets", number))

    def chars(self, number: int) -> np.ndarray:
        """Of each token of the paragraph its first character, and the one behind its last: int32 [tokens, 2]."""
        return self._part("chars", "char_offsets", number)

    def _part(self, name: str, offsets: str, number: int) -> np.ndarray:
        at = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[at]
        place = number - int(self._firsts[at])
        first, end = map(int, shard[offsets][place : place + 2])
        return shard[name][first:end]
