"""Jobs for Slurm: the batch script of a recipe, its submission, and what the queue says of a run's jobs.

    slurm/train.sbatch         asked for             RUN_DIR/jobs/submit-20300131-120000.sbatch

    #SBATCH --nodes=2          --nodes 4             #SBATCH --nodes=4
    #SBATCH --time=04:00:00                     ->   #SBATCH --time=04:00:00
                               RECIPE key=value      set -- RECIPE key=value --run-dir DIR
    ... "$@"                                         ... "$@"

There is only one batch script, the project's own. The copy that is written holds all that it needs, so that a user can
submit it again: ``sbatch FILE``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError, LaunchError, OutputError, plural, say
from hvdtrain.files import again, exists, listed, make_folder, optional, read_text, seen

_OPTION = re.compile(r"#SBATCH\s+--([a-z][a-z-]*)(?:=(\S*))?(\s+#.*)?\s*")
_PLAIN = re.compile(r"[\w.,:@%+=/-]+", re.ASCII)
_NAME = re.compile(r"[\w.,@:+-]+")  # of a partition or an account
# Set by options of their own, or by the job script for itself: two values would contradict one another.
_OWN = ("nodes", "ntasks-per-node", "time", "partition", "account", "chdir", "output")
_REFUSED = (*_OWN, "ntasks", "array", "wrap", "parsable", "open-mode", "signal", "error")
# HVDTRAIN_*
_VARIABLES = ("VENV", "SITE", "LAUNCHER", "PREFLIGHT", "EXCLUDE_BAD", "STAGE", "CHAIN", "MAX_STALLED", "BIND")
_TIMES = [  # as Slurm's manual lists them; what each part counts, in seconds
    (re.compile(r"(\d+)"), (60,)),
    (re.compile(r"(\d+):(\d+)"), (60, 1)),
    (re.compile(r"(\d+):(\d+):(\d+)"), (3600, 60, 1)),
    (re.compile(r"(\d+)-(\d+)"), (86400, 3600)),
    (re.compile(r"(\d+)-(\d+):(\d+)"), (86400, 3600, 60)),
    (re.compile(r"(\d+)-(\d+):(\d+):(\d+)"), (86400, 3600, 60, 1)),
]


@dataclass(frozen=True)
class Job:
    """A training that Slurm is to start. Empty or None: as slurm/train.sbatch has it.

    recipe, overrides, run_dir: as ``hvdtrain train`` takes them, seen from ``folder`` (absolute), where the job runs.
    time: limit in one of Slurm's formats. site: a file slurm/sites/NAME.sh, or a path. chain: what goes on is a job of
    its own, not this one requeued. options: of sbatch, more than these, each ``KEY=VALUE`` or ``KEY``.
    home: the folder with slurm/ in it. variables: of the environment, which slurm/train.sbatch reads.
    """

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    nodes: int
    folder: Path
    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    ranks_per_node: int | None = None
    time: str = ""
    partition: str = ""
    account: str = ""
    site: str = ""
    chain: bool = False
    options: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What ``hvdtrain train`` is given."""
        return [self.recipe, *self.overrides, "--run-dir", str(self.run_dir)]

    @property
    def jobs_dir(self) -> Path:
        """Where the job's script and log go."""
        return self.folder / self.run_dir / "jobs"

    @property
    def site_file(self) -> Path:
        return self.folder / self.site if "/" in self.site else self.home / "slurm" / "sites" / f"{self.site}.sh"


def make_job(recipe: str, overrides: Sequence[str], run_dir: Path | None, nodes: int, **rest: Any) -> Job:
    """A job that starts in this folder, with the scripts of this checkout (or HVDTRAIN_HOME) and this Python.

    run_dir: None: runs/RECIPE, as in ``train``. rest: of ``Job``. What the user's environment says to the job script is
    written into it, so that it says the same tomorrow.
    """
    run_dir = run_dir or Path("runs") / Path(recipe).stem
    home = Path(os.environ.get("HVDTRAIN_HOME") or Path(__file__).resolve().parents[2]).absolute()
    variables = {f"HVDTRAIN_{name}": os.environ.get(f"HVDTRAIN_{name}", "") for name in _VARIABLES}
    if not variables["HVDTRAIN_VENV"] and sys.prefix != "/usr" and exists(Path(sys.prefix) / "bin" / "python"):
        variables["HVDTRAIN_VENV"] = sys.prefix
    set_ones = {name: value for name, value in variables.items() if value}
    return Job(recipe, tuple(overrides), run_dir, nodes, Path.cwd(), home, set_ones, **rest)


