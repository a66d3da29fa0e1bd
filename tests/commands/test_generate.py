"""Texts answered by a run, and compared with references: line by line, on any number of ranks the same bytes.

How hypotheses are found is in tests/tasks/test_search.py; what the scores are in tests/tasks/test_text_scores.py.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from by_heart import CONTEXT, LINES, learn, on
from launch import launch

from hvdtrain.comm.world import World
from hvdtrain.commands.answering import shares, told
from hvdtrain.commands.evaluate import Files, TextOptions, evaluate, evaluate_files
from hvdtrain.commands.generate import Lines, generate, generate_file
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_USAGE, HvdtrainError
from hvdtrain.tasks.answers import Row
from hvdtrain.watch.log_file import read_log

GENERATE, EVALUATE = "hvdtrain.commands.generate", "hvdtrain.commands.evaluate"
GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scores = (
        "task.seq2seq.scores=bleu chrf rouge",
        "task.seq2seq.search.max_tokens=24",
        "task.seq2seq.label_smoothing=0",
    )
    return learn(
        tmp_path_factory.mktemp("pairs"), "pairs", *scores, "checkpoint.keep_best=true", "checkpoint.best=chrf"
    )


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(tmp_path_factory.mktemp("text"), "text", "train.steps=2", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(tmp_path_factory.mktemp("labels"), "labels")


def asked(folder: Path, *lines: str, name: str = "in.txt") -> Path:
    (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return folder / name


def answered(run: Path, lines: Lines, given: dict[str, Any] = GREEDY) -> list[str]:
    lines.output.unlink(missing_ok=True)
    generate_file(run, lines, given, World())
    text = lines.output.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


# --- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_line_for_each_line_on_any_ranks(translator: Path, tmp_path: Path, monkeypatch, capfd, ranks: int):
    lines = ["two", "", "cat!", "été", "  ", *["a dog", "cat!"] * 70, "two"]
    source = asked(tmp_path, *lines)
    alone = answered(translator, Lines(source, tmp_path / "one"))
    assert alone == [LINES.get(line, "") for line in lines]  # by heart, and every character as it was
    assert "144 lines answered in" in (told_alone := capfd.readouterr().err)
    assert told_alone.rstrip().endswith(f"{tmp_path / 'one'}; 2 empty lines")
    several = Lines(source, tmp_path / "several")
    on(monkeypatch, GENERATE, ranks, lambda world: generate_file(translator, several, GREEDY, world))
    assert (tmp_path / "several").read_bytes() == (tmp_path / "one").read_bytes()
    assert capfd.readouterr().err.count("144 lines answered in") == 1  # rank 0 alone speaks


def test_under_a_launcher(translator: Path, tmp_path: Path):
    source = asked(tmp_path, *LINES)
    done = launch("generate", translator, "--input", source, "--output", tmp_path / "out", how="mpirun", ranks=2)
    assert (done.exit_code, len(done.messages)) == (0, 1), done
    assert (tmp_path / "out").read_text(encoding="utf-8").splitlines() == list(LINES.values())


def test_an_output_that_is_there_is_refused_on_all_ranks(translator: Path, tmp_path: Path, monkeypatch):
    lines = Lines(asked(tmp_path, "two"), asked(tmp_path, "mine", name="out"))

    def refused(world: World) -> tuple[int, str]:
        with pytest.raises(HvdtrainError) as caught:
            generate_file(translator, lines, GREEDY, world)
        return caught.value.exit_code, str(caught.value)

    told = f"ConfigError: {lines.output} is there already; remove it, or give another --output FILE"
    assert on(monkeypatch, GENERATE, 2, refused) == [(EXIT_USAGE, told)] * 2
    assert lines.output.read_text() == "mine\n"


def test_json_lines_out_and_in(translator: Path, tmp_path: Path):
    source = asked(tmp_path, *(json.dumps({"source": text}) for text in ("two", "")), name="in.jsonl")
    first, second = answered(translator, Lines(source, tmp_path / "out", json=True))
    (answer,) = json.loads(first)["answers"]
    assert (answer["text"], json.loads(second)) == (LINES["two"], {"answers": []})
    assert -0.2 < answer["score"] < 0
    assert LINES["two"] in first  # readable, not \\u escapes


def test_compressed_input_and_windows_line_ends(translator: Path, tmp_path: Path):
    (tmp_path / "in.gz").write_bytes(gzip.compress("\ufefftwo\r\ncat!\r\nété".encode()))
    assert answered(translator, Lines(tmp_path / "in.gz", tmp_path / "out")) == [
        LINES[k] for k in ("two", "cat!", "été")
    ]


def test_an_empty_file_is_answered_by_one(translator: Path, tmp_path: Path):
    (tmp_path / "in").touch()
    generate_file(translator, Lines(tmp_path / "in", tmp_path / "out"), GREEDY, World())
    assert (tmp_path / "out").read_bytes() == b""


def test_texts_beyond_the_context(translator: Path, tmp_path: Path, capfd):
    source = asked(tmp_path, "two", "x" * CONTEXT, "été")  # and its end
    with pytest.raises(
        HvdtrainError, match=rf"in\.txt: line 2 has {CONTEXT + 1} tokens, and model\.context={CONTEXT}"
    ) as caught:
        answered(translator, Lines(source, tmp_path / "out"))
    assert caught.value.exit_code == EXIT_BAD_DATA
    dropped = answered(translator, Lines(source, tmp_path / "out", too_long="drop"))
    assert dropped == [LINES["two"], "", LINES["été"]]
    assert "; 1 line too long and dropped" in capfd.readouterr().err
    cut = answered(translator, Lines(source, tmp_path / "out", too_long="truncate"))
    assert (cut[0], cut[2], cut[1] != "") == (LINES["two"], LINES["été"], True)
    assert "; 1 line too long and cut" in capfd.readouterr().err


def test_answers_that_the_context_cuts_are_counted(translator: Path, tmp_path: Path, capfd):
    """An end that may not come before is not reached; one that is asked for is no loss."""
    source = asked(tmp_path, "two", "été")
    longer = {"min_tokens": 2 * CONTEXT, "max_tokens": 2 * CONTEXT}
    for given, said in ((longer, True), ({"min_tokens": 5, "max_tokens": 5}, False)):
        output = tmp_path / f"out{said}"
        generate_file(translator, Lines(source, output), given, World())
        assert ("; 2 answers cut at the end of model.context" in capfd.readouterr().err) == said
        scores = evaluate_files(translator, Files(source, [source]), World(), texts=TextOptions("chrf", given))
        assert scores.get("answers_cut") == (2 if said else None)
        generate(translator, "two", given, World())
        assert ("the answer is cut at the end of model.context" in capfd.readouterr().err) == said
        split = evaluate(translator, [], "val", World(), texts=TextOptions("chrf", given))
        assert split.get("texts_cut") == (len(LINES) if said else None)


def test_what_is_no_text(translator: Path, tmp_path: Path, capfd):
    (tmp_path / "in").write_bytes(b"two\ncat!\xff\n\0\n")
    with pytest.raises(HvdtrainError, match=r"in: line 2 is not UTF-8: its byte 4 is 0xff; convert") as caught:
        answered(translator, Lines(tmp_path / "in", tmp_path / "out"))
    assert caught.value.exit_code == EXIT_BAD_DATA
    assert len(answered(translator, Lines(tmp_path / "in", tmp_path / "out", invalid="replace"))) == 3
    assert "; 2 replaced characters" in capfd.readouterr().err
    for content, told_of in (
        (b"\xff\xfet\0", "in is UTF-16 text; convert it: iconv -f UTF-16 -t"),
        ("no mark\n".encode("utf-16-le"), "is UTF-16LE"),
        (b"a\rb\r", "ends its lines with .r alone"),
    ):
        (tmp_path / "in").write_bytes(content)
        with pytest.raises(HvdtrainError, match=told_of):
            answered(translator, Lines(tmp_path / "in", tmp_path / "out"))


def test_what_goes_on_begins_with_the_prompt_and_stays_on_its_line(teller: Path, tmp_path: Path):
    source = asked(tmp_path, "«été»", "狗")
    texts = answered(teller, Lines(source, tmp_path / "out"), {"temperature": 1.0, "seed": 3, "max_tokens": 12})
    assert [text[:5] for text in texts] == ["«été»", texts[1][:5]]
    assert texts[1].startswith("狗")
    assert generate(teller, "", {"temperature": 0.0, "max_tokens": 2}, World()) is not None  # from the end of a text
    long = "é" * CONTEXT
    assert generate(teller, long, GREEDY, World()).startswith(long)  # one text sees the newest tokens; beams do not
    with pytest.raises(HvdtrainError, match=f"the prompt has {2 * CONTEXT} tokens, and model.context={CONTEXT}"):
        generate(teller, long, {"beam": 2}, World())


def test_a_label_and_its_probability(judge: Path, tmp_path: Path, monkeypatch):
    lines = list(LINES)
    texts = answered(judge, Lines(asked(tmp_path, *lines), tmp_path / "out"), {})
    assert [text.split("\t")[0] for text in texts] == ["no", "yes", "no", "yes"]
    assert all(0.5 < float(text.split("\t")[1]) <= 1 for text in texts)
    (line,) = on(monkeypatch, GENERATE, 1, lambda world: generate(judge, lines[1], {}, world, as_json=True))
    answers = json.loads(line)["answers"]
    assert [one["text"] for one in answers] == ["yes", "no"]
    assert sum(one["score"] for one in answers) == pytest.approx(1, abs=1e-6)
    with pytest.raises(HvdtrainError, match=r"--beam, --top-k: task\.name=classify searches for no text") as caught:
        generate(judge, "x", {"beam": 2, "top_k": 1}, World())
    assert caught.value.exit_code == EXIT_USAGE


def test_ranks_share_by_length_and_groups_do_not_depend_on_them():
    rows = [Row("", [0] * (1 + number % 37), number) for number in range(1000)]
    for ranks in (1, 2, 3, 50):
        dealt = shares(rows, ranks, 1000)
        groups = [group for mine in dealt for group in mine]
        assert sorted(row.number for group in groups for row in group) == list(range(1000))
        assert sorted([row.number for row in group] for group in groups) == sorted(
            [row.number for row in group] for group in shares(rows, 1, 1000)[0]
        )
        work = [sum(len(row.tokens) for group in mine for row in group) for mine in dealt]
        assert ranks > 16 or max(work) - min(work) <= 1000
        assert all(len(group) * (1 + max(len(row.tokens) for row in group)) <= 1000 for group in groups)


def test_what_was_left_out_is_told():
    assert told({"empty": 1, "truncate": 1200}, {"byte order marks": 1}) == [
        "1 empty line", "1,200 lines too long and cut", "1 byte order marks"
    ]  # fmt: skip


# --- evaluate ----------------------------------------------------------------------------------------------------


def test_evaluations_have_the_scores_of_decoded_texts_and_when(translator: Path):
    lines = [line for line in read_log(translator / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [60, 120]
    assert lines[1]["bleu"] == pytest.approx(100)
    assert lines[0]["chrf"] < lines[1]["chrf"] == pytest.approx(100)
    assert 0 < lines[0]["wall_s"] < lines[1]["wall_s"]
    summary = json.loads((translator / "summary.json").read_text())
    assert (summary["rougeL"], summary["bleu"]) == (lines[1]["rougeL"], lines[1]["bleu"])
    assert summary["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")


def test_the_best_may_be_chosen_by_a_score_of_texts(translator: Path, tmp_path: Path):
    """Its direction is the task's: more chrF is better. A score that it does not tell is refused at once."""
    best = json.loads((translator / "checkpoints" / "best.json").read_text())
    assert best == {"step": 120, "chrf": read_log(translator / "metrics.jsonl")[-1]["chrf"]}
    assert evaluate(translator, [], "val", World(), which="best")["step"] == 120
    told = r"checkpoint\.best=bleu is no score of task\.name=lm as it is set; there are: val_loss"
    with pytest.raises(HvdtrainError, match=told) as caught:
        learn(tmp_path, "text", "checkpoint.best=bleu")
    assert caught.value.exit_code == EXIT_USAGE
    assert not (tmp_path / "run").exists()


