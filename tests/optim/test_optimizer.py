"""What decays, and what AdamW does in one step."""

import pytest
import torch
from tiny import tiny_decoder
from torch import nn

from hvdtrain.optim.optimizer import OptimOptions, make_optimizer


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(norm: str, tied: bool):
    model = tiny_decoder(norm=norm, tied=tied)
    optimizer = make_optimizer(model, OptimOptions(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        is_vector = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.3), name


def test_the_options_arrive():
    optimizer = make_optimizer(tiny_decoder(), OptimOptions(lr=0.5, beta1=0.1, beta2=0.2, eps=0.3))
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.1, 0.2)
    assert optimizer.defaults["eps"] == 0.3


def test_frozen_parameters_are_left_out():
    model = tiny_decoder()
    model.position.weight.requires_grad_(False)
    ids = {id(p) for group in make_optimizer(model, OptimOptions()).param_groups for p in group["params"]}
    assert id(model.position.weight) not in ids
    assert len(make_optimizer(nn.Linear(3, 2, bias=False), OptimOptions()).param_groups) == 1


def test_the_first_step_by_hand():
    """AdamW first shrinks a matrix by lr * decay; its first step then moves every entry by lr, against the gradient."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -4.0]]))
        model.bias.fill_(1.0)
    optimizer = make_optimizer(model, OptimOptions(lr=0.1, weight_decay=0.5, eps=1e-12))
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, -0.01]]), torch.tensor([7.0])
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.9]))
