"""`attn_implementation="longlens"`: exact attention in linear memory by its name alone, after `import longlens.hf`.

    import longlens.hf
    model = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="longlens")

transformers has no entry point for other packages, so the name is registered when transformers' models are imported,
before or after longlens. Other methods, observers and feed-forward parts in chunks need `longlens.hf.attach`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from longlens.hf.arguments import no_weights, read_arguments
from longlens.hf.masks import DeferredMask, make_mask
from longlens.ops.exact.exact import Exact

NAME = "longlens"
# the module that brings transformers' table of attention functions, and is imported before any model is made
HOME = "transformers.modeling_utils"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_exactly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DeferredMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, N, D) in, (B, Nq, H, Dv) out, and no weights.

    Raises `UnsupportedError` for arguments that are not supported; nothing falls back to N x N weights.
    """
    if _weights_are_asked():
        raise no_weights(type(module).__name__)
    arguments = read_arguments(module, query, key, value, attention_mask, dropout, scaling, keywords)
    return arguments.attend(Exact()).transpose(1, 2).contiguous(), None


def _weights_are_asked() -> bool:
    """Whether the model that runs now collects attention weights: not every model tells its attention so.

    transformers would return none, without an error.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and "attentions" in collected


def register() -> None:
    """Make the name known to transformers: at once if its models are imported, otherwise as soon as they are."""
    if HOME in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend_exactly)
    AttentionMaskInterface.register(NAME, make_mask)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' models be followed by the registration."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """A loader that registers after the module has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        # inspect asks the loader for the source
        return getattr(self._loader, name)
