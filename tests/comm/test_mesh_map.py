"""What the user is told of a mesh."""

import re
import socket

import torch
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.mesh import Mesh, MeshOptions, grid, make_mesh
from hvdtrain.comm.mesh_map import describe_mesh, draw

CPU = torch.device("cpu")


def described(hosts: list[str], **options: int) -> tuple[list[str], list[str]]:
    """What all ranks say alike, with the milliseconds left out; rank n believes to be on ``hosts[n]``."""

    def work(group: ThreadGroup) -> tuple[list[str], list[str]]:
        mesh = make_mesh(group, MeshOptions(**options))
        gather = group.all_gather_object
        mesh.world.all_gather_object = lambda value: gather((hosts[group.rank], *value[1:]))
        return describe_mesh(mesh, CPU)

    found = on_ranks(len(hosts), work)
    assert all(one == found[0] for one in found)
    shown, notes = ([re.sub(r"in [\d.e+]+ ms", "in X ms", line) for line in lines] for lines in found[0])
    return shown, notes


def test_the_drawing_of_the_docs():
    shown, notes = described(["n1"] * 4 + ["n2"] * 4, tensor=2, pipeline=2)
    assert shown == [
        "mesh: 2 replicas x 2 stages x 2 parts; parts over threads (64 KB summed in X ms), stages over threads",
        "  replica 0  stage 0  n1: 0-1",
        "             stage 1  n1: 2-3",
        "  replica 1  stage 0  n2: 4-5",
        "             stage 1  n2: 6-7",
    ]
    assert notes == []


def test_parts_on_several_nodes_are_warned_of():
    shown, notes = described(["n1", "n1", "n2", "n2"], tensor=4)
    assert shown == [
        "mesh: 1 replica x 1 stage x 4 parts; parts over threads (64 KB summed in X ms)",
        "  replica 0  stage 0  n1: 0-1, n2: 2-3",
    ]
    assert notes == [
        "parts of a layer are on several nodes (n1: 0-1, n2: 2-3), and meet dozens of times a pass "
        "(64 KB summed in X ms): mesh.tensor of at most 2 can stay within a node",
    ]


def test_stages_on_several_nodes_are_as_it_should_be():
    shown, notes = described(["n1", "n1", "n2", "n2"], tensor=2, pipeline=2)
    assert shown[1:] == ["  replica 0  stage 0  n1: 0-1", "             stage 1  n2: 2-3"]
    assert notes == []


def test_many_ranks_are_told_in_few_lines():
    lines = draw(grid(512, stages=4, parts=8), [f"n{rank // 8}" for rank in range(512)])
    assert lines[:2] == ["  replica 0   stage 0  n0: 0-7", "              stage 1  n1: 8-15"]
    assert (len(lines), lines[-1]) == (8, "  ... and 57 lines more, to rank 511")


def test_whole_replicas_have_no_map():
    assert on_ranks(2, lambda group: describe_mesh(make_mesh(group, MeshOptions()), CPU)) == [([], []), ([], [])]


def test_a_slower_way_is_a_note():
    def work(group: ThreadGroup) -> tuple[list[str], list[str]]:
        mesh: Mesh = make_mesh(group, MeshOptions(pipeline=2))
        mesh.pipe.note = "ranks share a GPU"
        return describe_mesh(mesh, CPU)

    host = socket.gethostname()
    shown, notes = on_ranks(2, work)[0]
    assert shown[1:] == [f"  replica 0  stage 0  {host}: 0", f"             stage 1  {host}: 1"]
    assert notes == ["stages over threads: ranks share a GPU"]
