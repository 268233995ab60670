"""`longlens.attention` under `torch.compile` and `torch.export`: one operator that the compiler does not look into.

The engine decides by values (whether a tile has a masked pair, whether a sum is finite) and walks over as many tiles as
the length asks for, neither of which a compiler can trace. So a compiled program holds a single operator,
`longlens::attention`, which runs the same code as an uncompiled call and gives the same numbers. What is not a tensor
travels as text: the method, mask rules and bias rules.

The backward pass of the operator computes the forward pass again, so that nothing but the arguments is kept between the
two. Dropout is refused, since both passes would have to draw the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longlens.errors import MethodError, UnsupportedError
from longlens.ops.biases import Alibi, Bias, RelativePosition
from longlens.ops.masks import AllOf, Causal, Prefix, Rule, SameDocument
from longlens.ops.method import Method, build_method
