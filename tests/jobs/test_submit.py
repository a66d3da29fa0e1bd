"""``hvdtrain submit``: the script that is rendered, what is refused before anything is queued, and what is queued.

Slurm itself is a stand-in here, two small scripts on the PATH; tests/slurm/test_submit_job.py has the real one.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import Prepared

from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError, LaunchError, OutputError
from hvdtrain.jobs.slurm import Job, Queued, ask_queue, check, job_ids, make_job, ranks_of, render, seconds_of, submit

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = """\
#!/usr/bin/env bash
# Trains.
#SBATCH --job-name=hvdtrain
#SBATCH --nodes=2   # of four
#SBATCH --ntasks-per-node=3
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# More words.
set -euo pipefail

printf '%s\\0' "$HVDTRAIN_HOME" "$HVDTRAIN_VENV" "${HVDTRAIN_SITE-}" "${HVDTRAIN_CHAIN-}" "$@"
"""


def job_of(**changes) -> Job:
    variables = {"HVDTRAIN_VENV": "/opt/venv"}
    here = {"folder": Path("/work"), "home": Path("/opt/hvdtrain"), "variables": variables}
    return Job(**{"recipe": "demo", "overrides": (), "run_dir": Path("runs/demo"), "nodes": 4, **here, **changes})


# --- the script ---------------------------------------------------------------------------------------------------


def test_what_is_not_asked_for_stays():
    assert render(job_of(), TEMPLATE) == (
        """\
#!/usr/bin/env bash
# Trains.
#SBATCH --job-name=hvdtrain
#SBATCH --nodes=4   # of four
#SBATCH --ntasks-per-node=3
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=/work/runs/demo/jobs/%j.log
#SBATCH --chdir=/work

# Written by `hvdtrain submit`; `sbatch` takes this file again as it is.
export HVDTRAIN_HOME=/opt/hvdtrain
export HVDTRAIN_VENV=/opt/venv
set -- demo --run-dir runs/demo

# More words.
set -euo pipefail