def test_a_split_is_scored_as_in_training_on_any_ranks(translator: Path, monkeypatch):
    logged = read_log(translator / "metrics.jsonl")[-1]
    names = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")
    for ranks in (1, 2):
        for found in on(monkeypatch, EVALUATE, ranks, lambda world: evaluate(translator, [], "val", world)):
            assert {name: found[name] for name in names} == {name: logged[name] for name in names}
            assert found["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    other = evaluate(translator, [], "val", World(), texts=TextOptions("chrf", {"max_tokens": 1}))
    assert other["chrf"] < 50
    assert "bleu" not in other


def test_files_are_scored_as_the_library_scores_what_generate_writes(translator: Path, tmp_path: Path, monkeypatch):
    """Several references, an empty line, one that is too long; on one rank and on three."""
    lines = [*LINES, "", "x" * 30, "a cat"]
    source = asked(tmp_path, *lines)
    first = asked(tmp_path, *(LINES.get(line, "chien œuvré") for line in lines), name="first")
    second = asked(tmp_path, "", "", "le chat", "", "", "", "un chat œuvré", name="second")
    texts = answered(translator, Lines(source, tmp_path / "out", too_long="drop"))
    references = [path.read_text().split("\n")[:-1] for path in (first, second)]
    expected = sacrebleu.corpus_chrf(texts, [references[0], [text or None for text in references[1]]]).score
    files = Files(source, [first, second], too_long="drop")
    for ranks in (1, 3):
        scored = on(monkeypatch, EVALUATE, ranks, lambda world: evaluate_files(
            translator, files, world, texts=TextOptions("chrf bleu", GREEDY)
        ))  # fmt: skip
        for found in scored:
            assert found["chrf"] == expected
            assert (found["lines"], found["lines_empty"], found["lines_drop"]) == (7, 1, 1)
            assert found["signatures"]["chrf"].startswith("nrefs:var|")
            assert found["wall_s"] > 0


def test_references_out_of_json_lines(translator: Path, tmp_path: Path):
    rows = [{"source": source, "target": "x", "all": [target, "x"]} for source, target in LINES.items()]
    path = asked(tmp_path, *map(json.dumps, rows), name="in.jsonl")
    found = evaluate_files(translator, Files(path, [path], reference_field="all"), World())
    assert (found["bleu"], found["rouge1"]) == (pytest.approx(100), pytest.approx(100))
    assert found["signatures"]["rouge"].startswith("nrefs:2|best:rouge1|")
    assert evaluate_files(translator, Files(path, [path]), World())["bleu"] < 50
    with pytest.raises(HvdtrainError, match=r"in\.jsonl: line 1 has no field 'none' with a text or a list of texts"):
        evaluate_files(translator, Files(path, [path], reference_field="none"), World())


def test_files_of_different_length(translator: Path, tmp_path: Path):
    source, reference = asked(tmp_path, "two", "cat!"), asked(tmp_path, "x", name="reference")
    with pytest.raises(
        HvdtrainError, match=r"in\.txt has 2 lines and .*reference has 1: line belongs to line"
    ) as caught:
        evaluate_files(translator, Files(source, [reference]), World())
    assert caught.value.exit_code == EXIT_BAD_DATA
    with pytest.raises(HvdtrainError, match=r"no score 'blue'; there are: bleu, bleu_tokenized, chrf, rouge"):
        evaluate_files(translator, Files(source, [source]), World(), texts=TextOptions("blue"))
