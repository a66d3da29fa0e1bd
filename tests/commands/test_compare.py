"""``hvdtrain compare``: what is compared, what comes of it, what is refused before anything runs."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from command import until
from launch import HVDTRAIN, Prepared, environment, launch_rows, succeed, summary
from not_here import require_hosts

from hvdtrain.commands import ranks_here as running
from hvdtrain.commands.compare.modes import MODES, parse_modes
from hvdtrain.commands.compare.plot import draw
from hvdtrain.commands.compare.results import Result, as_tree, digest_notes, from_tree, read_result, table
from hvdtrain.commands.compare.scaled import Large, scaled_bandwidth
from hvdtrain.commands.ranks_here import Place, possible
from hvdtrain.config import load_config
from hvdtrain.data.corpora import open_corpora
from hvdtrain.errors import ConfigError
from hvdtrain.machine.link import Link, parse_bandwidth, parse_latency, show_bandwidth
from hvdtrain.sync import SYNCS

# --- names -------------------------------------------------------------------------------------------------------


def test_a_name_may_have_settings():
    modes = parse_modes(["diloco:every=32,local_sgd:every=4,optimizer=kept,seed.x=1", "gossip:lr_times=0.5,average"])
    assert [mode.name for mode in modes] == [
        "diloco:every=32",
        "local_sgd:every=4,optimizer=kept,seed.x=1",
        "gossip:lr_times=0.5",
        "average",
    ]
    of_diloco = tuple(f"sync.local_sgd.{word}" for word in ("every=16", "outer=nesterov", "optimizer=kept", "every=32"))
    assert modes[0].settings == ("sync.name=local_sgd", *of_diloco)  # the last one counts
    assert modes[1].settings == (
        "sync.name=local_sgd",
        "sync.local_sgd.every=4",
        "sync.local_sgd.optimizer=kept",
        "seed.x=1",
    )
    assert (modes[2].settings, modes[2].lr_times) == (("sync.name=gossip",), 0.5)
    assert modes[2].said == ("sync.name=gossip", "lr_times=0.5")
    assert modes[0].folder == "diloco_every=32"


def test_there_are_ten_by_default_and_a_name_for_every_sync_but_zero():
    modes = parse_modes(list(MODES))
    assert len(modes) >= 10
    assert {mode.settings[0].partition("=")[2] for mode in modes} == set(SYNCS) - {"zero"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gosip", "nobody agrees by 'gosip'; there are: allreduce, bf16, powersgd"),
        ("every=4", "a setting before any name"),
        ("local_sgd:every", "expected KEY=VALUE"),
        ("sign:lr_times=0", "expected a number above 0"),
        ("average,average", "average is given twice"),
        ("", "nobody agrees by ''"),
    ],
)
def test_names_that_nobody_has(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_modes([text])


# --- links -------------------------------------------------------------------------------------------------------


def test_rates_and_times_as_they_are_written():
    assert [parse_bandwidth(text, "") for text in ("1gbit", "100Mbit", "2.5gbit/s")] == [1e9, 1e8, 2.5e9]
    assert [parse_latency(text, "") for text in ("1ms", "50us", "0")] == pytest.approx([1e-3, 5e-5, 0.0])
    assert [show_bandwidth(rate) for rate in (1e9, 6.18e7, 64e3)] == ["1 Gbit/s", "61.8 Mbit/s", "64 kbit/s"]
    for text in ("fast", "1gb", "-1gbit", "0mbit", "1bit", "gbit"):
        with pytest.raises(ConfigError, match=f"--bandwidth {text}: expected a bandwidth"):
            parse_bandwidth(text, "--bandwidth")
    for text in ("1", "-1ms", "11s", "soon"):
        with pytest.raises(ConfigError, match="expected a time"):
            parse_latency(text, "--latency")


def test_what_this_machine_cannot_make_is_said(monkeypatch: pytest.MonkeyPatch):
    link = Link(1e9, 1e-3)
    monkeypatch.setattr(running, "why_no_hosts", lambda: "no tc on this machine")
    assert possible(link, 4) == (None, ["no links of 1 Gbit/s: no tc on this machine; in memory instead"])
    monkeypatch.setattr(running, "why_no_hosts", lambda: "")
    monkeypatch.setattr(running, "why_no_latency", lambda: "this kernel has no netem")
    limited, (note,) = possible(link, 4)
    assert limited == Link(1e9)
    assert note == "no latency of 1 ms: this kernel has no netem; went on without"
    monkeypatch.setattr(running, "why_no_latency", lambda: "")
    assert possible(link, 4) == (link, [])
    with pytest.raises(ConfigError, match="--ranks 300: at most 253"):
        possible(link, 300)


def test_a_small_model_on_a_scaled_link(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its gradients take the share of a step that the large one's take."""
    config = load_config(str(prepared.recipe))
    corpora, place = open_corpora(config.data), Place(2, None, 1, tmp_path)
    parameters = 2 * (4 * 32 * 32 + 8 * 32 * 32) + (300 + 16) * 32  # of matrices; norms and biases come on top
    bits_per_s, how = scaled_bandwidth(Large(1e9, "100gbit"), config, corpora, place, [], tmp_path)
    assert bits_per_s == pytest.approx(100e9 * parameters / 1e9, rel=0.1)
    assert how.startswith("scaled: 100gbit x ")
    monkeypatch.setattr("hvdtrain.commands.compare.scaled._compute_s", lambda *_: 0.01)
    slower, how = scaled_bandwidth(Large(1e9, "100gbit", 0.3), config, corpora, place, [], tmp_path)
    assert slower == pytest.approx(30 * bits_per_s)
    assert "x 0.3 / 0.01 s that a step computes" in how
    with pytest.raises(ConfigError, match="which comes to"):
        scaled_bandwidth(Large(1e15, "1gbit"), config, corpora, place, [], tmp_path)


