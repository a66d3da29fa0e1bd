"""What a run takes from another run: by name and shape, what is new, what nobody takes, and what cannot be."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from threads import ThreadGroup, on_ranks
from tiny import write_tokenizer
from torch import nn

from hvdtrain.building import _take_over
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.origin import (
    Beginner,
    Origin,
    check_tokens,
    digest_of,
    merged,
    model_under,
    open_origin,
    take_over,
)
from hvdtrain.checkpoint.state import run_state
from hvdtrain.checkpoint.writer import CheckpointOptions, save
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.config import RunConfig
from hvdtrain.errors import CheckpointError, ConfigError, DataError
from hvdtrain.files import file_sha256
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.hf.writing import Exported, Writer
from hvdtrain.models.initial import fill
from hvdtrain.models.lora import LoraOptions, adapt, initial_adapters
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.slices import Rect, whole_slices

GROUP = LocalGroup()
SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 8, "ff_ratio": 2.0}
VOCABULARY = 20


def made(kind: type, *more: Any, seed: int = 1, **options: Any) -> Any:
    model = kind(TransformerOptions(**{**SMALL, **options}), VOCABULARY, *more)
    model.initialise(seed)
    return model


def write_run(
    folder: Path, trained: nn.Module, identity: Any = None, step: int = 3, ema: Ema | None = None, **config: Any
) -> Path:
    """A run folder with a checkpoint of ``trained``."""
    folder.mkdir(exist_ok=True)
    tree = RunConfig.model_validate({"model": SMALL, **config}).model_dump()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    progress = Progress(step=step, identity={"tokenizer_sha256": "0" * 64, **(identity or {})})
    save(folder, run_state(whole_slices(trained, GROUP), None, ema), progress, GROUP, CheckpointOptions(keep_last=0))
    return folder


def taken(origin: Origin, model: nn.Module, task: str = "lm", labels: tuple[str, ...] = ()) -> Any:
    ours = Beginner(task, type(model).__name__, VOCABULARY, labels)
    return merged([take_over(origin, whole_slices(model, GROUP), ours)], origin)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# --- by name -----------------------------------------------------------------------------------------------------


def test_the_same_model_is_taken_whole(tmp_path: Path):
    theirs, ours = made(Decoder, seed=1), made(Decoder, seed=2)
    found = taken(open_origin(write_run(tmp_path, theirs)), ours)
    assert (found.new, found.left_over, found.notes) == ([], [], [])
    assert all(torch.equal(mine, parameters(theirs)[name]) for name, mine in parameters(ours).items())


def test_a_language_models_blocks_become_a_classifiers(tmp_path: Path):
    theirs, ours = made(Decoder, seed=1), made(Classifier, 3, seed=2)
    fresh = parameters(made(Classifier, 3, seed=2))
    found = taken(open_origin(write_run(tmp_path, theirs)), ours, "classify")
    assert found.new == ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]
    assert found.left_over == []
    for name, mine in parameters(ours).items():
        expected = fresh[name] if name in found.new else parameters(theirs)[name.removeprefix("encoder.")]
        assert torch.equal(mine, expected), name


def test_an_encoder_begins_both_sides_of_an_encoder_decoder(tmp_path: Path):
    """Rothe et al. 2020: what looks at the other side is new."""
    theirs, ours = made(Classifier, 3, seed=1), made(Seq2Seq, seed=2)
    found = taken(open_origin(write_run(tmp_path, theirs, task={"name": "classify"})), ours, "seq2seq")
    assert {name.split(".")[2] for name in found.new} == {"cross_attention", "cross_attention_norm"}
    assert {name.partition(".")[0] for name in found.left_over} == {"pooler", "head"}
    own = parameters(theirs)["encoder.blocks.1.feed_forward.up.weight"]
    assert torch.equal(parameters(ours)["encoder_blocks.1.feed_forward.up.weight"], own)
    assert torch.equal(parameters(ours)["blocks.1.feed_forward.up.weight"], own)


def test_the_head_of_another_task_is_left_over(tmp_path: Path):
    origin = open_origin(write_run(tmp_path, made(Classifier, 3), task={"name": "classify"}))
    assert "head.weight" in taken(origin, made(Classifier, 3, seed=2), "classify").taken
    other = taken(origin, made(Classifier, 3, seed=2), "span_qa")
    assert [name for name in other.new if name.startswith("head")] == ["head.weight", "head.bias"]
    assert other.left_over == ["head.bias", "head.weight"]


def test_a_model_that_has_nothing_of_it_is_refused_with_what_both_have(tmp_path: Path):
    origin = open_origin(write_run(tmp_path, made(Decoder)))
    with pytest.raises(ConfigError, match=r"nothing of this model, made of weight \(1\), .*it holds .*position"):
        taken(origin, nn.Linear(2, 2))


# --- by shape ----------------------------------------------------------------------------------------------------


def test_fewer_positions_are_the_first_ones(tmp_path: Path):
    theirs, ours = made(Decoder), made(Decoder, seed=2, context=5)
    found = taken(open_origin(write_run(tmp_path, theirs)), ours)
    assert torch.equal(ours.position.weight, theirs.position.weight[:5])
    assert found.notes == ["position.weight: the first 5 of 8 rows"]


def test_positions_beyond_theirs_begin_as_in_a_fresh_run(tmp_path: Path):
    """The second phase of BERT: rows four times as long as in the first."""
    theirs, ours, fresh = made(Decoder), made(Decoder, seed=2, context=11), made(Decoder, seed=2, context=11)
    origin = open_origin(write_run(tmp_path, theirs))
    found = taken(origin, ours)
    assert torch.equal(ours.position.weight, torch.cat([theirs.position.weight, fresh.position.weight[8:]]))
    assert found.notes == ["position.weight: rows from 8 to 10 are new"]
    assert model_under({"from": str(tmp_path), "context": 11})["context"] == 11
    fresh.position.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"position.*: not in model.from=.* would stay as random as it began"):
        taken(origin, fresh)


@pytest.mark.parametrize(("theirs_to", "ours_to"), [(16, 1), (1, 16)])
def test_padding_of_the_vocabulary_may_differ(tmp_path: Path, theirs_to: int, ours_to: int):
    theirs = made(Decoder, vocab_multiple=theirs_to)
    ours = made(Decoder, seed=2, vocab_multiple=ours_to)
    fresh = made(Decoder, seed=2, vocab_multiple=ours_to)
    taken(open_origin(write_run(tmp_path, theirs)), ours)
    assert torch.equal(ours.embedding.weight[:VOCABULARY], theirs.embedding.weight[:VOCABULARY])
    assert torch.equal(ours.embedding.weight[VOCABULARY:], fresh.embedding.weight[VOCABULARY:])


def test_a_head_of_other_labels_is_new_with_a_word(tmp_path: Path):
    origin = open_origin(write_run(tmp_path, made(Classifier, 3), task={"name": "classify"}))
    found = taken(origin, made(Classifier, 5, seed=2), "classify")
    assert found.new == ["head.weight", "head.bias"]
    assert found.notes[0] == "head.weight is [5, 16] here, and head.weight [3, 16] there"


def test_another_shape_is_refused_with_both(tmp_path: Path):
    origin = open_origin(write_run(tmp_path, made(Decoder)))
    with pytest.raises(ConfigError, match=r"embedding.weight is \[20, 24\] here, and embedding.* \[20, 16\] there"):
        taken(origin, made(Decoder, width=24))


def test_what_is_new_must_not_be_frozen(tmp_path: Path):
    ours = made(Classifier, 3, seed=2)
    ours.pooler.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"pooler \(2\): not in model.from=.* would stay as random as it began"):
        taken(open_origin(write_run(tmp_path, made(Decoder))), ours, "classify")


def test_a_head_for_other_labels_is_new_with_a_word(tmp_path: Path):
    run = write_run(tmp_path, made(Classifier, 2), {"label_names": ["bad", "good"]}, task={"name": "classify"})
    same = taken(open_origin(run), made(Classifier, 2), "classify", ("bad", "good"))
    other = taken(open_origin(run), made(Classifier, 2), "classify", ("good", "bad"))
    assert (same.new, other.new) == ([], ["head.weight", "head.bias"])
    assert other.notes == ["the head is new: labels are good, bad here, bad, good there"]


def test_a_hugging_face_folder_is_taken_like_the_run_it_was_made_of(tmp_path: Path):
    theirs, ours = made(Decoder, seed=1), made(Decoder, seed=2)
    writer = Writer(Exported("Decoder", theirs.options, VOCABULARY, {}))
    writer.write(tmp_path, open_origin(write_run(tmp_path / "run", theirs)).tensors, torch.float32, None)
    origin = open_origin(tmp_path)
    assert TransformerOptions(**origin.options).hidden_width == theirs.options.hidden_width
    assert (taken(origin, ours).new, origin.unread) == ([], ())
    assert all(torch.equal(mine, parameters(theirs)[name]) for name, mine in parameters(ours).items())
    digest = digest_of(origin, GROUP)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ", encoding="utf-8")
    assert digest_of(origin, GROUP) != digest


# --- which weights -----------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_and_the_average_where_there_is_one(tmp_path: Path):
    old, new = made(Decoder, seed=1), made(Decoder, seed=2)
    ema = Ema(whole_slices(new, GROUP), EmaOptions(decay=0.5))
    with torch.no_grad():
        new.norm.weight.add_(1.0)
    write_run(tmp_path, old, step=3)
    write_run(tmp_path, new, step=10, ema=ema)
    assert open_origin(tmp_path).about == "step 10, ema"
    assert (open_origin(tmp_path).tensors.read("norm.weight") == 1.0).all()
    assert (open_origin(tmp_path, "raw").tensors.read("norm.weight") == 2.0).all()
    assert len({digest_of(open_origin(tmp_path, kind), GROUP) for kind in ("raw", "ema")}) == 2
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text("{", encoding="utf-8")
    assert open_origin(tmp_path).about == "step 3, raw"
    with pytest.raises(ConfigError, match="has no averaged weights"):
        open_origin(tmp_path, "ema")


def test_adapters_of_a_run_are_merged_into_what_is_taken(tmp_path: Path):
    options, theirs = LoraOptions(targets="all"), made(Decoder, seed=1)
    adapt(theirs, theirs.options, options)
    fill(theirs, initial_adapters(theirs, 1))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.1 if name.endswith(".b") else 0.0
    model = {**SMALL, "from": "base", "lora": options.model_dump()}
    ours, tokens = made(Decoder, seed=2), torch.tensor([[1, 2, 3]])
    found = taken(open_origin(write_run(tmp_path, theirs, model=model)), ours)
    assert (found.new, found.left_over) == ([], [])
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-5)  # sums in another order


def test_a_damaged_part_is_named_before_a_step_is_made(tmp_path: Path):
    part = write_run(tmp_path, made(Decoder)) / "checkpoints" / "step-00000003" / "part-00000-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(Exception, match=r"part-00000-of-00001.safetensors does not match its digest; move that"):
        digest_of(open_origin(tmp_path), GROUP)


def test_a_digest_follows_the_weights_and_not_the_folder(tmp_path: Path):
    model = made(Decoder)
    digests = [digest_of(open_origin(write_run(tmp_path / name, model)), GROUP) for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert digest_of(open_origin(write_run(tmp_path / "c", made(Decoder, seed=2))), GROUP) != digests[0]


def test_one_replica_reads_and_the_others_are_given(tmp_path: Path):
    """Every rank takes part; the engine's broadcast, which a run begins with, brings the weights to the others."""
    origin = open_origin(write_run(tmp_path, made(Decoder, seed=1)))
    read: list[int] = []

    class Counted:
        names = origin.tensors.names
        whole = staticmethod(origin.tensors.whole)

        def __init__(self, rank: int):
            self._rank = rank

        def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
            read.append(self._rank)
            return origin.tensors.read(name, places)

    def work(group: ThreadGroup) -> None:
        model, mesh = made(Decoder, seed=2), whole_replicas(group)
        replica: Any = SimpleNamespace(model=model, slices=whole_slices(model, group))
        mine = Origin(tmp_path, "", {}, Counted(group.rank), ())
        manifest = SimpleNamespace(vocab_size=VOCABULARY, label_names=())
        run: Any = SimpleNamespace(
            start=SimpleNamespace(origin=mine), mesh=mesh, is_main=group.rank == 0, run_dir=tmp_path,
            task=SimpleNamespace(name="lm"), data=SimpleNamespace(corpora=SimpleNamespace(manifest=manifest)),
        )  # fmt: skip
        _take_over(run, replica, "Decoder")

    on_ranks(3, work)
    assert set(read) == {0}
    assert json.loads((tmp_path / "from.json").read_text())["taken"] == len(origin.tensors.names)