# --- submission ---------------------------------------------------------------------------------------------------


def submit(job: Job, dry_run: bool, world: World) -> str:
    """Hand ``job`` to Slurm and return what the user wants to know: its id, script and log.

    dry_run: return the script; nothing is written or submitted.

    Errors: ConfigError for what ``check`` finds or sbatch refuses; nothing is queued then. OutputError where the script
    cannot be written. LaunchError under a launcher.
    """
    if world.size > 1:
        raise LaunchError(f"submit is for one process; {world.launcher} started {world.size} of it")
    template = read_template(job.home)
    notes, script = check(job, template), render(job, template)
    for note in notes:
        say(note)
    if dry_run:
        return script.rstrip("\n")
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch on the PATH: this machine submits no Slurm jobs; --dry-run shows the script")
    path = _write(job.jobs_dir / time.strftime("submit-%Y%m%d-%H%M%S.sbatch"), script)
    try:
        job_id = _sbatch(path, job.home, _environment(_sbatch_options(job)))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    log = job.jobs_dir / f"{job_id}.log"
    # For status: a job that waits has left nothing else.
    _write(path.with_suffix(".json"), json.dumps({"job_id": job_id, "script": str(path), "log": str(log)}) + "\n")
    ranks = ranks_of(job, template)
    size = f"{plural(ranks, 'rank')} on {plural(job.nodes, 'node')}"
    status = f"python -m hvdtrain status {shlex.quote(str(job.run_dir))}"
    rows = {"job": f"{job_id} ({size})", "script": path, "log": log, "status": status}
    return "\n".join(f"{name:<8}{value}" for name, value in rows.items())


def _write(path: Path, text: str) -> Path:
    try:
        make_folder(path.parent)
        again(lambda: path.write_bytes(os.fsencode(text)), path)  # names of files need not be UTF-8
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _environment(asked: Mapping[str, Any]) -> dict[str, str]:
    """Without the SBATCH_* variables that would win over what was asked for."""
    other = {"time": "TIMELIMIT"}
    doomed = {f"SBATCH_{other.get(key, key.upper().replace('-', '_'))}" for key in asked}
    return {name: value for name, value in os.environ.items() if name not in doomed}


