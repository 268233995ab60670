"""FlexAttention past the compiler's limit."""

from __future__ import annotations

import pytest
import torch

import longlens
from longlens.errors import UnsupportedError


# the compiler's own imports warn of things to come in PyTorch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_past_the_recompile_limit_it_raises_instead_of_turning_dense():
    from torch import _dynamo

    _dynamo.reset()
    first, second = (torch.randn(1, 1, length, 16) for length in (130, 140))
    with torch.no_grad(), _dynamo.config.patch(recompile_limit=1):
        longlens.attention(first, first, first, method="exact:flex")
        with pytest.raises(UnsupportedError, match=r"limit of 1 compilations.*N x N"):
            longlens.attention(second, second, second, method="exact:flex")
    _dynamo.reset()
