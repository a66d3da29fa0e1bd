"""Which way to agree pays on this network? The same recipe, seeds, rows and tokens by each of them, in turn.

    hvdtrain compare shakespeare-char --ranks 4 --bandwidth 100mbit --out runs/ways

    runs/ways/compare.md, compare.png    the table and the picture, after each run anew
              comparison.json            what was asked, and what came of it
              runs/allreduce/ ...        an ordinary run folder each, and what it printed in runs/allreduce.txt

Each rank has a network namespace of its own, whose link ``tc`` limits; where that cannot be, they meet in memory, and
that is said. Given again, the command keeps what has finished and begins the others anew: times of a run in two halves
would be no times. Ring all-reduce is the baseline: it always comes first.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm.ranks import OneRank
from hvdtrain.comm.world import World
from hvdtrain.commands.compare.modes import BASELINE, MODES, Fitting, check_equal, fit, parse_modes
from hvdtrain.commands.compare.plot import draw
from hvdtrain.commands.compare.results import Result, as_tree, digest_notes, from_tree, read_result, table
from hvdtrain.commands.compare.scaled import Large, scaled_bandwidth
from hvdtrain.commands.kept import kept
from hvdtrain.commands.ranks_here import (
    Place,
    check_launcher,
    interrupting,
    last_words,
    possible,
    threads_of,
)
from hvdtrain.config import RunConfig, flatten, load_config
from hvdtrain.data.corpora import Corpora, open_corpora
from hvdtrain.errors import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED_EARLY, ConfigError, OutputError, say
from hvdtrain.files import make_folder, write_json, write_text
from hvdtrain.jobs.claim import Claim
from hvdtrain.machine.about import machine
from hvdtrain.machine.link import Link, parse_bandwidth, parse_latency
from hvdtrain.version import versions

MEMORY, SCALED = "memory", "scaled"  # instead of a bandwidth
_EVALUATIONS = 10  # of a run, where its recipe asks for fewer
_OURS = ("claim", "network")  # what is there before comparison.json


@dataclass(frozen=True)
class Asked:
    """What the user asks for. syncs: see modes.py; none: all of MODES that fit. large: for ``scaled``."""

    recipe: str
    overrides: Sequence[str]
    syncs: Sequence[str]
    ranks: int
    bandwidth: str
    latency: str
    large: Large
    out: Path

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ConfigError(f"--ranks {self.ranks}: there is nobody to agree with; give 2 or more")
        if bool(self.large.parameters) != (self.bandwidth == SCALED):
            raise ConfigError("--bandwidth scaled and --as-large-as PARAMETERS go together")
        if self.bandwidth != SCALED and self.large != Large():
            raise ConfigError("--large-link and --large-step go with --bandwidth scaled")
        if self.bandwidth == MEMORY and parse_latency(self.latency, "--latency"):
            raise ConfigError("--latency is of links; --bandwidth memory has none")

    @property
    def command(self) -> str:
        large = self.large.words if self.bandwidth == SCALED else ()
        syncs = [word for text in self.syncs for word in ("--syncs", text)]
        where = ["--bandwidth", self.bandwidth, *large, *(("--latency", self.latency) if self.latency != "0" else ())]
        words = ["hvdtrain", "compare", self.recipe, "--ranks", str(self.ranks), *where, *syncs, *self.overrides]
        return shlex.join(["python", "-m", *words])


def compare(asked: Asked, world: World) -> int:
    """Train every mode that is not finished yet; write table and picture. One process.

    Returns 0, EXIT_STOPPED_EARLY after Ctrl-C or TERM, or the first exit code of a run that failed; one that diverges
    is a result. Errors: ConfigError for whatever cannot be, before any run; DataError; LaunchError under a launcher.
    """
    check_launcher("compare", world)
    latency_s = parse_latency(asked.latency, "--latency")
    if asked.bandwidth not in (MEMORY, SCALED):
        parse_bandwidth(asked.bandwidth, "--bandwidth")
    base = load_config(asked.recipe, asked.overrides)
    corpora = open_corpora(base.data)
    fittings, notes = _fittings(asked, corpora)
    folder = _Folder(asked.out, _identity(asked, fittings[0], corpora))
    with interrupting(), Claim(asked.out, OneRank()) as claim:
        claim.take()
        try:
            make_folder(asked.out / "runs")
            place, found = _place(asked, fittings[0], corpora, latency_s, folder)
            folder.begin(place, notes + found)
            return _run_all(asked, fittings, place, folder)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on with {asked.out}")
            return EXIT_STOPPED_EARLY
        except OSError as error:
            raise OutputError(f"cannot write {asked.out}: {error.strerror or error}") from error


def _fittings(asked: Asked, corpora: Corpora) -> tuple[list[Fitting], list[str]]:
    """What will be compared, the baseline first, and notes. Errors: ConfigError where a mode that was named does not
    fit.
    """
    modes, notes = parse_modes(asked.syncs or list(MODES)), list[str]()
    if BASELINE not in [mode.name for mode in modes]:
        modes += parse_modes([BASELINE])
    modes.sort(key=lambda mode: mode.name != BASELINE)
    first = fit(modes[0], asked.recipe, asked.overrides, asked.ranks, corpora)
    overrides = [*_own_settings(first.config), *asked.overrides]
    fittings = []
    for mode in modes:
        try:
            fittings.append(fit(mode, asked.recipe, overrides, asked.ranks, corpora))
        except ConfigError as error:
            if asked.syncs or mode.name == BASELINE:
                raise
            notes.append(f"left out: {error}")
    check_equal(fittings)
    return fittings, notes


def _own_settings(config: RunConfig) -> list[str]:
    """Under those of the user: no save but the last, as each is a meeting of all replicas; enough points for a line."""
    every = max(1, config.train.steps // _EVALUATIONS)
    every = min(config.eval.every or every, every)
    more = [f"eval.every={every}", f"metrics.every={min(config.metrics.every, every)}"]
    return ["checkpoint.every=0", "metrics.tensorboard=false", 'metrics.mfu="off"', *more]


def _identity(asked: Asked, first: Fitting, corpora: Corpora) -> dict[str, Any]:
    """What a comparison must share with one that goes on."""
    of_command = {"recipe": asked.recipe, "ranks": asked.ranks, "bandwidth": asked.bandwidth, "latency": asked.latency}
    if asked.bandwidth == SCALED:
        of_command["as large as"] = " ".join(asked.large.words)
    of_recipe = flatten(first.config.model_dump(mode="json"))
    return {**of_command, "threads": threads_of(asked.ranks), "data digest": corpora.data_digest, **of_recipe}


class _Folder:
    """What a comparison keeps. Errors: ConfigError where it is that of another, or holds something else."""

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.out, self._path = out, out / "comparison.json"
        self._tree: dict[str, Any] = {"results": {}, **kept(self._path, identity, "comparison", _OURS)}

    @property
    def link(self) -> Link | None:
        """Of the comparison that goes on."""
        found = self._tree.get("link")
        return None if found is None else Link(**found)

    @property
    def has_begun(self) -> bool:
        return "link" in self._tree

    @property
    def notes(self) -> list[str]:
        return self._tree.get("notes", [])

    @property
    def results(self) -> list[Result]:
        return [from_tree(tree) for tree in self._tree["results"].values()]

    def result_of(self, fitting: Fitting) -> Result | None:
        """Errors: ConfigError where the mode of that name had other settings."""
        name = fitting.mode.name
        if (tree := self._tree["results"].get(name)) is None:
            return None
        found = from_tree(tree)
        if found.settings != fitting.mode.said:
            raise ConfigError(
                f"--out {self.out} has {name} with {' '.join(found.settings)}, not {' '.join(fitting.mode.said)}; "
                "name another folder"
            )
        return found if found.status in ("finished", "diverged") else None

    def begin(self, place: Place, notes: Sequence[str]) -> None:
        """Errors: ConfigError where the links are not those that it had."""
        if self.has_begun and self.link != place.link:
            raise ConfigError(
                f"--out {self.out} was begun with {_shown(self.link)}, and now there would be {_shown(place.link)}: "
                "name another folder"
            )
        link = None if place.link is None else vars(place.link)
        self._tree |= {"link": link, "notes": list(dict.fromkeys([*self.notes, *notes]))}
        self._write()
        for note in notes:
            say(f"note: {note}")

    def add(self, result: Result) -> None:
        self._tree["results"][result.name] = as_tree(result)
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._tree)


def _shown(link: Link | None) -> str:
    return "no links, in memory" if link is None else f"links of {link.bits_per_s:.0f} bit/s, {link.latency_s:g} s"


def _place(
    asked: Asked, first: Fitting, corpora: Corpora, latency_s: float, folder: _Folder
) -> tuple[Place, list[str]]:
    """Where the ranks will be, and notes."""
    memory = Place(asked.ranks, None, threads_of(asked.ranks), asked.out / "network")
    if asked.bandwidth == MEMORY:
        return memory, []
    notes = list[str]()
    if asked.bandwidth != SCALED:
        wanted = Link(parse_bandwidth(asked.bandwidth, "--bandwidth"), latency_s)
    elif folder.link is not None:  # measured when it began
        wanted = Link(folder.link.bits_per_s, latency_s)
    else:
        words = [asked.recipe, *first.settings]
        bits_per_s, how = scaled_bandwidth(asked.large, first.config, corpora, memory, words, asked.out / "runs")
        wanted = Link(bits_per_s, latency_s)
        notes.append(how)
    link, more = possible(wanted, asked.ranks)
    return Place(asked.ranks, link, memory.threads, memory.folder), notes + more


def _run_all(asked: Asked, fittings: Sequence[Fitting], place: Place, folder: _Folder) -> int:
    kept = {fitting.mode.name: folder.result_of(fitting) for fitting in fittings}
    print(f"hvdtrain: {len(fittings)} ways to agree, {place.about}", flush=True)
    codes = []
    for number, fitting in enumerate(fittings, start=1):
        name = fitting.mode.name
        if kept[name] is not None:
            print(f"hvdtrain: {number} of {len(fittings)}: {name} is there", flush=True)
            continue
        print(f"hvdtrain: {number} of {len(fittings)}: {name}: {' '.join(fitting.mode.said)}", flush=True)
        result, code = _run(asked, fitting, place)
        folder.add(result)
        codes.append(code)
        _tell(asked, fittings[0], place, folder)
        loss = "no evaluation" if result.loss is None else f"validation loss {result.loss:.4f}"
        print(f"hvdtrain: {name} {result.status}: {loss}, {result.step_s:.3g} s a step", flush=True)
    print(_tell(asked, fittings[0], place, folder))
    return next((code for code in codes if code not in (EXIT_OK, EXIT_DIVERGED)), EXIT_OK)


def _run(asked: Asked, fitting: Fitting, place: Place) -> tuple[Result, int]:
    """One training, from its beginning."""
    mode = fitting.mode
    run_dir, log = asked.out / "runs" / mode.folder, asked.out / "runs" / f"{mode.folder}.txt"
    with suppress(FileNotFoundError):
        shutil.rmtree(run_dir)  # of a run that did not finish
    ran = place.train([asked.recipe, *fitting.settings, "--run-dir", str(run_dir), "--resume", "never"], log)
    if ran.exit_code not in (EXIT_OK, EXIT_DIVERGED):
        say(f"{mode.name} ended with exit code {ran.exit_code}: {last_words(log)} (see {log})")
    return read_result(mode.name, mode.said, run_dir, ran.exit_code, ran.sent_bytes), ran.exit_code


def _tell(asked: Asked, first: Fitting, place: Place, folder: _Folder) -> str:
    """Write table and picture of what there is; returns the table."""
    results, train = folder.results, first.config.train
    title = f"Ways to agree: {asked.recipe}, {asked.ranks} ranks"
    batch = f"{train.global_tokens:,} tokens" if train.global_tokens else f"{train.global_batch:,} rows"
    facts = [
        f"`{asked.command}`",
        f"{place.about}; {train.steps:,} steps of {batch}, seed {first.config.seed}",
        f"{machine()}; {', '.join(f'{name} {version}' for name, version in versions().items())}",
    ]
    text = table(results, title, facts, [*digest_notes(results), *folder.notes])
    write_text(folder.out / "compare.md", text)
    draw(results, f"{asked.recipe}: {place.about}", folder.out / "compare.png")
    return text
