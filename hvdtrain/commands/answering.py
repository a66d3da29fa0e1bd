"""Texts answered by a trained run, shared by however many ranks there are: what ``generate`` and ``evaluate`` do alike.

    open_answering    the run, its model, how its task answers
    Answering.rows    the texts as rows; those that are empty, or too long, counted
    Answering.share   this replica's rows, and their answers

Rows of about one length are answered together. These groups are the same on any number of ranks, and so are the
answers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.world import World
from hvdtrain.errors import DataError
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.tasks import make_task
from hvdtrain.tasks.answers import Answer, Answers, Asked, Row, open_tokenizer
from hvdtrain.trained import Run, TrainedModel, open_model
from hvdtrain.watch.bar import evaluating

TooLong = Literal["refuse", "truncate", "drop"]


@dataclass(frozen=True)
class Answering:
    """A run that answers."""

    run: Run
    trained: TrainedModel
    answers: Answers
    mesh: Mesh

    def rows(self, texts: Sequence[str], too_long: TooLong, place: str, counts: Counter[str]) -> list[Row]:
        """The texts that can be answered, with their places; what cannot is counted (local).

        place: what they are lines of, for messages. Errors: see ``row``.
        """
        counts["empty"] += sum(not text.strip() for text in texts)
        rows = (
            self.row(text, number, too_long, f"{place}: line {number + 1}", counts)
            for number, text in enumerate(texts)
            if text.strip()
        )
        return [row for row in rows if row is not None]

    def row(self, text: str, number: int, too_long: TooLong, place: str, counts: Counter[str]) -> Row | None:
        """None: it cannot be answered, which is counted.

        Errors: DataError where it has more tokens than the model has positions, and ``too_long`` says refuse.
        """
        tokens = self.answers.encode(text)
        if not tokens:
            counts["unknown"] += 1
            return None
        if self.answers.room is not None and len(tokens) > self.answers.room:
            if too_long == "refuse":
                raise DataError(
                    f"{place} has {len(tokens):,} tokens, and model.context={self.answers.room}; "
                    "--too-long truncate cuts such texts, --too-long drop leaves their answers empty"
                )
            counts[too_long] += 1
            if too_long == "drop":
                return None
            tokens = self.answers.cut(tokens)
        return Row(text, tokens, number)

    def share(self, rows: Sequence[Row]) -> dict[int, list[Answer]]:
        """The answers to this replica's share of the rows, by their places; on the rank that speaks for it, and none on
        its others (collective).
        """
        mesh = self.mesh
        groups = shares(rows, mesh.replicas, self.answers.tokens_at_once)[mesh.number]

        def work() -> dict[int, list[Answer]]:
            found: dict[int, list[Answer]] = {}
            for members in evaluating(groups, len(groups), mesh.world.rank == 0, "answering"):
                answers = self.answers.answer(self.trained.replica.answering, members)
                found |= {row.number: of_row for row, of_row in zip(members, answers, strict=True)}
            return found if mesh.speaks else {}

        return mesh.world.together(work)


def open_answering(run: Run, mesh: Mesh, world: World, given: Mapping[str, Any], weights: Weights | None) -> Answering:
    """The model of a run, and how its task answers (collective). given: see ``Asked``. weights: see ``open_model``.

    Errors: on all ranks; ConfigError where its task answers no texts, or not so.
    """

    def prepare() -> tuple[Answers, Any]:
        learned = run.learned_from()
        manifest = learned.corpora.manifest
        asked = Asked(manifest, open_tokenizer(learned.tokenizer), run.config.model.context, given)
        return make_task(run.config.task).answers(asked), learned.corpora

    group = mesh.world
    answers, corpora = group.together(prepare)
    torch.set_num_threads(threads_of_rank(group))
    trained = open_model(run, corpora, world, mesh, weights)
    if trained.device.type == "cpu":
        use_fast_matmul("fp32")
    return Answering(run, trained, answers, mesh)


def shares(rows: Sequence[Row], replicas: int, tokens_at_once: int) -> list[list[list[Row]]]:
    """For each replica its groups of rows: the next group, from the longest rows on, to whoever has least to do."""
    waiting = sorted(rows, key=lambda row: (len(row.tokens), row.number), reverse=True)
    dealt: list[list[list[Row]]] = [[] for _ in range(replicas)]
    work, first = [0] * replicas, 0
    while first < len(waiting):
        longest = 1 + len(waiting[first].tokens)  # and what begins the answer
        members = waiting[first : first + max(1, tokens_at_once // longest)]
        first += len(members)
        number = work.index(min(work))
        dealt[number].append(members)
        work[number] += longest * len(members)
    return dealt


def count_cut(answers: Mapping[int, Sequence[Answer]], counts: Counter[str]) -> None:
    """Of each row the first answer."""
    if cut := sum(of_row[0].is_cut for of_row in answers.values()):
        counts["answers_cut"] += cut


def told(counts: Mapping[str, int], mended: Mapping[str, int]) -> list[str]:
    """What was left out, cut or mended, in words."""
    said = {
        "empty line": counts.get("empty", 0),
        "line without a known token": counts.get("unknown", 0),
        "line too long and dropped": counts.get("drop", 0),
        "line too long and cut": counts.get("truncate", 0),
        "answer cut at the end of model.context": counts.get("answers_cut", 0),
    }
    lines = [
        f"{n:,} {what if n == 1 else what.replace('line', 'lines').replace('answer', 'answers')}"
        for what, n in said.items()
        if n
    ]
    return [*lines, *(f"{number:,} {what}" for what, number in mended.items() if number)]
