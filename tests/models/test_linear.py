"""Linear layers with bias and GELU inside the product: as exact as PyTorch's, and used only where they may be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longlens.models import linear


@pytest.mark.parametrize("width", [32, 100, 480])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_they_are_no_less_accurate_than_the_layer_itself(width, tokens):
    torch.manual_seed(width)
    layer, x = nn.Linear(width, 3 * width).to(torch.bfloat16), torch.randn(tokens, width).to(torch.bfloat16)
    wide = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        for got, plain, expected in (
            (linear.apply_linear(layer, x), layer(x), wide),
            (linear.apply_linear_gelu(layer, x), F.gelu(layer(x)), F.gelu(wide)),
        ):
            assert got.dtype == torch.bfloat16
            assert (got - expected).norm() <= 1.05 * (plain - expected).norm()


def test_hooks_gradients_and_other_dtypes_take_the_layer_itself(monkeypatch):
    monkeypatch.setattr(linear, "_fused", lambda *_: pytest.fail("the fused product was used"))
    monkeypatch.setattr(linear, "_fused_serves", lambda: True)
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert linear.apply_linear(layer, x).requires_grad
    calls = []
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        linear.apply_linear_gelu(layer, x)
    hook.remove()
    assert calls == [1]
    with torch.no_grad():
        linear.apply_linear(nn.Linear(8, 8), x.float())
