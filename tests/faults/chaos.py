"""One trial: a short training of two ranks breaks at a random moment, is started again until it is done, and must have
made what an unbroken one makes, to the last bit; of workers that race (see modes.py), from the same rows.

    fault      signals to ranks, death within a save, full disk | damage done to what lies there | shard taken away
    start      ------------------------------------------ ends  |                                | must end with 65
    again      ------------------------------------------------------------------------------------ ... finished

A trial follows from its seed and number alone; only the machine's timing differs.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from command import until
from dying import PLACES, PLACES_OF_MAIN
from launch import HVDTRAIN, Done, Prepared, launch, snapshot, succeed, summary
from modes import ALL, RACING, ranks_of
from not_here import small_disk
from safetensors.numpy import load

STEPS, EVERY, KEPT = 40, 5, 3
WORDS = (
    f"train.steps={STEPS}",
    "train.global_batch=16",
    "model.width=64",
    "model.context=32",
    "eval.every=20",
    f"checkpoint.every={EVERY}",
    "metrics.every=1",
    "metrics.tensorboard=false",
    "watchdog.timeout_s=4",
    "watchdog.start_timeout_s=45",
)
LIMIT_S = 180  # of one start; beyond it, it hangs
_DYING = (sys.executable, str(Path(__file__).with_name("dying.py")))
_MARK = "HVDTRAIN_TEST_CHAOS"
_DISK_MIB = 16  # four checkpoints of 1.3 MiB and the log
# What a start may end with, where this is all that happened to it. A signal may come before anybody listens.
_EXITS = {
    "kill rank 0": {137},
    "kill rank 1": {137},
    "TERM to all": {75, 143},
    "USR2 to one": {75, 140},
    "STOP of one": {70},
    "kill in a save, rank 0": {137},
    "kill in a save, rank 1": {137},
    "full disk": {74},
}
_NEAR = 0.05  # of the score of a run that is never the same twice
_MISUNDERSTOOD = {2, 65, 76}  # wrong use, bad data, diverged: never the right word for these faults


@dataclass
class Fault:
    """What happens in one trial. ``step``: when that is logged, ``delay_s`` later, the signals are sent and the disk is
    full; 0: when the ranks have been started. ``dying``: see dying.py. ``damage``: to the newest checkpoint.
    """

    step: int
    delay_s: float
    signals: list[tuple[int, str]] = field(default_factory=list)
    dying: dict[str, Any] | None = None
    full: bool = False
    damage: list[tuple[str, str, float]] = field(default_factory=list)  # file, how, where in it (0 to 1)
    shard: bool = False

    def join(self, other: "Fault") -> "Fault":
        return Fault(
            self.step,
            self.delay_s,
            self.signals + other.signals,
            self.dying or other.dying,
            self.full or other.full,
            self.damage + other.damage,
            self.shard or other.shard,
        )


def _moment(chance: random.Random, first: int) -> Fault:
    """Some are as early as loading Python; what stops listening to a watchdog that has not begun is not meant."""
    if not first and chance.random() < 0.25:
        return Fault(0, chance.uniform(0, 3))
    return Fault(chance.randint(max(1, first), STEPS - 3), chance.uniform(0, 0.1))


def _signals(*signals: tuple[int, str], first: int = 0) -> Any:
    return lambda chance: _moment(chance, first).join(Fault(0, 0, list(signals)))


def _dying(rank: int, places: tuple[str, ...]) -> Any:
    def make(chance: random.Random) -> Fault:
        place = chance.choice(places)
        # None is dropped before there are more than are kept.
        last = STEPS // EVERY - (KEPT if place == "in dropping" else 0)
        return Fault(STEPS, 0, dying={"rank": rank, "place": place, "turn": chance.randint(1, last)})

    return make


def _damaged(file: str) -> Any:
    """Killed, and then the newest checkpoint is not what it was."""

    def make(chance: random.Random) -> Fault:
        name = file if file == "manifest.json" else f"part-{chance.randrange(2):05d}-of-*.safetensors"
        how = chance.choice(("truncated", "zeroed", "flipped", "deleted"))
        return _signals((1, "KILL"), first=2 * EVERY + 2)(chance).join(
            Fault(0, 0, damage=[(name, how, chance.random())])
        )

    return make


def _full(chance: random.Random) -> Fault:
    return _moment(chance, 1).join(Fault(0, 0, full=True))


def _no_shard(chance: random.Random) -> Fault:
    return _signals((0, "KILL"))(chance).join(Fault(0, 0, shard=True))


def _two(chance: random.Random) -> Fault:
    """Two of the others, of which not both are deaths in a save."""
    names = [name for name in KINDS if name != "two at once"]
    first, second = chance.sample(names, 2)
    if "in a save" in first and "in a save" in second:
        second = "TERM to all"
    a, b = KINDS[first](chance), KINDS[second](chance)
    late = max(a, b, key=lambda fault: fault.step % STEPS)  # STEPS: the moment is the save's
    joined = a.join(b)
    joined.step, joined.delay_s = late.step % STEPS, late.delay_s
    if any(name == "STOP" for _, name in joined.signals) or joined.full:
        joined.step = max(joined.step, 1)
    return joined


KINDS: dict[str, Any] = {
    "kill rank 0": _signals((0, "KILL")),
    "kill rank 1": _signals((1, "KILL")),
    "TERM to all": _signals((0, "TERM"), (1, "TERM")),
    "USR2 to one": lambda chance: _signals((chance.randrange(2), "USR2"))(chance),
    "STOP of one": lambda chance: _signals((chance.randrange(2), "STOP"), first=1)(chance),
    "kill in a save, rank 0": _dying(0, PLACES_OF_MAIN),
    "kill in a save, rank 1": _dying(1, PLACES),
    "full disk": _full,
    "damaged part": _damaged("part"),
    "damaged manifest": _damaged("manifest.json"),
    "shard taken away": _no_shard,
    "two at once": _two,
}


@dataclass
class Record:
    """What came of a trial. ``lost``: steps made again; ``wrong``: what should not be; ``hangs``: endless starts.
    ``mode``: of modes.ALL, how the ranks agree.
    """

    trial: int
    kind: str
    asynchronous: bool
    fault: dict[str, Any]
    exits: list[int] = field(default_factory=list)
    late: bool = False  # the run had ended before the fault came
    lost: int = 0
    hangs: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    mode: str = "allreduce"

    @property
    def good(self) -> bool:
        return not self.wrong and not self.hangs


def unbroken(prepared: Prepared, run_dir: Path, mode: str = "allreduce") -> Path:
    """The run that all trials of a mode are compared with; it keeps every checkpoint."""
    words = ("train", prepared.recipe, *WORDS, *ALL[mode], "checkpoint.keep_last=0", "--run-dir", run_dir)
    succeed(*words, how="mpirun", ranks=ranks_of(mode), timeout_s=LIMIT_S)
    return run_dir


def run_trial(
    kind: str, number: int, seed: int, prepared: Prepared, reference: Path, folder: Path, mode: str = "allreduce"
) -> Record:
    """Trial ``number`` of ``seed``, in ``folder``, which is empty. reference: ``unbroken`` of the mode."""
    chance = random.Random(f"{seed} {number} {kind}")
    fault, asynchronous = KINDS[kind](chance), chance.random() < 0.5
    record, began_s = Record(number, kind, asynchronous, asdict(fault), mode=mode), time.monotonic()
    with _disk(folder / "disk", fault.full) as disk:
        trial = Trial(prepared, reference, folder, disk, fault, record)
        try:
            trial.run()
        except _Hang as error:
            record.hangs += 1
            record.wrong.append(str(error))
        except AssertionError as error:
            record.wrong.append(str(error))
    record.seconds = round(time.monotonic() - began_s, 1)
    return record


class _Hang(Exception):
    pass


class Trial:
    def __init__(
        self, prepared: Prepared, reference: Path, folder: Path, disk: Path, fault: Fault, record: Record
    ) -> None:
        self.reference, self.disk, self.fault, self.record = reference, disk, fault, record
        self.run_dir, self.shards, self.ranks = disk / "run", prepared.shards, ranks_of(record.mode)
        if fault.shard:
            self.shards = folder / "shards"
            shutil.copytree(prepared.shards, self.shards)
        self.words = (
            "train",
            prepared.recipe,
            *WORDS,
            *ALL[record.mode],
            f"checkpoint.keep_last={KEPT}",
            f"checkpoint.asynchronous={str(record.asynchronous).lower()}",
            f"data.dir={self.shards}",
            "--run-dir",
            self.run_dir,
        )
        self.damaged: set[int] = set()

    def run(self) -> None:
        done, seen = self._broken_start()
        self.record.late = done.exit_code == 0
        if not self.record.late:
            self._check_exit(done)
            self._do_damage()
            self._check_nothing_is_lost(seen)
            if self.fault.shard:
                self._start_without_a_shard()
            self._start_again()
        self.check_end()

    def _broken_start(self) -> tuple[Done, int]:
        """How it ended, and the newest checkpoint before the fault."""
        fault = self.fault
        program = (*_DYING, json.dumps(fault.dying)) if fault.dying else HVDTRAIN
        start = _Start(self.words, self.ranks, program)
        seen = 0
        if fault.signals or fault.full:
            start.wait_for(lambda: len(start.ranks()) == self.ranks)
            start.wait_for(lambda: self._logged() >= fault.step)
            start.wait_for(lambda: False, fault.delay_s)
            seen = max(self._saved(), default=0)
            with suppress(ProcessLookupError, KeyError):
                ranks = start.ranks()
                for rank, name in fault.signals:
                    os.kill(ranks[rank], signal.Signals[f"SIG{name}"])
            if fault.full:
                self._fill(start)
        elif fault.dying:
            seen = EVERY * (fault.dying["turn"] - 1)
        return self._ended(start), seen

    def _fill(self, start: "_Start") -> None:
        """And keep it full: what the run gives back is gone."""
        with open(self.disk / "filler", "wb", buffering=0) as file:
            while not start.is_done():
                with suppress(OSError):
                    while True:
                        file.write(bytes(1 << 12))
                time.sleep(0.005)
        (self.disk / "filler").unlink()

    def _ended(self, start: "_Start") -> Done:
        done = start.wait()
        self.record.exits.append(done.exit_code)
        return done

    def _check_exit(self, done: Done) -> None:
        kinds = _EXITS.get(self.record.kind)
        fits = done.exit_code in kinds if kinds else done.exit_code not in _MISUNDERSTOOD
        assert fits, f"exit code {done.exit_code}\n{done}"
        stopped = [line for line in done.stdout.splitlines() if line.startswith("hvdtrain: stopped at step ")]
        if done.exit_code == 75:
            assert stopped, done
            assert self._saved()[-1] == int(stopped[0].split()[4]) == self._logged(), done

    def _do_damage(self) -> None:
        for file, how, where in self.fault.damage:
            whole = [step for step in self._saved() if step not in self.damaged]
            if len(whole) > 1:
                (path,) = self._folder(whole[-1]).glob(file)
                if _damage(path, how, where):
                    self.damaged.add(whole[-1])

    def _check_nothing_is_lost(self, seen: int) -> None:
        newest = max(self._saved(), default=0)
        assert newest >= seen, f"checkpoint of step {seen} was there before the fault, and now step {newest} is"
        self.record.lost += max(0, self._logged() - self._newest_whole())

    def _start_without_a_shard(self) -> None:
        shard = self.shards / "train-00000.h5"
        away, before = shard.rename(self.shards.parent / "away.h5"), self._content()
        done = self._ended(_Start(self.words, self.ranks))
        assert done.exit_code == 65, done
        assert [line for line in done.messages if f"shard {shard} is listed in the manifest but is missing" in line], (
            done
        )
        assert self._content() == before, "a start that failed has changed the checkpoints"
        away.rename(shard)

    def _start_again(self) -> None:
        expected = self._newest_whole()
        done = self._ended(_Start(self.words, self.ranks))
        assert done.exit_code == 0, done
        line = next((line for line in done.stdout.splitlines() if line.startswith("hvdtrain: resumed from ")), None)
        found = int(line[-8:]) if line else 0
        assert found == expected or expected == STEPS, f"resumed from step {found} instead of {expected}\n{done}"

    def check_end(self) -> None:
        assert not (wrong := [*self._other_summary(), *self._other_numbers()]), "; ".join(wrong)
        assert self._saved()[-1] == STEPS, self._saved()
        allowed = {path.name for path in self.reference.iterdir()}
        strange = {path.name for path in self.run_dir.iterdir()} - allowed
        folders = {f"step-{step:08d}" for step in self._saved()} | {f"damaged-step-{s:08d}-0" for s in self.damaged}
        strange |= {path.name for path in (self.run_dir / "checkpoints").iterdir()} - folders
        strange |= {path.name for path in self.run_dir.rglob(".*")}
        assert not strange, f"left behind: {sorted(strange)}"
        assert len(self._saved()) <= KEPT, self._saved()

    def _other_summary(self) -> Iterator[str]:
        """What the run says of itself that the reference does not."""
        found, expected = summary(self.run_dir), summary(self.reference)
        for key in ("status", "step", "tokens", "sample_digest", "data_digest"):
            if found[key] != expected[key]:
                yield f"{key} is {found[key]} instead of {expected[key]}"
        for key in ("val_loss", "best_val_loss"):
            most = _NEAR * expected[key] if self.record.mode in RACING else 0.0
            if abs(found[key] - expected[key]) > most:
                yield f"{key} is {found[key]} instead of {expected[key]}"

    def _other_numbers(self) -> Iterator[str]:
        """Checkpoints that are kept, and lines, which are not the reference's."""
        lines, expected = self._losses(self.run_dir), self._losses(self.reference)
        if self.record.mode in RACING:
            steps = [step for step, _ in lines]
            if steps != sorted(set(steps)) or steps[-1:] != [STEPS]:
                yield f"the lines of metrics.jsonl are those of steps {steps}"
            return
        for step in (step for step in self._saved() if step % EVERY == 0):
            name = f"checkpoints/step-{step:08d}"
            mine, other = _tensors(self.run_dir / name), _tensors(self.reference / name)
            if mine != other:
                names = [name for part in other for name in _differing(mine.get(part, b""), other[part])]
                yield f"step {step} differs in {len(names)} tensors: {', '.join(names[:9])}"
        if lines != expected:
            step, _ = next(mine or theirs for mine, theirs in zip_longest(lines, expected) if mine != theirs)
            yield f"metrics.jsonl differs from step {step} on"

    def _saved(self) -> list[int]:
        return sorted(int(path.name[-8:]) for path in (self.run_dir / "checkpoints").glob("step-*"))

    def _newest_whole(self) -> int:
        return max((step for step in self._saved() if step not in self.damaged), default=0)

    def _folder(self, step: int) -> Path:
        return self.run_dir / f"checkpoints/step-{step:08d}"

    def _content(self) -> dict[str, bytes]:
        return snapshot(self.run_dir / "checkpoints")

    def _logged(self) -> int:
        """The last step that is logged; 0: none is."""
        return max((step for step, _ in self._losses(self.run_dir)), default=0)

    def _losses(self, run_dir: Path) -> list[tuple[int, float]]:
        try:
            lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError:
            return []
        entries = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "train"]