printf '%s\\0' "$HVDTRAIN_HOME" "$HVDTRAIN_VENV" "${HVDTRAIN_SITE-}" "${HVDTRAIN_CHAIN-}" "$@"
"""
    )


def test_everything_asked_for():
    job = job_of(
        overrides=("optim.lr=3e-4", "data.dir=my data"), ranks_per_node=8, time="2-12", partition="gpu", account="ab12",
        site="generic", chain=True, options=("gpus-per-node=8", "exclusive", "job-name=mine", "comment=a b"),
    )  # fmt: skip
    lines = render(job, TEMPLATE).splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=mine",
        "#SBATCH --nodes=4   # of four",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=2-12",
        "#SBATCH --requeue",
        "#SBATCH --output=/work/runs/demo/jobs/%j.log",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=ab12",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --exclusive",
        '#SBATCH --comment="a b"',
        "#SBATCH --chdir=/work",
    ]
    assert "export HVDTRAIN_SITE=generic" in lines
    assert "export HVDTRAIN_CHAIN=1" in lines
    assert "set -- demo optim.lr=3e-4 'data.dir=my data' --run-dir runs/demo" in lines


def test_names_with_spaces_quotes_and_percents_in_the_header():
    job = job_of(folder=Path('/my "own" wörk'), run_dir=Path("50% żółw/日本"))
    text = render(job, TEMPLATE)
    assert '#SBATCH --chdir="/my \\"own\\" wörk"\n' in text
    assert '#SBATCH --output="/my \\"own\\" wörk/50%% żółw/日本/jobs/%j.log"\n' in text


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\\b", "a\udcffb"])
def test_names_that_no_header_can_hold(name: str):
    with pytest.raises(ConfigError, match="cannot stand in a job script"):
        render(job_of(run_dir=Path(name)), TEMPLATE)


WORD = st.binary(max_size=40).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))


@settings(max_examples=60)
@given(words=st.lists(WORD, max_size=4), venv=WORD)
def test_words_arrive_byte_for_byte(words: list[str], venv: str, tmp_path: Path):
    script = tmp_path / "script"
    variables = {"HVDTRAIN_VENV": venv}
    job = job_of(recipe="a.yaml", overrides=tuple(words), variables=variables, site="x", chain=True)
    script.write_bytes(os.fsencode(render(job, TEMPLATE)))
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    done = subprocess.run(["bash", script], capture_output=True, check=True)
    expected = [str(job.home), venv, "x", "1", "a.yaml", *words, "--run-dir", "runs/demo"]
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in expected)


def test_the_projects_own_script():
    """What is rendered of it reads as bash, and sbatch, which stops at the first command, sees every option."""
    template = (ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    job = job_of(nodes=3, ranks_per_node=2, time="10", options=("qos=high",), run_dir=Path("my runs/a"))
    text = render(job, template)
    assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""
    head = text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()].splitlines()
    asked = {"--nodes=3", "--ntasks-per-node=2", "--time=10", "--qos=high", '--output="/work/my runs/a/jobs/%j.log"'}
    options = [line.split(None, 1)[1].partition("  #")[0] for line in head if line.startswith("#SBATCH")]
    assert asked <= set(options)
    assert len({option.partition("=")[0] for option in options}) == len(options)
    assert text.count("#SBATCH") == template.count("#SBATCH") + 2  # qos and chdir
    assert set(template.splitlines()) - set(text.splitlines()) <= set(re.findall("^#SBATCH.*", template, re.MULTILINE))
    assert ranks_of(job_of(nodes=3), template) >= 3


def test_ranks():
    assert ranks_of(job_of(nodes=4), TEMPLATE) == 12
    assert ranks_of(job_of(nodes=4, ranks_per_node=8), TEMPLATE) == 32
    with pytest.raises(ConfigError, match="give --ranks-per-node M"):
        ranks_of(job_of(), TEMPLATE.replace("ntasks-per-node", "ntasks"))
    with pytest.raises(ConfigError, match="no #SBATCH line"):
        render(job_of(), "echo\n")


def test_time_limits():
    found = {text: seconds_of(text) for text in ("90", "90:30", "4:00:00", "2-12", "2-12:30", "2-12:30:15")}
    assert list(found.values()) == [5400, 5430, 14400, 216000, 217800, 217815]
    for text in ("", "0", "0:00:00", "2h", "4:00:00:00", "1-", "-5", "1.5", "four", "1 2", "UNLIMITED"):
        with pytest.raises(ConfigError, match=re.escape(f"--time {text}: give minutes")):
            seconds_of(text)


# --- submission ---------------------------------------------------------------------------------------------------

SBATCH = """\
#!/usr/bin/env bash
printf '%s\\0' "$@" "SBATCH_PARTITION=${SBATCH_PARTITION-}" "SBATCH_QOS=${SBATCH_QOS-}" >"${0%/*}/asked"
echo "sbatch: a word from the site" >&2
echo "4711;cluster"
"""
SQUEUE = """\
#!/usr/bin/env bash
echo "${!#}" >"${0%/*}/looked"
cat "${0%/*}/queue"
"""
REFUSING = """\
#!/usr/bin/env bash
echo "sbatch: error: Batch job submission failed: Invalid account" >&2
exit 1
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sbatch and squeue, first on the PATH, and home/slurm; the working folder is tmp_path/work."""
    folder = tmp_path / "fake"
    (folder / "home" / "slurm" / "sites").mkdir(parents=True)
    (folder / "home" / "slurm" / "train.sbatch").write_text(TEMPLATE)
    (folder / "home" / "slurm" / "job.sh").symlink_to(ROOT / "slurm" / "job.sh")
    (folder / "home" / "slurm" / "sites" / "generic.sh").touch()
    (folder / "queue").touch()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HVDTRAIN_HOME", str(folder / "home"))
    for name in ("VENV", "SITE", "LAUNCHER", "STAGE", "CHAIN", "MAX_STALLED", "BIND"):
        monkeypatch.delenv(f"HVDTRAIN_{name}", raising=False)
    return folder


def test_a_job_is_submitted(fake: Path, prepared: Prepared, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SBATCH_QOS", "low")
    job = make_job(str(prepared.recipe), ["seed=4"], Path("my runs/a"), 2, partition="main")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in submit(job, False, World()).splitlines())
    jobs_dir = tmp_path / "work" / "my runs" / "a" / "jobs"
    (script,) = jobs_dir.glob("submit-*.sbatch")
    assert re.fullmatch(r"submit-\d{8}-\d{6}\.sbatch", script.name)
    assert rows == {
        "job": "4711 (6 ranks on 2 nodes)",
        "script": str(script),
        "log": f"{jobs_dir}/4711.log",
        "status": "python -m hvdtrain status 'my runs/a'",
    }
    assert script.read_text(encoding="utf-8") == render(job, TEMPLATE)
    assert f"set -- {shlex.quote(str(prepared.recipe))} seed=4 --run-dir 'my runs/a'" in script.read_text()
    assert f"export HVDTRAIN_VENV={sys.prefix}" in script.read_text()
    asked = (fake / "asked").read_text().split("\0")[:-1]
    # What was asked for wins over the user's own variables, and the others stay.
    assert asked == ["--parsable", str(script), "SBATCH_PARTITION=", "SBATCH_QOS=low"]
    assert capfd.readouterr().err == "hvdtrain: sbatch: a word from the site\n"
    assert job_ids(jobs_dir.parent) == ["4711"]
    # Once more, while it waits.
    (fake / "queue").write_text("4711|PENDING|Priority\n")
    with pytest.raises(ConfigError, match=r"job 4711 of my runs/a is in the queue already \(PENDING\); `scancel 4711`"):
        submit(job, False, World())
    assert (fake / "looked").read_text() == "--jobs=4711\n"
    assert len(list(jobs_dir.iterdir())) == 2


def test_a_job_that_is_submitted_from_inside_another_one(fake: Path, prepared: Prepared, monkeypatch):
    """sbatch would hand its variables on: its binding, its memory, which ends srun, its PMI, which is gone."""
    outer = dict.fromkeys(
        (
            "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST",
            "SLURM_MEM_PER_CPU", "SRUN_CPUS_PER_TASK", "PMI_RANK", "PMI_SIZE", "PMI2_RANK", "PMIX_RANK",
            "PMIX_NAMESPACE", "OMPI_COMM_WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_SIZE", "HVDTRAIN_RANKS",
            "HVDTRAIN_END_TIME", "HVDTRAIN_RENDEZVOUS", "HVDTRAIN_LINK",
        ),
        "1",
    )  # fmt: skip
    users = dict.fromkeys(
        ("SLURM_CONF", "SBATCH_QOS", "PMIX_MCA_gds", "PMI_NO_FORK", "OMPI_MCA_btl", "HOROVOD_CYCLE_TIME"), "mine"
    )
    for name, value in {**outer, **users}.items():
        monkeypatch.setenv(name, value)
    (fake / "sbatch").write_text('#!/bin/sh\nenv >"${0%/*}/env" && echo 4711\n')
    submit(make_job(str(prepared.recipe), [], Path("a"), 1), False, World())
    handed_on = dict(line.split("=", 1) for line in (fake / "env").read_text().splitlines() if "=" in line)
    assert outer.keys() & handed_on.keys() == set()
    assert users.items() <= handed_on.items()


def test_what_the_environment_says_is_written_down(fake: Path, prepared: Prepared, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HVDTRAIN_STAGE", "/local disk")
    monkeypatch.setenv("HVDTRAIN_SITE", "generic-gpu")
    monkeypatch.setenv("HVDTRAIN_LINK", "3")  # the script's own
    Path("mine.sh").touch()
    texts = [
        submit(make_job(str(prepared.recipe), [], None, 1, site=site), True, World()) for site in ("", "./mine.sh")
    ]
    lines = [[line for line in text.splitlines() if line.startswith("export ")] for text in texts]
    rest = [f"export HVDTRAIN_HOME={fake}/home", f"export HVDTRAIN_VENV={sys.prefix}"]
    stage = "export HVDTRAIN_STAGE='/local disk'"
    assert lines[0] == [*rest, "export HVDTRAIN_SITE=generic-gpu", stage]
    assert lines[1] == [*rest, f"export HVDTRAIN_SITE={tmp_path}/work/mine.sh", stage]


def test_a_dry_run_leaves_nothing(fake: Path, prepared: Prepared, tmp_path: Path):
    (fake / "sbatch").unlink()
    job = make_job(str(prepared.recipe), [], Path("a"), 1)
    assert submit(job, True, World()) + "\n" == render(job, TEMPLATE)
    assert list((tmp_path / "work").iterdir()) == []


def test_sbatchs_refusal_is_handed_on(fake: Path, prepared: Prepared, tmp_path: Path):
    (fake / "sbatch").write_text(REFUSING)
    with pytest.raises(ConfigError, match=r"^sbatch refused the job: Batch job submission failed: Invalid account$"):
        submit(make_job(str(prepared.recipe), [], Path("a"), 1), False, World())
    (fake / "sbatch").write_text("#!/bin/sh\necho good morning\n")
    with pytest.raises(ConfigError, match=r"^sbatch refused the job: exit code 0, no word why$"):
        submit(make_job(str(prepared.recipe), [], Path("a"), 1), False, World())
    assert list((tmp_path / "work" / "a" / "jobs").iterdir()) == []


def test_without_slurm(fake: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    job = make_job(str(prepared.recipe), [], Path("a"), 1)
    with pytest.raises(LaunchError, match="submit is for one process; mpirun started 2 of it"):
        submit(job, False, World(0, 2, launcher="mpirun"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no sbatch on the PATH"):
        submit(job, False, World())
    with pytest.raises(ConfigError, match="set HVDTRAIN_HOME to a checkout of it"):
        submit(replace(job, home=Path("/nowhere")), True, World())
    Path("a").write_text("in the way")
    monkeypatch.setenv("PATH", str(fake))
    with pytest.raises(OutputError, match=r"cannot write .*/a/jobs/submit-.*Not a directory"):
        submit(job, False, World())


WRONG = {
    "nodes": ({"nodes": 0}, "--nodes 0: give 1 or more"),
    "ranks": ({"ranks_per_node": -1}, "--ranks-per-node -1: give 1 or more"),
    "time": ({"time": "2h"}, "--time 2h: give minutes"),
    "partition": ({"partition": "a b"}, "--partition 'a b' is no name"),
    "account": ({"account": "-x"}, None),
    "site": ({"site": "here"}, r"--site here: there is no .*/here\.sh; sites in .*/slurm/sites: generic$"),
    "site elsewhere": ({"site": "./mine.sh"}, r"--site \./mine\.sh: there is no .*/work/mine\.sh;"),
    "recipe": ({"recipe": "dema"}, "no recipe 'dema'; there are: "),
    "key": ({"overrides": ("optim.rate=1",)}, "unknown key 'optim.rate'"),
    "share": ({"nodes": 5}, "train.global_batch=12 sequences cannot be shared evenly by 15 ranks"),
    "replicas": ({"overrides": ("mesh.pipeline=2",)}, "takes 2 ranks a replica, and 3 is not .*; start 2 or 4 ranks"),
    "cut": ({"overrides": ("mesh.tensor=3",)}, "mesh.tensor=3 does not divide model.heads="),
    "topology": ({"overrides": ("sync.name=gossip", "sync.gossip.topology=torus")}, "torus does not fit 3 replicas"),
    "no workers": (
        {"overrides": ("sync.name=parameter_server", "sync.parameter_server.servers=3")},
        "leaves none of",
    ),
    "longer": (
        {"overrides": ("sync.name=local_sgd", "sync.local_sgd.every=13")},
        "every=13 is longer than the run",
    ),
    "scale": ({"overrides": ("scaling.rule=sqrt",)}, "scaling.rule=sqrt needs the batch"),
    "option": ({"options": ("--mem=4",)}, "--slurm --mem=4: expected an option of sbatch"),
    "own option": ({"options": ("ntasks-per-node=4",)}, "--slurm ntasks-per-node=4: use --ranks-per-node"),
    "script's option": ({"options": ("signal=USR1",)}, "--slurm signal=USR1: the job script needs its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_told_before_anything_is_queued(name: str, fake: Path, prepared: Prepared):
    changes, message = WRONG[name]
    job = replace(make_job(str(prepared.recipe), [], None, 1), **changes)
    if message is None:
        check(job, TEMPLATE)
        return
    with pytest.raises(ConfigError, match=message):
        submit(job, False, World())
    assert not (fake / "asked").exists()


def test_what_the_run_folder_says(fake: Path, prepared: Prepared, capfd):
    job = make_job(str(prepared.recipe), ["data.dir=not there"], None, 1)
    assert job.run_dir == Path("runs/small")
    submit(job, True, World())
    assert capfd.readouterr().err == "hvdtrain: note: no shards in not there yet; the job needs them when it starts\n"
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "stop").touch()
    with pytest.raises(ConfigError, match="runs/small/stop tells the run to stop; remove that file first"):
        submit(job, True, World())


# --- the queue ----------------------------------------------------------------------------------------------------


def test_ids_of_a_run_folder(tmp_path: Path):
    jobs = tmp_path / "jobs"
    for name in ("12-0", "12-1", "9-0.2", "20260102-030405-815", "x-1", "submit-20260102-030405"):
        (jobs / name).mkdir(parents=True)
    texts = ['{"job_id": "120"}', '{"job_id": 7}', "[1]", "{", '{"job_id": "1 2"}', "{}", "[" * 9**5]
    for number, text in enumerate(texts):
        (jobs / f"submit-{number}.json").write_text(text)
    assert job_ids(tmp_path) == ["7", "9", "12", "120"]
    assert job_ids(tmp_path / "nowhere") == []


def test_what_squeue_answers(fake: Path, monkeypatch: pytest.MonkeyPatch):
    (fake / "queue").write_text("1|PENDING|Resources | more\n2|RUNNING|None\n3|COMPLETING|None\n\nnoise\n")
    assert ask_queue(["1", "2", "3"]) == {"1": Queued("PENDING", "Resources | more"), "2": Queued("RUNNING", "None")}
    assert (fake / "looked").read_text() == "--jobs=1,2,3\n"
    assert ask_queue([]) == {}
    (fake / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n")
    assert ask_queue(["1"]) == {}
    (fake / "squeue").write_text("#!/bin/sh\necho squeue: error: no controller >&2\nexit 1\n")
    assert ask_queue(["1"]) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_queue(["1"]) is None


def test_a_record_names_what_was_submitted(fake: Path, prepared: Prepared):
    recipe = Path(os.fsdecode(b"\xff.yaml"))  # a name that is no UTF-8
    recipe.write_bytes(prepared.recipe.read_bytes())
    job = make_job(str(recipe), [], Path("a"), 1)
    submit(job, False, World())
    assert b"set -- '\xff.yaml' --run-dir a\n" in next(job.jobs_dir.glob("*.sbatch")).read_bytes()
    (record,) = job.jobs_dir.glob("submit-*.json")
    script, log = record.with_suffix(".sbatch"), job.jobs_dir / "4711.log"
    assert json.loads(record.read_text()) == {"job_id": "4711", "script": str(script), "log": str(log)}