# --- what came of it ---------------------------------------------------------------------------------------------


def write_run(folder: Path) -> Path:
    """Six steps of 10 tokens; the first takes 2 s, the others 1 s."""
    folder.mkdir()
    parts = {f"time_{part}_s": 0.1 for part in ("data", "compute", "other")}
    lines: list[dict[str, object]] = []
    for step in (1, 3, 6):
        seconds = {"time_sync_s": 1.5 if step == 1 else 0.5, "time_optimizer_s": 0.2}
        more = {"consensus_distance": step / 2, "sent_mib": 4.0}
        lines.append({"kind": "train", "step": step, "tokens": 10 * step, **parts, **seconds, **more})
        if step > 1:
            lines.append({"kind": "eval", "step": step - step // 6, "val_loss": 6.0 - step / 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"sent_mib": 3.0, "sample_digest": "ab"}))
    return folder


def test_a_run_is_read(tmp_path: Path):
    result = read_result("x", ("sync.name=x",), write_run(tmp_path / "x"), 0, sent_bytes=12 << 20)
    assert result.steps == 6
    assert result.tokens == [30, 50]
    assert result.seconds == pytest.approx([4, 6])  # 2 + 2 x 1; then two of the three steps to the next line
    assert result.losses == [5.0, 4.0]
    assert result.train_s == pytest.approx(7)
    assert (result.step_s, result.of_step["sync"]) == pytest.approx((1.0, 0.5))  # without the first step
    assert (result.sent_mib, result.wire_mib) == (3.0, 2.0)
    assert (result.apart, result.apart_values) == ("consensus distance", [0.5, 1.5, 3.0])
    assert from_tree(json.loads(json.dumps(as_tree(result)))) == result


def test_time_to_a_loss_is_between_two_evaluations(tmp_path: Path):
    result = read_result("x", (), write_run(tmp_path / "x"), 0)
    assert [result.seconds_to(loss) for loss in (5.0, 4.5, 3.9)] == [pytest.approx(4), pytest.approx(5), None]


def test_a_run_that_wrote_nothing_has_failed(tmp_path: Path):
    result = read_result("x", (), tmp_path / "none", 70)
    assert (result.status, result.loss, result.steps) == ("failed (70)", None, 0)
    assert "failed (70)" in table([result], "t", [], [])


def test_the_table_is_against_the_first(tmp_path: Path):
    base = read_result("allreduce", ("sync.name=allreduce",), write_run(tmp_path / "x"), 0)
    half = [seconds / 2 for seconds in base.seconds]
    fast = replace(base, name="fast", train_s=base.train_s / 2, seconds=half, losses=[4.4, 4.2])
    rows = [line.split(" | ") for line in table([base, fast], "t", ["f"], ["n"]).splitlines() if "4." in line]
    assert rows[1][:5] == ["| fast", "4.2000", "+5.0%", "1", "0.50"]
    assert rows[1][5] == "-"
    assert rows[0][5] == "0.86"
    assert "Note: n" in table([base, fast], "t", ["f"], ["n"])


def test_other_rows_are_said(tmp_path: Path):
    base = read_result("a", (), write_run(tmp_path / "x"), 0)
    assert digest_notes([base, base]) == ["all have read the same rows in the same order (sample digest ab)"]
    assert (
        "NOT read the same rows: sample digests a ab, b cd"
        in digest_notes([base, replace(base, name="b", sample_digest="cd")])[0]
    )


def many(count: int) -> list[Result]:
    """As a comparison at 100 Mbit/s gives them."""
    found = []
    for number, name in enumerate(list(MODES)[:count]):
        losses = [4.2 * 0.75**k + 1.9 + 0.02 * number for k in range(10)]
        step_s = 0.05 + 0.5 / (1 + number)
        seconds = [200 * step_s * (k + 1) for k in range(10)]
        parts = {"data": 0.0, "compute": 0.04, "sync": step_s - 0.05, "optimizer": 0.01, "other": 0.0}
        apart = ("consensus distance", [2.0, 0.3 * number]) if name.startswith(("local", "gossip")) else ("", [])
        if name == "server":
            apart = ("staleness", [2.0, 3.0])
        tokens = [153600.0 * (k + 1) for k in range(10)]
        sizes = 4.8 / (1 + 3 * number), 5.0 / (1 + 3 * number)
        ends = tokens[-1:] * len(apart[1])
        found.append(
            Result(name, (f"sync.name={name}",), "finished", 2000, tokens, seconds, losses, seconds[-1], parts, *sizes,
                   *apart, ends, "ab")
        )  # fmt: skip
    return found


def test_a_picture_of_fourteen(tmp_path: Path):
    draw(many(len(MODES)), "shakespeare-char: 4 ranks, links of 100 Mbit/s", tmp_path / "all.png")
    nothing = replace(many(1)[0], sent_mib=0.0, wire_mib=None)
    draw([*many(6), nothing], "one sends nothing", tmp_path / "nothing.png")
    draw([replace(many(1)[0], losses=[], tokens=[], seconds=[]), *many(2)], "two", tmp_path / "two.png")
    assert all((tmp_path / name).stat().st_size > 30_000 for name in ("all.png", "two.png"))


# --- the command -------------------------------------------------------------------------------------------------


def results_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "comparison.json").read_text())["results"]


