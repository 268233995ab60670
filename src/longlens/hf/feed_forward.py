"""The feed-forward parts of a transformers model, run on chunks of tokens, so that their wide layers are never held for
all tokens at once.

A feed-forward part is found by structure: beside an attention in the same block, a module that holds linear layers and
no attention, takes a tensor (B, N, d) and returns one, and computes each token by itself. The last is tried on a few
tokens at the first call; a part that mixes tokens (a convolution, a router with a capacity) is run whole, as before.
Chunks change no result beyond rounding. With gradients all chunks would be kept anyway, so parts then run whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.hf.modules import attention_modules, is_transformers_model

# tokens of the first call on which a part is tried
TRIED = 4


def feed_forward_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every feed-forward part, in the order of the modules."""
    attentions = attention_modules(model)
    found = {}
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in attentions):
        # BERT's attention lies in a module of its own within the block
        for block in (holder, holder.rpartition(".")[0]):
            inside = [name for name in attentions if name.startswith(f"{block}.")]
            for name, module in model.get_submodule(block).named_children() if len(inside) == 1 else ():
                whole = f"{block}.{name}"
                holds_attention = any(other == whole or other.startswith(f"{whole}.") for other in inside)
                if not holds_attention and not is_transformers_model(module) and _linear_layers(module) > 1:
                    found[whole] = module
    return found


def _linear_layers(module: nn.Module) -> int:
    """Linear layers inside a module; experts are stacked weights of three axes."""
    count = 0
    for part in module.modules():
        own = [weight for _, weight in part.named_parameters(recurse=False)]
        count += isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
        count += 2 * any(weight.ndim == 3 for weight in own)
    return count


class FeedForwardChunks:
    """Runs the feed-forward parts of a model on `chunk` tokens at a time, until `stop`."""

    def __init__(self, model: nn.Module, chunk: int) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise InputError(f"expected mlp_chunk as a number of tokens of at least 1, got {chunk!r}")
        self._forwards = [ChunkedForward(module, chunk) for module in feed_forward_modules(model).values()]

    def start(self) -> None:
        """Replace the forward of each part."""
        for forward in self._forwards:
            forward.install()

    def stop(self) -> None:
        """Give each part its own forward back."""
        for forward in self._forwards:
            forward.remove()


class ChunkedForward:
    """The forward of one module, in chunks of tokens; a copy of the module has its plain forward."""

    def __init__(self, module: nn.Module, chunk: int) -> None:
        self.module, self.chunk = module, chunk
        # another package (accelerate) may have replaced it too
        self._before: Callable[..., Any] | None = module.__dict__.get("forward")
        self._token_wise: bool | None = None

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Restore it, unless it was replaced since."""
        if self.module.__dict__.get("forward") is not self:
            return
        del self.module.__dict__["forward"]
        if self._before is not None:
            self.module.__dict__["forward"] = self._before

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        forward = self._before or type(self.module).forward.__get__(self.module)
        hidden = args[0] if len(args) == 1 and not keywords else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or torch.is_grad_enabled():
            return forward(*args, **keywords)
        if hidden.shape[1] <= self.chunk:
            return forward(hidden)
        if self._token_wise is None:
            self._token_wise = _is_token_wise(forward, hidden[:, : 2 * TRIED].contiguous())
        if not self._token_wise:
            return forward(hidden)
        output: Tensor | None = None
        for start in range(0, hidden.shape[1], self.chunk):
            # some parts take views that only contiguous tensors have
            part = forward(hidden[:, start : start + self.chunk].contiguous())
            output = part.new_empty(*hidden.shape[:2], part.shape[2]) if output is None else output
            output[:, start : start + self.chunk] = part
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # the copy of the module is under way, and `memo` has it
        module = memo.get(id(self.module))
        return self if module is None else type(module).forward.__get__(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self.module,)


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    return type(module).forward.__get__(module)


def _is_token_wise(forward: Callable[..., Any], hidden: Tensor) -> bool:
    """Whether tokens computed apart are those computed together, and the result is one tensor (B, N, d)."""
    whole = forward(hidden)
    if not isinstance(whole, Tensor) or whole.ndim != 3 or whole.shape[:2] != hidden.shape[:2]:
        return False
    half = hidden.shape[1] // 2
    parts = torch.cat([forward(part.contiguous()) for part in (hidden[:, :half], hidden[:, half:])], 1)
    scale = whole.abs().amax().clamp(min=torch.finfo(whole.dtype).tiny)
    return bool(((parts - whole).abs().amax() / scale) <= 64 * torch.finfo(whole.dtype).eps)
