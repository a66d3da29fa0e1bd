"""Documents packed into one row are to the decoder what they are alone.

row        a a a a a b b c c c c . .
segments   0 0 0 0 0 1 1 2 2 2 2 -1 -1
positions  0 1 2 3 4 0 1 0 1 2 3 0 0
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_decoder

from hvdtrain.models.decoder import Decoder

LENGTHS, PADDING = [5, 2, 4], 2
ENDS = [5, 7, 11]
DOCUMENTS = [slice(end - length, end) for end, length in zip(ENDS, LENGTHS, strict=True)]
SEGMENTS = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4 + [-1] * 2])
POSITIONS = torch.tensor([[*range(5), *range(2), *range(4), 0, 0]])
# fp32: attention over 13 keys with a mask and over 2 to 5 without one add in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["learned", "rotary", "relative"])
def model(request: pytest.FixtureRequest) -> Decoder:
    # Weights of the size that training gives them: at the start attention is nearly even, and would hide much.
    model = tiny_decoder(positions=request.param, context=13)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


def packed_row(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (1, 13), generator=torch.Generator().manual_seed(seed))


def packed(model: Decoder, row: torch.Tensor) -> torch.Tensor:
    return model(row, positions_BT=POSITIONS, segments_BT=SEGMENTS)


@torch.no_grad()
def test_each_document_is_as_if_alone(model: Decoder):
    row = packed_row()
    hidden = packed(model, row)
    for document in DOCUMENTS:
        torch.testing.assert_close(hidden[:, document], model(row[:, document]), **CLOSE)
    assert not torch.isclose(hidden[:, 5:11], model(row)[:, 5:11], atol=1e-2).all(-1).any()  # the arrays matter


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_a_row_may_be_longer_than_the_context(positions: str):
    """The context limits a document's positions: five here."""
    model, row = tiny_decoder(positions=positions, context=5), packed_row()
    hidden = packed(model, row)
    for document in DOCUMENTS:
        torch.testing.assert_close(hidden[:, document], model(row[:, document]), **CLOSE)


@torch.no_grad()
def test_documents_do_not_see_one_another(model: Decoder):
    row = packed_row()
    hidden = packed(model, row)
    for changed in [*DOCUMENTS, slice(11, 13)]:
        other = row.clone()
        other[:, changed] = (other[:, changed] + 1) % 50
        moved = (packed(model, other) != hidden).any(-1)[0]
        assert moved[changed].all()
        assert moved.sum() == changed.stop - changed.start


def test_gradients_are_the_sum_of_the_documents(model: Decoder):
    row = packed_row()

    def gradients(*passes: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        losses = [F.cross_entropy(model.logits(hidden)[0], targets[0], reduction="sum") for hidden, targets in passes]
        return list(torch.autograd.grad(sum(losses), list(model.parameters())))

    targets = packed_row(seed=1)
    hidden = packed(model, row)
    together = gradients(*((hidden[:, document], targets[:, document]) for document in DOCUMENTS))
    apart = gradients(*((model(row[:, document]), targets[:, document]) for document in DOCUMENTS))
    for (name, _), a, b in zip(model.named_parameters(), together, apart, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b), name


def test_padding_is_finite(model: Decoder):
    """Also in a row of nothing else, and in the gradients: 0 * NaN would be NaN."""
    row = packed_row().expand(2, -1)
    segments = torch.cat([SEGMENTS, torch.full((1, 13), -1)])
    hidden = model(row, positions_BT=POSITIONS.expand(2, -1), segments_BT=segments)
    assert hidden.isfinite().all()
    (hidden * (segments >= 0)[..., None]).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_one_document_is_a_plain_row(model: Decoder):
    row = packed_row()
    hidden = model(row, positions_BT=torch.arange(13)[None], segments_BT=torch.zeros_like(row))
    torch.testing.assert_close(hidden, model(row), **CLOSE)


@torch.no_grad()
def test_rows_are_packed_each_in_its_own_way(model: Decoder):
    rows = torch.cat([packed_row(), packed_row(seed=1)])
    segments = torch.cat([SEGMENTS, SEGMENTS.flip(1)])
    positions = torch.cat([POSITIONS, torch.tensor([[0, 0, *range(4), *range(2), *range(5)]])])
    hidden = model(rows, positions_BT=positions, segments_BT=segments)
    torch.testing.assert_close(hidden[:1], packed(model, rows[:1]), **CLOSE)
    for document in (slice(2, 6), slice(6, 8), slice(8, 13)):
        torch.testing.assert_close(hidden[1:, document], model(rows[1:, document]), **CLOSE)