def test_a_comparison_that_is_stopped_goes_on(prepared: Prepared, tmp_path: Path):
    """Two ranks in memory. Ctrl-C in the second run: the first is kept, the second is begun anew."""
    out = tmp_path / "out"
    words = [str(prepared.recipe), "--ranks", "2", "--bandwidth", "memory", "--out", str(out)]
    words += ["--syncs", "gossip:topology=ring", "train.steps=150", "eval.every=50", "metrics.every=20"]
    with open(tmp_path / "log", "wb") as log:
        first = subprocess.Popen([*HVDTRAIN, "compare", *words], env=environment(), stdout=log, stderr=log)
    try:
        log_of_second = out / "runs" / "gossip_topology=ring" / "metrics.jsonl"
        until(lambda: log_of_second.exists() and log_of_second.stat().st_size > 0, "the second run trains", 120)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 75, (tmp_path / "log").read_text()
    finally:
        first.kill()
    assert list(results_of(out)) == ["allreduce"]
    saved = (out / "runs" / "allreduce" / "summary.json").stat().st_mtime_ns
    done = succeed("compare", *words)
    assert "1 of 2: allreduce is there" in done.text
    assert (out / "runs" / "allreduce" / "summary.json").stat().st_mtime_ns == saved
    base, gossip = results_of(out).values()
    assert (base["status"], gossip["status"], base["steps"], gossip["steps"]) == ("finished", "finished", 150, 150)
    assert base["sample_digest"] == gossip["sample_digest"] == summary(out / "runs" / "allreduce")["sample_digest"]
    assert len(base["losses"]) == 3
    assert gossip["apart"] == "consensus distance"
    assert base["sent_mib"] > 0 and base["wire_mib"] is None
    text = (out / "compare.md").read_text()
    assert "| gossip:topology=ring | " in text and "same rows in the same order" in text
    assert text.strip() in done.text
    assert (out / "compare.png").stat().st_size > 30_000


