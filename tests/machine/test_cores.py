"""Which cores a rank takes, on machines made of files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from threads import Scripted

from hvdtrain.machine import cores
from hvdtrain.machine.cores import (
    LIBRARY_THREADS,
    Topology,
    place,
    read_topology,
    set_library_threads,
    show,
    take_cores,
    threads_of_rank,
)
from hvdtrain.machine.quota import Limit


def make_system(folder: Path, nodes: Mapping[int, str], siblings: Mapping[int, str]) -> Path:
    """Linux's /sys/devices/system of a machine, with the files beside them that are no CPUs or nodes."""
    for cpu, text in siblings.items():
        (folder / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (folder / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(f"{text}\n")
    for node, text in nodes.items():
        (folder / f"node/node{node}").mkdir(parents=True)
        (folder / f"node/node{node}/cpulist").write_text(f"{text}\n")
    (folder / "cpu/cpufreq").mkdir(parents=True, exist_ok=True)
    (folder / "cpu/online").write_text("0-15")
    (folder / "node").mkdir(exist_ok=True)
    (folder / "node/online").write_text("0-1")
    return folder


@pytest.fixture
def two_nodes(tmp_path: Path) -> Topology:
    """The picture in cores.py: two nodes of four cores of two hardware threads, n and n + 8."""
    siblings = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    return read_topology(make_system(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, siblings))


def neighbours(core: int) -> set[int]:
    return {core, core + 8}


ALL = set(range(16))


def test_hardware_threads_share_a_core(two_nodes: Topology):
    assert two_nodes.cores(ALL) == {core: neighbours(core) for core in range(8)}
    assert two_nodes.cores({3, 11, 12}) == {3: {3, 11}, 4: {12}}
    assert [two_nodes.node(cpu) for cpu in (0, 3, 4, 11, 12)] == [0, 0, 1, 0, 1]


def test_siblings_side_by_side(tmp_path: Path):
    """As virtual machines number them: 0 and 1 are one core."""
    topology = read_topology(make_system(tmp_path, {0: "0-3"}, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}))
    assert topology.cores({0, 1, 2, 3}) == {0: {0, 1}, 2: {2, 3}}


@pytest.mark.parametrize("text", ["", "?", "0-"])
def test_a_machine_that_says_nothing_or_nonsense(tmp_path: Path, text: str):
    assert read_topology(tmp_path / "missing") == Topology()
    topology = read_topology(make_system(tmp_path, {0: text}, {0: text, 1: text}))
    assert topology.cores({0, 1}) == {0: {0}, 1: {1}} or text == "0-"
    assert topology.node(1) == 0


def test_this_machine_has_a_topology():
    cpus = os.sched_getaffinity(0)
    assert set().union(*read_topology().cores(cpus).values()) == cpus


@pytest.mark.parametrize(
    ("local_size", "own"),
    [
        (2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (4, [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (8, [{core} for core in range(8)]),
        (1, [None]),  # nobody to keep apart
        (3, [None] * 3),
        (6, [None] * 6),  # three ranks on four cores
        (16, [None] * 16),  # more ranks than cores
    ],
)
def test_ranks_are_laid_on_nodes_in_turn(two_nodes: Topology, local_size: int, own: list[set[int] | None]):
    """Both hardware threads of each core."""
    expected = [None if share is None else set().union(*map(neighbours, share)) for share in own]
    assert [place(ALL, rank, local_size, two_nodes) for rank in range(local_size)] == expected


def test_fewer_ranks_than_nodes_take_whole_ones():
    four = Topology(node_of={cpu: cpu // 2 for cpu in range(8)})
    assert [place(set(range(8)), rank, 2, four) for rank in range(2)] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert place(set(range(8)), 0, 3, four) is None


def test_a_job_that_has_only_some_cores(two_nodes: Topology):
    """Slurm gave the job two cores of each node; then three and one: no even division."""
    assert place({0, 1, 8, 9, 6, 7}, 1, 2, two_nodes) == {6, 7}
    assert place({0, 1, 2, 6}, 1, 2, two_nodes) is None


def test_one_node_is_left_to_the_scheduler():
    assert place(set(range(16)), 0, 4, Topology()) is None


def node(everyone: list[tuple[str, Any]], rank: int = 0, limits: Any = ()) -> Scripted:
    """Rank ``rank`` of those that gathered (host, cores). ``limits``: of each, on its processor time."""
    limits = limits or [()] * len(everyone)
    told = [(host, tuple(cpus), limit) for (host, cpus), limit in zip(everyone, limits, strict=True)]
    return Scripted(rank, len(everyone), lambda value: told)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Where this process would have been put; it believes to be on all 16 hardware threads of ``here``."""
    for name in ("OMP_NUM_THREADS", "HVDTRAIN_BIND", *cores.PLACED_BY_USER):
        monkeypatch.delenv(name, raising=False)
    places: list[set[int]] = []
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr(cores, "read_limits", tuple)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(ALL))
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cpus: places.append(set(cpus)))
    return places


def test_a_rank_moves_to_its_cores(moved: list[set[int]], two_nodes: Topology):
    """Ranks of other nodes of the cluster do not count."""
    group = node([("there", ALL), ("here", ALL), ("there", ALL), ("here", ALL)], rank=3)
    found = take_cores(group, topology=two_nodes)
    own = {4, 5, 6, 7, 12, 13, 14, 15}
    assert moved == [own]
    assert (found.threads, found.bound_to) == (4, own)
    assert found.note == "4 threads a rank, bound on cores 4-7,12-15 of NUMA node 1"


def test_threads_are_physical_cores_also_where_nobody_is_bound(moved: list[set[int]], two_nodes: Topology):
    found = take_cores(node([("here", ALL)]), topology=two_nodes)
    assert (found.threads, found.bound_to, found.note) == (8, None, "8 threads a rank, on any of cores 0-15")
    assert take_cores(node([("here", ALL)] * 3), topology=two_nodes).threads == 2
    assert moved == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("HVDTRAIN_BIND", "none"), ("OMP_PROC_BIND", "true"), ("OMP_PLACES", "cores"), ("GOMP_CPU_AFFINITY", "0-3")],
)
def test_who_has_a_plan_is_left_alone(moved, two_nodes: Topology, monkeypatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    found = take_cores(node([("here", ALL)] * 2), topology=two_nodes)
    assert (found.threads, found.bound_to, moved) == (4, None, [])


def test_it_can_be_asked_without_moving(moved: list[set[int]], two_nodes: Topology):
    assert take_cores(node([("here", ALL)] * 2), bind=False, topology=two_nodes).threads == 4
    assert moved == []


def test_a_launchers_binding_is_respected(moved: list[set[int]], two_nodes: Topology, monkeypatch):
    mine = {0, 1, 8, 9}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: mine)
    found = take_cores(node([("here", mine), ("here", {2, 3, 10, 11})]), topology=two_nodes)
    assert (found.threads, found.bound_to, moved) == (2, None, [])


def test_ranks_on_the_two_threads_of_one_core(moved: list[set[int]], two_nodes: Topology, monkeypatch):
    """As Slurm binds by hardware threads: never none, never more than there are."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert take_cores(node([("here", {0, 1}), ("here", {8, 9})]), topology=two_nodes).threads == 1


@pytest.mark.parametrize(("text", "threads", "is_bound"), [("2", 2, True), ("4", 4, True), ("5", 5, False)])
def test_omp_num_threads(moved, two_nodes: Topology, monkeypatch, text: str, threads: int, is_bound: bool):
    """Obeyed; but more threads than the rank's cores are not squeezed into them."""
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    found = take_cores(node([("here", ALL)] * 2), topology=two_nodes)
    assert (found.threads, found.bound_to is not None, len(moved)) == (threads, is_bound, int(is_bound))


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("3,2", 3), ("0", 1), ("many", 8), ("", 8)])
def test_forms_of_omp_num_threads(moved, two_nodes: Topology, monkeypatch, text: str, threads: int):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert take_cores(node([("here", ALL)]), topology=two_nodes).threads == threads


@pytest.mark.parametrize(
    ("everyone", "threads"),
    [
        ([("here", range(8))], 8),
        ([("here", range(8))] * 4, 2),
        ([("here", range(8))] * 3, 2),
        ([("here", range(8))] * 16, 1),
        ([("here", range(8)), ("there", range(8))], 8),
        ([("here", range(8)), ("here", range(8, 16))], 8),  # bound to cores of their own
    ],
)
def test_cores_are_shared_by_neighbours(monkeypatch: pytest.MonkeyPatch, everyone: list, threads: int):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(everyone[0][1]))
    monkeypatch.setattr(cores, "read_topology", Topology)  # each hardware thread a core
    monkeypatch.setattr(cores, "read_limits", tuple)
    assert threads_of_rank(node(everyone)) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_rank(node(everyone)) == 3


POD, BOX, OTHER = Limit((2, 1), 6.0), Limit((2, 2), 2.5), Limit((2, 3), 2.5)


@pytest.mark.parametrize(
    ("limits", "note"),
    [
        ([[BOX], [OTHER]], "2 threads a rank by a CPU quota of 2.5"),  # containers of their own
        ([[BOX], [BOX]], "1 thread a rank by a CPU quota of 2.5 for 2 ranks"),
        ([[POD], [POD]], "3 threads a rank by a CPU quota of 6 for 2 ranks"),
        ([[Limit((2, 2), 0.5)], []], "1 thread a rank by a CPU quota of 0.5"),  # never none
        ([[Limit((2, 2), 8.0)], []], "4 threads a rank"),  # the cores are fewer
        ([[], [BOX]], "4 threads a rank"),
    ],
)
def test_no_more_threads_than_the_quota(moved, two_nodes: Topology, monkeypatch, limits: list, note: str):
    monkeypatch.setattr(cores, "read_limits", lambda: tuple(limits[0]))
    group = node([("here", ALL)] * 2, limits=limits)
    found = take_cores(group, bind=False, topology=two_nodes)
    assert found.note == f"{note}, on any of cores 0-15"
    assert (found.threads, moved) == (int(note[0]), [])
    found = take_cores(group, topology=two_nodes)
    assert found.note == f"{note}, bound on cores 0-3,8-11 of NUMA node 0"
    assert found.threads == int(note[0])


def test_the_users_threads_above_the_quota_are_said(moved, two_nodes: Topology, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(cores, "read_limits", lambda: (BOX,))
    found = take_cores(node([("here", ALL)], limits=[[BOX]]), topology=two_nodes)
    assert (found.threads, found.note) == (4, "4 threads a rank above a CPU quota of 2.5, on any of cores 0-15")


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 8], "0-2,8"), ({5, 4, 9, 11, 10}, "4-5,9-11")]
)
def test_show(numbers, text: str):
    assert show(numbers) == text


def test_library_threads_are_defaults():
    environment: dict[str, str] = {}
    set_library_threads(environment)
    assert environment == LIBRARY_THREADS
    environment = {"GOMP_SPINCOUNT": "7", "OPENBLAS_NUM_THREADS": "2"}
    set_library_threads(environment)
    assert environment == {"GOMP_SPINCOUNT": "7", "OPENBLAS_NUM_THREADS": "2"}
    environment = {"OMP_WAIT_POLICY": "active"}
    set_library_threads(environment)
    assert "GOMP_SPINCOUNT" not in environment
