"""Counts what code asks of PyTorch: operators, by which launches on a GPU go, and the memory of tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operators that only look at memory, and launch nothing
VIEWS = {
    "view", "_unsafe_view", "slice", "select", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "as_strided", "alias", "detach", "unbind", "empty", "new_empty", "empty_like", "_reshape_alias",
    "unfold", "narrow", "diagonal", "is_same_size", "set_",
}  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """`calls`: operators other than views; `peak`: the most bytes at a time of memory that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs or {})) if not tensor.is_meta}
        answer = function(*args, **(kwargs or {}))
        self.calls += function.overloadpacket.__name__ not in VIEWS
        for tensor in _tensors(answer):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._add(storage)
        return answer

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)

        def freed() -> None:
            self._known.discard(key)
            self._now -= size

        weakref.finalize(storage, freed)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