def test_on_links(prepared: Prepared, tmp_path: Path):
    """Each rank on its own host; what the cards sent is a little above what the sync counts."""
    require_hosts()
    out = tmp_path / "out"
    words = ("--ranks", 2, "--bandwidth", "50mbit", "--out", out, "--syncs", "allreduce", "train.steps=40")
    done = succeed("compare", prepared.recipe, *words)
    (base,) = results_of(out).values()
    assert base["status"] == "finished"
    assert base["sent_mib"] < base["wire_mib"] < 4 * base["sent_mib"] + 0.5
    assert base["of_step"]["sync"] > base["sent_mib"] * 8.4 / 50 / 2  # MiB at 50 Mbit/s; a burst is for nothing
    assert "network namespaces of one machine, 1 thread each; links of 50 Mbit/s each way" in done.text


def test_refused_before_it_begins(prepared: Prepared, tmp_path: Path):
    out, other, before = tmp_path / "out", tmp_path / "other", tmp_path / "before"
    for folder in (other, before):
        folder.mkdir()
    (other / "notes.txt").touch()
    (before / "comparison.json").write_text(json.dumps({"identity": {"ranks": 3, "seed": 3}, "results": {}}))
    rows = {
        ("--syncs", "gosip"): "nobody agrees by 'gosip'; there are: allreduce",
        ("--syncs", "gossip:topology=torus"): "gossip:topology=torus: sync.gossip.topology=torus does not fit 2",
        ("--syncs", "diloco"): "sync.local_sgd.every=16 is longer than the run, 12 steps",
        ("--syncs", "gossip:topologie=ring"): "gossip:topologie=ring: ",
        ("--syncs", "average:train.steps=6"): "average:train.steps=6 would have train.steps=6, allreduce has 12",
        ("--bandwidth", "quick"): "--bandwidth quick: expected a bandwidth",
        ("--bandwidth", "scaled"): "--bandwidth scaled and --as-large-as PARAMETERS go together",
        ("--large-step", 1): "--large-link and --large-step go with --bandwidth scaled",
        ("--latency", "late"): "--latency late: expected a time",
        ("--ranks", 1): "--ranks 1: there is nobody to agree with",
        ("--ranks", 5): "5",
        ("--out", other): "holds something else (notes.txt)",
        ("--out", before): f"--out {before} is of another comparison: ",
        ("--out", before, "seed=3"): "ranks 3 there and 2 here",
        ("optim.rate=1",): "unknown key 'optim.rate'",
    }
    words = ("compare", prepared.recipe, "--ranks", 2, "--bandwidth", "memory", "--out", out)
    for (row, message), done in zip(rows.items(), launch_rows([(*words, *row) for row in rows]), strict=True):
        assert done.exit_code == 2, (row, done)
        assert message in done.messages[-1], row
    assert not out.exists()
