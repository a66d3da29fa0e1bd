"""The average of the weights: its values by hand and in closed form, and the model untouched by being looked at."""

import pytest
import torch
from checkpoints import averages_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import tiny_decoder
from torch import nn

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.optim.ema import Ema, EmaOptions, decay_at, make_ema
from hvdtrain.slices import whole_slices


def one_weight(value: float = 0.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def average_of(ema: Ema) -> float:
    return averages_of(ema)["weight"].item()


def walk(weights: list[float], began: int = 0, **options) -> list[float]:
    """The average after each step of a model of one weight, which starts at 0."""
    model = one_weight()
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(**options))
    ema.restart(began)
    found = []
    for step, weight in enumerate(weights, began + 1):
        nn.init.constant_(model.weight, weight)
        ema.update(step)
        found.append(average_of(ema))
    return found


def test_it_is_off_unless_asked_for():
    assert EmaOptions().decay == 0
    assert make_ema(whole_slices(one_weight(), LocalGroup()), EmaOptions()) is None
    assert make_ema(whole_slices(one_weight(), LocalGroup()), EmaOptions(decay=0.5)) is not None


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"every": 0}])
def test_impossible_options(wrong: dict):
    with pytest.raises(ValidationError):
        EmaOptions(**wrong)


def test_by_hand():
    assert walk([1, 1, 5], decay=0.75, warmup=False) == [0.25, 0.4375, 0.4375 * 0.75 + 1.25]


def test_every_second_step_keeps_the_horizon():
    """Two steps at once keep 0.5^2; the weights between them are not looked at."""
    assert walk([9, 4, -9, 8], decay=0.5, warmup=False, every=2) == [0, 3, 3, 3 * 0.25 + 6]


def test_warm_up():
    """min(decay, (1 + t) / (10 + t)): 2/11, 3/12, 4/13, ... up to the decay."""
    options = EmaOptions(decay=0.9)
    assert [decay_at(options, t) for t in (1, 2, 3)] == [2 / 11, 3 / 12, 4 / 13]
    assert [decay_at(options, t) for t in (79, 80, 81, 10**9)] == [80 / 89, 0.9, 0.9, 0.9]
    assert decay_at(EmaOptions(decay=0.9, every=3), 3) == (4 / 13) ** 3
    assert decay_at(EmaOptions(decay=0.9, warmup=False), 1) == 0.9
    assert walk([1.0], decay=0.9) == pytest.approx([9 / 11])


def test_an_average_that_began_later_warms_up_too():
    assert walk([1.0, 2.0, 3.0], began=5000, decay=0.999) == walk([1.0, 2.0, 3.0], decay=0.999)


@given(st.floats(0.01, 0.9999), st.integers(1, 4), st.booleans(), st.integers(0, 2**16))
def test_against_fp64(decay: float, every: int, warmup: bool, seed: int):
    """40 steps against a plain loop in fp64. Each fp32 update rounds by 2^-24 of numbers below 4: within 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 5, bias=False)])
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=decay, every=every, warmup=warmup))
    truth = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(1, 41):
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(torch.rand(p.shape, generator=generator) * 4 - 2)
            if step % every == 0:
                keep = (min(decay, (1 + step) / (10 + step)) if warmup else decay) ** every
                truth[name] = keep * truth[name] + (1 - keep) * p.detach().double()
        ema.update(step)
    for name, average in averages_of(ema).items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), truth[name], rtol=0, atol=1e-5)


def test_it_may_begin_anew():
    model = one_weight(1.0)
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.5, warmup=False))
    nn.init.constant_(model.weight, 7.0)
    ema.restart(30)
    assert (ema.began, average_of(ema)) == (30, 7.0)


def test_trainable_parameters_once():
    model = tiny_decoder(tied=True)
    model.position.weight.requires_grad_(False)
    names = {name for name, _ in model.named_parameters()} - {"position.weight"}
    assert averages_of(Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9))).keys() == names
    assert "head.weight" not in names


def test_a_model_of_other_types_is_our_own_mistake():
    with pytest.raises(AssertionError, match="fp32 weights"):
        Ema(whole_slices(tiny_decoder().bfloat16(), LocalGroup()), EmaOptions(decay=0.9))


# --- in the model's place ----------------------------------------------------------------------------------------


def tensors_of(model: nn.Module, ema: Ema) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **{f"ema {k}": v for k, v in averages_of(ema).items()}}


def cloned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    pairs = [(some[name].detach().view(torch.int32), others[name].view(torch.int32)) for name in others]
    return some.keys() == others.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def pair() -> tuple[nn.Module, Ema]:
    """A model that has moved on from its average, with what a careless round trip would lose in it."""
    model = tiny_decoder()
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9, warmup=False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        model.norm.bias[:4] = torch.tensor([-0.0, torch.nan, 1e-45, torch.inf])
    averages_of(ema)["norm.bias"][:3] = torch.tensor([1e30, -0.0, torch.nan])
    return model, ema


@pytest.mark.parametrize("fails", [False, True])
def test_there_and_back_bit_for_bit(pair: tuple[nn.Module, Ema], fails: bool):
    model, ema = pair
    before, places = cloned(tensors_of(model, ema)), [p.data_ptr() for p in model.parameters()]
    averages = cloned(dict(averages_of(ema)))
    seen = []
    try:
        with ema.swapped(lambda: seen.append(model.embedding.weight.detach().clone())):
            assert same_bits(dict(model.named_parameters()), averages)
            assert [p.data_ptr() for p in model.parameters()] == places  # by which compiled graphs know them
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert same_bits(tensors_of(model, ema), before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(torch.stack(seen), torch.stack([averages["embedding.weight"], before["embedding.weight"]]))


def test_the_model_computes_with_the_average():
    model = tiny_decoder()
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9))
    tokens, first = torch.tensor([[1, 2, 3]]), model(torch.tensor([[1, 2, 3]]))
    nn.init.normal_(model.norm.weight)
    moved = model(tokens)
    with ema.swapped():
        assert torch.equal(model(tokens), first)
    assert torch.equal(model(tokens), moved)
    assert not torch.equal(first, moved)


def test_frozen_parameters_stay_in_place():
    model = tiny_decoder()
    model.position.weight.requires_grad_(False)
    ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9))
    nn.init.normal_(model.position.weight)
    kept = model.position.weight.clone()
    with ema.swapped():
        assert torch.equal(model.position.weight, kept)


def test_within_nothing_is_updated_or_saved(pair: tuple[nn.Module, Ema]):
    """What lies in the average's place there are the weights: to save them as the average would be silent damage."""
    _, ema = pair
    with ema.swapped():
        for misuse in (lambda: ema.update(1), lambda: ema.restart(1), ema.averages):
            with pytest.raises(AssertionError):
                misuse()
    ema.update(1)


def test_gradients_and_the_optimizer_know_nothing_of_it():
    """Three steps with a look at the average after each are the three steps without, to the bit."""

    def trained(look: bool) -> dict[str, torch.Tensor]:
        model = tiny_decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        ema = Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9))
        for step in (1, 2, 3):
            model(torch.tensor([[step, 2, 3]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            if look:
                with ema.swapped(), torch.no_grad():
                    model(torch.tensor([[4]]))
        return cloned(tensors_of(model, ema))

    assert same_bits(trained(look=True), trained(look=False))


def test_one_foreach_operation(monkeypatch: pytest.MonkeyPatch):
    """Not a loop over hundreds of parameters: on a GPU each would be a kernel launch."""
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), lerp(*args)))
    model = tiny_decoder()
    Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9)).update(1)
    assert calls == [len(list(model.parameters()))]
