"""Files of clusters: those that come with the package, and what is said of a figure that cannot be."""

import copy
from pathlib import Path

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.planner.cluster import FIGURES, cluster_names, make_cluster, read_cluster

NEEDED = {
    "ranks_per_node": 4, "memory_gib": 40, "tflops": 140, "memory_gb_per_s": 1555, "inside_gb_per_s": 235,
    "inside_us": 3.4, "between_gb_per_s": 100, "between_us": 9.6, "save_gb_per_s": 20,
}  # fmt: skip
GOOD = {"name": "ours", "figures": {name: {"value": value, "source": "a test"} for name, value in NEEDED.items()}}


def changed(**values) -> dict:
    tree = copy.deepcopy(GOOD)
    for name, value in values.items():
        tree["figures"][name] = {"value": value, "source": "a test"}
    return tree


@pytest.mark.parametrize("name", cluster_names())
def test_a_cluster_that_comes_along(name: str):
    found = read_cluster(name)
    assert all(found.sources[figure] for figure in FIGURES)
    assert found.between.bytes_per_s < found["ranks_per_node"] * found.inside.bytes_per_s
    assert found.flops_per_s(1 << 20) <= found["tflops"] * 1e12


def test_there_are_some():
    assert {"juwels-booster", "jupiter", "llama3"} <= set(cluster_names())


def test_figures_in_units_of_seconds_and_bytes():
    found = make_cluster(changed(tokens_for_half=1000), "a test")
    assert (found.name, found["ranks_per_node"], found["operation_us"]) == ("ours", 4, 1000)
    assert found.inside.latency_s == pytest.approx(3.4e-6)
    assert found.between.bytes_per_s == pytest.approx(100e9)
    assert found.flops_per_s(1000) == pytest.approx(70e12)
    assert (found.sources["tflops"], found.sources["operation_us"]) == ("a test", "assumed")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"between_gb_per_s": -1}, "between_gb_per_s -1: expected 0.001 to 10,000 GB/s"),
        (
            {"between_us": 9.6e-6},
            r"between_us 9.6e-06: expected 0.2 to 100,000 microseconds \(it would be 9.6 if it is in s",
        ),
        ({"between_gb_per_s": 1e11}, r"between_gb_per_s 1e\+11: .* \(it would be 100 if it is in bytes/s\)"),
        ({"memory_gib": 40 * 2**30}, r"memory_gib .* \(it would be 40 if it is in bytes\)"),
        ({"ranks_per_node": 2.5}, "ranks_per_node 2.5: expected a whole number of ranks"),
        ({"tflops": "fast"}, "tflops: expected a number, 0.001 to 20,000 TFLOP/s, got 'fast'"),
        ({"jitter": True}, "jitter: expected a number"),
        ({"jitter": float("nan")}, "jitter nan: expected 0 to 1 of 1"),
        ({"latency_us": 3}, "unknown figure 'latency_us'"),
        ({"betwen_us": 3}, "unknown figure 'betwen_us'; did you mean between_us"),
    ],
)
def test_a_figure_that_cannot_be_is_named(values: dict, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        make_cluster(changed(**values), "cluster x")
    assert str(caught.value).startswith("cluster x: ")


def test_what_is_missing_is_named_all_at_once():
    tree = copy.deepcopy(GOOD)
    del tree["figures"]["tflops"], tree["figures"]["save_gb_per_s"]
    tree["figures"]["jitter"] = 0.1
    with pytest.raises(ConfigError) as caught:
        make_cluster(tree, "cluster x")
    for said in ("tflops is missing", "save_gb_per_s is missing", "jitter: expected {value: NUMBER, source: TEXT}"):
        assert said in str(caught.value)
    for tree in (None, [], {"figures": {}, "more": 1}, {"name": "x"}):
        with pytest.raises(ConfigError, match="cluster x: "):
            make_cluster(tree, "cluster x")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no cluster 'fugaku'; there are: .*juwels-booster.*or give a path"):
        read_cluster("fugaku")
    with pytest.raises(ConfigError, match=r"cannot read cluster file .*x.yaml: No such file"):
        read_cluster(str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_cluster(str(tmp_path / "x.yaml"))
