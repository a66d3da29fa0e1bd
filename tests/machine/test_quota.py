"""Limits of control groups, on machines made of files and on this one."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from launch import HVDTRAIN, Prepared, succeed, summary

from hvdtrain.machine.quota import Limit, Quota, quota_of_rank, read_limits

V1 = "35 30 0:32 {root} {mount} rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"
CPUSET = "36 30 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
ROOT = "1 0 8:1 / / rw - ext4 /dev/root rw"


def make_machine(folder: Path, group: str, mount: str, limits: dict[str, str], mount_point: str) -> Path:
    """``limits``: file below the mount point -> what it says."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(f"12:cpuset:/elsewhere\n{group}\n")
    (folder / "proc/self/mountinfo").write_text(f"{ROOT}\n{CPUSET}\n{mount}\n")
    for name, text in limits.items():
        path = folder / mount_point.lstrip("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def cpus(limits: tuple[Limit, ...]) -> list[float]:
    return [limit.cpus for limit in limits]


def v1(quota: str, period: str = "100000", group: str = ".") -> dict[str, str]:
    return {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("group", "root", "limits", "expected"),
    [
        ("0::/pod/box", "/", {"pod/box/cpu.max": "150000 100000"}, [1.5]),
        ("0::/pod/box", "/", {"pod/box/cpu.max": "200000 100000", "pod/cpu.max": "50000 100000"}, [2.0, 0.5]),
        ("0::/pod/box", "/", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 200000"}, [1.5]),
        ("0::/pod/box", "/pod/box", {"cpu.max": "300000 100000"}, [3.0]),  # a container that sees its own group alone
        ("0::/", "/", {"cpu.max": "300000 100000"}, [3.0]),  # one with a name space of its own
        ("0::/../../other", "/", {"cpu.max": "300000 100000"}, [3.0]),  # in a group outside it
        ("0::/pod/box", "/", {"pod/box/cpu.max": "max 100000"}, []),
        ("0::/pod/box", "/", {"other/cpu.max": "1000 100000"}, []),
        ("0::/pod/box", "/", {"pod/box/cpu.max": "many"}, []),
        ("0::/pod/box", "/", {}, []),
    ],
)
def test_version_2(tmp_path: Path, group: str, root: str, limits: dict[str, str], expected: list[float]):
    """From the process's own group to the top: the first is the innermost."""
    mount = V2.format(root=root, mount="/sys/fs/cgroup")
    assert cpus(read_limits(make_machine(tmp_path, group, mount, limits, "/sys/fs/cgroup"))) == expected


@pytest.mark.parametrize(
    ("group", "root", "limits", "expected"),
    [
        ("4:cpu,cpuacct:/docker/a1", "/docker/a1", v1("250000"), [2.5]),
        (
            "4:cpu,cpuacct:/a/b",
            "/",
            {**v1("100000", "50000", "a/b"), **v1("100000", group="a"), **v1("-1")},
            [2.0, 1.0],
        ),
        ("4:cpu,cpuacct:/a", "/", v1("-1", group="a"), []),
        ("4:cpuacct:/a", "/", v1("100000", group="a"), []),
    ],
)
def test_version_1(tmp_path: Path, group: str, root: str, limits: dict[str, str], expected: list[float]):
    mount = V1.format(root=root, mount=r"/sys/fs/cgroup/cpu\040time")
    machine = make_machine(tmp_path, group, mount, limits, "/sys/fs/cgroup/cpu time")
    assert cpus(read_limits(machine)) == expected


def test_a_machine_that_says_nothing(tmp_path: Path):
    assert read_limits(tmp_path) == ()


def test_groups_are_told_apart_though_all_are_called_the_same(tmp_path: Path):
    """Two containers of a node, in each of which the group is /."""
    made = {"cpu.max": "200000 100000"}
    one, other = (
        read_limits(make_machine(tmp_path / name, "0::/", V2.format(root="/", mount="/cg"), made, "/cg"))
        for name in "ab"
    )
    assert cpus(one) == cpus(other) == [2.0]
    assert one != other
    assert quota_of_rank(one, [one, other]) == Quota(2.0, 1)
    assert quota_of_rank(one, [one, one, other]) == Quota(2.0, 2)


def test_the_limit_that_leaves_a_rank_the_least_counts():
    pod, mine, other = Limit((2, 1), 3.0), Limit((2, 2), 2.0), Limit((2, 3), 4.0)
    assert quota_of_rank([mine, pod], [[mine, pod], [other, pod]]) == Quota(3.0, 2)
    assert quota_of_rank([mine, pod], [[mine, pod]]) == Quota(2.0, 1)
    assert quota_of_rank([], [[]]) is None
    assert [str(quota) for quota in (Quota(1.5, 1), Quota(3.0, 2))] == [
        "a CPU quota of 1.5",
        "a CPU quota of 3 for 2 ranks",
    ]


@pytest.fixture
def one_cpu() -> Iterator[tuple[str, ...]]:
    """Words before a program: it will be in a group of this machine that sets no limit, inside one of one CPU."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        top, file, text = Path("/sys/fs/cgroup"), "cpu.max", "100000 100000"
    else:
        top, file, text = Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", "100000"
    group = top / f"hvdtrain-test-{os.getpid()}"
    with ExitStack() as after:
        try:
            for folder in (group, group / "inner"):
                folder.mkdir()
                after.callback(folder.rmdir)
            (group / file).write_text(text)
        except OSError as error:
            pytest.skip(f"no control group with a quota can be made here: {error}")
        yield "sh", "-c", f'echo $$ >{group}/inner/cgroup.procs && exec "$@"', "sh"


def test_one_process_under_a_quota(one_cpu: tuple[str, ...]):
    """Of two cores and more, which it may all use."""
    code = "from hvdtrain.comm.ranks import OneRank; from hvdtrain.machine.cores import take_cores; "
    code += "print(take_cores(OneRank()).note)"
    done = succeed(program=(*one_cpu, sys.executable, "-c", code))
    assert done.stdout.startswith("1 thread a rank" + " by a CPU quota of 1" * (len(os.sched_getaffinity(0)) > 1))


def test_a_run_under_a_quota(prepared: Prepared, tmp_path: Path, one_cpu: tuple[str, ...]):
    """The ranks share it, and the first line of the run says so."""
    words = ("train", prepared.recipe, "train.steps=2", "--run-dir", tmp_path / "run")
    done = succeed(*words, program=(*one_cpu, *HVDTRAIN), how="mpirun", ranks=2)
    assert "1 thread a rank by a CPU quota of 1 for 2 ranks, on any of cores" in done.stdout.splitlines()[0]
    assert summary(tmp_path / "run")["threads_per_rank"] == 1
