"""The parts of a transformers model: models inside it, attention modules, and the projections that follow them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# the linear layer that takes an attention's output, by its name in the attention module; in BERT and related models it
# is in the neighbouring module `output`
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "out_lin", "Wo", "o", "dense", "proj")


def is_transformers_model(model: object) -> bool:
    """Whether `model` is a model of transformers, determined without importing transformers."""
    return _comes_from(type(model), "PreTrainedModel")


def inner_models(model: nn.Module) -> Iterator[Any]:
    """Every transformers model inside `model`, including `model` itself, the outer ones first."""
    return (module for module in model.modules() if is_transformers_model(module))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every attention that uses transformers' interface, in the order of the modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if not is_transformers_model(module) and _asks_interface(type(module))
    }


def attends_in_parts(module: nn.Module) -> bool:
    """Whether the attention itself splits its tokens and attends within each part (images in Qwen2.5-VL)."""
    return "cu_seqlens" in inspect.signature(type(module).forward).parameters


def projection_of(model: nn.Module, name: str) -> nn.Module | None:
    """The linear layer that takes the output of the attention module `name`; None if it is not known."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    beside = getattr(parent, "output", None)
    for home in (module, beside):
        for place in PROJECTIONS:
            layer = getattr(home, place, None)
            if isinstance(layer, nn.Module):
                return layer
    return None


def projection_weight(layer: nn.Module | None) -> Tensor | None:
    """(d, H Dv) of a linear layer, also of GPT-2's, whose weight is transposed; None for anything else."""
    weight: Any = getattr(layer, "weight", None)
    # a subclass may add to the product (an adapter)
    if type(layer) is nn.Linear:
        return weight
    return weight.T if layer is not None and type(layer).__name__ == "Conv1D" else None


def _asks_interface(kind: type) -> bool:
    for base in kind.__mro__:
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if inspect.isfunction(function) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
    return False


def _comes_from(kind: type, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__)