# --- the shape and the settings ----------------------------------------------------------------------------------


def test_the_shape_comes_from_the_folder_under_the_users_own_keys(tmp_path: Path):
    folder = str(write_run(tmp_path, made(Decoder)))
    found = model_under({"from": folder, "dropout": 0.1, "context": 4, "ff_width": 32, "lora": {"rank": 2}})
    assert {key: found[key] for key in ("layers", "width", "dropout", "context")} == {
        "layers": 2, "width": 16, "dropout": 0.1, "context": 4,
    }  # fmt: skip
    assert RunConfig.model_validate({"model": found}).model.lora == LoraOptions(rank=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"width": 32, "layers": 3},
            r"model.layers=3 \(there 2\), model.width=32 \(there 16\): model.from=.*another",
        ),
        ({"ff_ratio": 4.0}, r"model.ff_ratio=4.0 \(there 2.0\)"),
        ({"norm": "rmsnorm"}, r"model.norm=rmsnorm \(there layernorm\)"),
    ],
)
def test_keys_that_contradict_the_shape_are_refused_with_both(tmp_path: Path, asked: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        model_under({"from": str(write_run(tmp_path, made(Decoder))), **asked})


def test_a_folder_that_is_neither_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is neither a run "):
        open_origin(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        open_origin(tmp_path / "nowhere")


def test_a_run_that_goes_on_does_not_look_at_the_folder_again(tmp_path: Path):
    model = {**SMALL, "from": "gone", "from_digest": "abc", "dropout": 0.1}
    run = write_run(tmp_path, made(Decoder), model=model)
    assert model_under({"from": "gone"}, [run])["from_digest"] == "abc"
    assert model_under({"from": "gone", "dropout": 0.3}, [run])["dropout"] == 0.3
    with pytest.raises(CheckpointError, match=r"model\.from=other is not there"):
        model_under({"from": "other"}, [run])


# --- tokens ------------------------------------------------------------------------------------------------------


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path):
    own, shards = tmp_path / "own.json", tmp_path / "shards"
    shards.mkdir()
    write_tokenizer(own, 20)
    write_tokenizer(shards / "tokenizer.json", 21)
    origin = Origin(tmp_path, "", {}, None, (), tokenizer=own, tokenizer_sha256=file_sha256(own))
    with pytest.raises(DataError, match=r"another tokenizer \(.*\) than model.from=.*--tokenizer .*own.json"):
        check_tokens(origin, shards, file_sha256(shards / "tokenizer.json"))
    # data_prep switches off limits, and lays the file out anew: the same tokens
    fields = {**json.loads(own.read_text()), "truncation": None}
    (shards / "tokenizer.json").write_text(json.dumps(fields, indent=3), encoding="utf-8")
    assert check_tokens(origin, shards, file_sha256(shards / "tokenizer.json")) == []
    assert "nothing tells" in check_tokens(Origin(tmp_path, "", {}, None, ()), shards, "0")[0]