class _Start:
    """One start of the program on several ranks, beside us."""

    def __init__(self, words: tuple[Any, ...], ranks: int, program: tuple[Any, ...] = HVDTRAIN):
        self._mark = f"{_MARK}={random.SystemRandom().getrandbits(64)}"
        self._result: Done | AssertionError | None = None
        self._thread = threading.Thread(target=self._run, args=(words, ranks, program))
        self._thread.start()

    def _run(self, words: tuple[Any, ...], ranks: int, program: tuple[Any, ...]) -> None:
        env = dict([self._mark.split("=")])
        try:
            self._result = launch(*words, how="mpirun", ranks=ranks, env=env, timeout_s=LIMIT_S, program=program)
        except AssertionError as error:
            self._result = error

    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait_for(self, ready: Any, timeout_s: float = LIMIT_S) -> None:
        with suppress(TimeoutError):
            until(lambda: self.is_done() or ready(), "the moment", timeout_s)

    def wait(self) -> Done:
        self._thread.join()
        if isinstance(self._result, AssertionError):
            raise _Hang(str(self._result)) if "timed out" in str(self._result) else self._result
        return self._result

    def ranks(self) -> dict[int, int]:
        """Process of each rank that is there."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                values = environ.read_bytes().split(b"\0")
                if self._mark.encode() in values:
                    for value in values:
                        if value.startswith(b"OMPI_COMM_WORLD_RANK="):
                            found.setdefault(int(value.partition(b"=")[2]), int(environ.parent.name))
        return found


def _tensors(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in snapshot(folder).items() if name.endswith(".safetensors")}


def _differing(part: bytes, other: bytes) -> list[str]:
    """Tensors of the other part that are not the same to the bit in this one."""
    mine, theirs = load(part) if part else {}, load(other)
    return [name for name in theirs if name not in mine or mine[name].tobytes() != theirs[name].tobytes()]


def _damage(path: Path, how: str, where: float) -> bool:
    """Returns whether it means something else now."""
    before = path.read_bytes()
    at = int(where * len(before))
    if how == "deleted":
        path.unlink()
        return True
    if how == "truncated":
        path.write_bytes(before[:at])
    elif how == "zeroed":
        path.write_bytes(bytes(len(before)))
    else:
        path.write_bytes(before[:at] + bytes([before[at] ^ 1 << (at % 8)]) + before[at + 1 :])
    if path.suffix == ".json":  # 1e-05 and 1E-05 are the same
        with suppress(ValueError):
            return json.loads(path.read_bytes()) != json.loads(before)
    return True


@contextmanager
def _disk(folder: Path, small: bool) -> Iterator[Path]:
    """A folder, of a disk of its own that is soon full."""
    if small:
        with small_disk(folder, f"{_DISK_MIB}m") as disk:
            yield disk
    else:
        folder.mkdir(parents=True)
        yield folder