def _sbatch(script: Path, home: Path, env: Mapping[str, str]) -> str:
    """Submit ``script``; returns the job's id. Where this process is itself part of a job, the new job does not get
    that one's variables (slurm/job.sh).

    Errors: ConfigError with sbatch's own words.
    """
    words = '. "$1" && forget_this_job && exec sbatch --parsable "$2"'
    command = ["bash", "-c", words, "bash", str(home / "slurm" / "job.sh"), str(script)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot start sbatch: {error.strerror}") from None
    said = [re.sub(r"^sbatch: (error: |fatal: )?", "", line) for line in done.stderr.splitlines() if line.strip()]
    job_id = (done.stdout.split() or [""])[-1].partition(";")[0]  # ID, or ID;CLUSTER
    if done.returncode != 0 or not job_id.isdecimal():
        raise ConfigError(f"sbatch refused the job: {'; '.join(said) or f'exit code {done.returncode}, no word why'}")
    for line in said:
        say(f"sbatch: {line}")
    return job_id


# --- checks -------------------------------------------------------------------------------------------------------


def check(job: Job, template: str) -> list[str]:
    """Find out now what would end the job as soon as it starts; returns notes for the user, a line each.

    Errors: ConfigError for settings that cannot be, among them a batch that the ranks cannot share.
    """
    from hvdtrain import sizing
    from hvdtrain.config import flatten, load_config  # and torch with it, which asking the queue does not need
    from hvdtrain.cut.combinations import check_combination, note_on_nodes
    from hvdtrain.sync import check_sync

    for name, number in (("--nodes", job.nodes), ("--ranks-per-node", job.ranks_per_node)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    if job.time:
        seconds_of(job.time)
    for name, word in (("--partition", job.partition), ("--account", job.account)):
        if word and not _NAME.fullmatch(word):
            raise ConfigError(f"{name} {word!r} is no name that Slurm takes")
    _check_options(job.options)
    _check_site(job)
    config, ranks = load_config(job.recipe, job.overrides, [job.folder / job.run_dir]), ranks_of(job, template)
    check_combination(flatten(config.model_dump()))
    replicas = config.replicas_of(ranks)
    sizing.check_shareable(sizing.sized(config, replicas), replicas)
    steps = None
    if not (config.train.epochs or config.schedule.warmup_epochs):  # those need the data, which may come later
        steps = sizing.scaled(config, replicas, 0).steps
    check_sync(config.sync, replicas, steps)
    _check_run_dir(job)
    names = list(config.data.mixture) or [config.data.dir]
    missing = [name for name in names if not seen(job.folder / name / "manifest.json")]
    notes = [f"no shards in {name} yet; the job needs them when it starts" for name in missing]
    return [f"note: {note}" for note in [*notes, *note_on_nodes(config.mesh.tensor, ranks // job.nodes, job.nodes)]]


def _check_options(options: Sequence[str]) -> None:
    for option in options:
        key = option.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]+", key):
            raise ConfigError(f"--slurm {option}: expected an option of sbatch, like --slurm gpus-per-node=4")
        if key in _REFUSED:
            own = {"ntasks-per-node": "ranks-per-node", "chdir": "run-dir", "output": "run-dir"}
            cure = f"use --{own.get(key, key)}" if key in _OWN else "the job script needs its own"
            raise ConfigError(f"--slurm {option}: {cure}")


def _check_site(job: Job) -> None:
    if job.site and not job.site_file.is_file():
        folder = job.home / "slurm" / "sites"
        there = ", ".join(sorted(path.stem for path in folder.glob("*.sh"))) or "none"
        raise ConfigError(f"--site {job.site}: there is no {job.site_file}; sites in {folder}: {there}")


def _check_run_dir(job: Job) -> None:
    run_dir = job.folder / job.run_dir
    if exists(run_dir / "stop"):
        raise ConfigError(f"{job.run_dir}/stop tells the run to stop; remove that file first")
    if queue := ask_queue(job_ids(run_dir)):
        job_id, queued = next(iter(queue.items()))
        raise ConfigError(
            f"job {job_id} of {job.run_dir} is in the queue already ({queued.state}); "
            f"`scancel {job_id}` first, or give another --run-dir"
        )


def read_template(home: Path) -> str:
    """Errors: ConfigError that says where the script is to be had."""
    path = home / "slurm" / "train.sbatch"
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path} ({getattr(error, 'strerror', error)}): the job scripts come with hvdtrain's source, "
            "not with the installed package; set HVDTRAIN_HOME to a checkout of it"
        ) from None


# --- the script ---------------------------------------------------------------------------------------------------


def render(job: Job, template: str) -> str:
    """The batch script of ``job``: ``template`` (slurm/train.sbatch) with its #SBATCH lines set and its words baked in.

    Errors: ConfigError for a value that no #SBATCH line can hold.
    """
    asked = _sbatch_options(job)
    lines = template.rstrip("\n").split("\n")
    at = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    if not at:
        raise ConfigError(f"{job.home}/slurm/train.sbatch has no #SBATCH line; it is not hvdtrain's")
    head, rest = lines[: at[-1] + 1], lines[at[-1] + 1 :]
    for number in at:
        found = _OPTION.fullmatch(head[number])
        if found is not None and found[1] in asked:
            head[number] = _sbatch_line(found[1], asked.pop(found[1])) + (found[3] or "")
    added = [_sbatch_line(key, value) for key, value in asked.items()]
    variables = {"HVDTRAIN_HOME": str(job.home), **job.variables}
    if job.site:
        variables["HVDTRAIN_SITE"] = str(job.site_file) if "/" in job.site else job.site
    if job.chain:
        variables["HVDTRAIN_CHAIN"] = "1"
    baked = [
        "",
        "# Written by `hvdtrain submit`; `sbatch` takes this file again as it is.",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"set -- {shlex.join(job.words)}",
        "",
    ]
    return "\n".join([*head, *added, *baked, *rest]) + "\n"


def ranks_of(job: Job, template: str) -> int:
    """How many ranks the job starts. Errors: ConfigError where neither it nor the template says how many a node."""
    per_node = job.ranks_per_node or next(
        (
            int(found[2])
            for line in template.splitlines()
            if (found := _OPTION.fullmatch(line)) and found[1] == "ntasks-per-node" and (found[2] or "").isdecimal()
        ),
        0,
    )
    if per_node < 1:
        raise ConfigError("slurm/train.sbatch has no --ntasks-per-node; give --ranks-per-node M")
    return job.nodes * per_node


def _sbatch_options(job: Job) -> dict[str, str | None]:
    """Option of sbatch -> value; None: it takes none."""
    asked: dict[str, str | None] = {"nodes": str(job.nodes)}
    if job.ranks_per_node is not None:
        asked["ntasks-per-node"] = str(job.ranks_per_node)
    for key, value in (("time", job.time), ("partition", job.partition), ("account", job.account)):
        if value:
            asked[key] = value
    for option in job.options:
        key, equals, value = option.partition("=")
        asked[key] = value if equals else None
    # %: Slurm puts the job's id and more into the log's name, and reads %% as one.
    asked |= {"chdir": str(job.folder), "output": str(job.jobs_dir).replace("%", "%%") + "/%j.log"}
    return asked


def _sbatch_line(key: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{key}"
    if not value.isprintable() or "\\" in value:  # a backslash makes Slurm take %j in a log's name as it is
        raise ConfigError(
            f"{value!r} (--{key}) cannot stand in a job script: it has a backslash or a control character"
        )
    if _PLAIN.fullmatch(value):
        return f"#SBATCH --{key}={value}"
    return '#SBATCH --{}="{}"'.format(key, value.replace('"', '\\"'))


def seconds_of(time_limit: str) -> int:
    """A time limit in one of Slurm's formats. Errors: ConfigError."""
    for form, units in _TIMES:
        if found := form.fullmatch(time_limit):
            seconds = sum(int(part) * unit for part, unit in zip(found.groups(), units, strict=True))
            if seconds > 0:
                return seconds
    raise ConfigError(
        f"--time {time_limit}: give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, above 0, like 4:00:00"
    )


# --- the queue ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queued:
    """A job that squeue knows: its state in Slurm's words, and why it waits."""

    state: str
    reason: str


def job_ids(run_dir: Path) -> list[str]:
    """Ids of the Slurm jobs that a run folder knows of: those submitted, and those that left a record."""
    folder = run_dir / "jobs"
    records = optional(lambda: listed(folder, "*-*"), f"cannot read {folder}", [])
    found = {str(read_object(path).get("job_id")) for path in records if fnmatchcase(path.name, "submit-*.json")}
    found |= {id_of(path.name) or "" for path in records}
    return sorted((job_id for job_id in found if re.fullmatch(r"\d{1,10}", job_id, re.ASCII)), key=int)


def job_records(run_dir: Path) -> list[dict[str, Any]]:
    """What the starts of a run have left in jobs/NAME/job.json, in their order; damaged ones are left out."""
    found = [read_object(path) for path in (run_dir / "jobs").glob("*/job.json")]
    return sorted((job for job in found if job), key=lambda job: str(job.get("started", "")))


def id_of(record: str) -> str | None:
    """The job's id in the name of its record (see job_record.py), such as 4711-0; None: it was no Slurm job."""
    name = re.fullmatch(r"(\d+)-\d+(\.\d+)?", record, re.ASCII)
    return name[1] if name else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one where it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def ask_queue(ids: Sequence[str]) -> dict[str, Queued] | None:
    """Which of the jobs wait or run? None: there is no Slurm here, or it does not answer."""
    if not ids:
        return {}
    command = ["squeue", "--noheader", "--format=%i|%T|%r", f"--jobs={','.join(ids)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:  # so it ends for a single id that it has forgotten
        return {} if "Invalid job id" in done.stderr else None
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return {job_id.strip(): Queued(state, reason) for job_id, state, reason in rows if state != "COMPLETING"}
