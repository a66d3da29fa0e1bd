"""Three processes and two: who gets which files."""

from types import SimpleNamespace

import pytest
from spread import ByFile
from xdist.remote import Producer
from xdist.scheduler import loadscope

TESTS = [f"tests/slurm/test_{name}.py::test_{n}" for name in "ab" for n in range(3)]
TESTS += [f"tests/test_{name}.py::test_{n}" for name in "cdefgh" for n in range(3)]


class Node:
    """A process that does what it is given when ``work`` says so; ``files``: the letters of what it has done."""

    def __init__(self, name: str):
        self.gateway = SimpleNamespace(id=name)
        self.left: list[int] = []
        self.files: list[str] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.left += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def work(self, scheduler: ByFile) -> None:
        if self.left:
            index = self.left.pop(0)
            self.files += TESTS[index].partition("test_")[2][0]
            scheduler.mark_test_complete(self, index)


@pytest.mark.parametrize("expected", [["abg", "ceh", "df"], ["abeg", "cdfh"], ["abcdefgh"]], ids=["3", "2", "1"])
def test_files_are_whole_and_slurms_go_to_one_process(monkeypatch: pytest.MonkeyPatch, expected: list[str]):
    count = len(expected)
    monkeypatch.setattr(loadscope, "parse_tx_spec_config", lambda config: ["popen"] * count)
    config = SimpleNamespace(option=SimpleNamespace(loadscopereorder=True))
    scheduler, nodes = ByFile(config, Producer("", enabled=False)), [Node(f"gw{n}") for n in range(count)]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, TESTS)
    scheduler.schedule()
    while any(node.left for node in nodes):
        for node in nodes:
            node.work(scheduler)
    assert ["".join(dict.fromkeys(node.files)) for node in nodes] == expected
    assert sum(len(node.files) for node in nodes) == len(TESTS)
    assert scheduler.tests_finished and all(node.shutting_down for node in nodes)
