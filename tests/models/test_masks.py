"""The pictures of masks.py, and what no picture shows."""

import torch

from hvdtrain.models.masks import packed_mask, padding_mask


def picture(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if sees else "." for sees in row) for row in mask.tolist()]


def test_keys_up_to_the_length():
    mask = padding_mask(torch.tensor([3, 1, 4]), 4)
    assert mask.shape == (3, 1, 1, 4)
    assert picture(mask[:, 0, 0]) == ["xxx.", "x...", "xxxx"]


def test_an_empty_row_sees_something():
    assert picture(padding_mask(torch.tensor([0]), 3)[:, 0, 0]) == ["x.."]


def test_documents_of_a_packed_row():
    mask = packed_mask(torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, -1, -1]]))
    assert mask.shape == (2, 1, 6, 6)
    assert picture(mask[0, 0]) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        ".....x",
    ]
    assert picture(mask[1, 0]) == [
        "x.....",
        ".x....",
        "..x...",
        "..xx..",
        "....x.",
        "....xx",
    ]


def test_one_document_is_causal_attention():
    assert torch.equal(packed_mask(torch.zeros(1, 7, dtype=torch.int64))[0, 0], torch.ones(7, 7).tril().bool())
