"""The tensors of a checkpoint's files: first a list of them, then one at a time, so that no second copy is in memory.

Files are memory-mapped. Pages that were read count as memory of the process, so a file is mapped again after every
`REMAP` bytes.
"""

from __future__ import annotations

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longlens.errors import CheckpointError

REMAP = 2**24
# the least that a read maps: the kernel may map a large page of the file for a tensor of a few bytes
LARGE_PAGE = 2**21
FLOATS = ("float32", "float16", "bfloat16", "float64")
_SAFETENSORS_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file; `dtype` is torch's name for it if torch has one."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile(ABC):
    """The tensors of one file. Every fault of the file raises `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched = 0
        self._opened: Any = self._guarded(self._open)
        self.infos: Mapping[str, TensorInfo] = self._guarded(self._describe)

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in the dtype of the file. Drop it before the next one is read."""
        if self._touched >= REMAP:
            self.remap()
        tensor: Tensor = self._guarded(lambda: self._get(name))
        self._touched += max(LARGE_PAGE, tensor.numel() * tensor.element_size())
        return tensor

    @property
    def touched(self) -> int:
        """Bytes that were read since the file was mapped."""
        return self._touched

    def remap(self) -> None:
        """Map the file again, which releases the pages that were read."""
        if self._touched and self._is_mapped():
            self._opened, self._touched = None, 0
            self._opened = self._guarded(self._open)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (CheckpointError, MemoryError):
            raise
        except FileNotFoundError:
            raise CheckpointError(f"expected a file of weights at {self.path}, found none") from None
        except Exception as error:
            # a broken file may make the readers raise exceptions of any type
            raise CheckpointError(f"{self.path}: {_reason(error)}") from error

    @abstractmethod
    def _open(self) -> Any:
        """The file's handle."""

    @abstractmethod
    def _describe(self) -> dict[str, TensorInfo]:
        """All tensors of the opened file."""

    @abstractmethod
    def _get(self, name: str) -> Tensor:
        """One tensor of the opened file."""

    @abstractmethod
    def _is_mapped(self) -> bool:
        """Whether opening the file again is cheap and releases memory."""


class SafetensorsFile(TensorFile):
    """A `.safetensors` file."""

    def _open(self) -> Any:
        return safe_open(self.path, "pt")

    def _describe(self) -> dict[str, TensorInfo]:
        infos = {}
        for name in self._opened.keys():  # noqa: SIM118 (a handle is no dictionary)
            part = self._opened.get_slice(name)
            code = part.get_dtype()
            infos[name] = TensorInfo(tuple(part.get_shape()), _SAFETENSORS_FLOATS.get(code, code))
        return infos

    def _get(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)

    def _is_mapped(self) -> bool:
        return True


class TorchFile(TensorFile):
    """A file written by `torch.save`: `.bin` or `.pt`. No code in it is run: only plain values and tensors are read.

    `select` takes the dictionary of tensors out of the file's content. Files from before PyTorch 1.6 cannot be
    memory-mapped and are read into memory whole.
    """

    def __init__(self, path: Path, select: Callable[[Any], Any] = lambda content: content) -> None:
        self._select = select
        super().__init__(path)

    def _open(self) -> Any:
        return self._select(read_torch(self.path))

    def _describe(self) -> dict[str, TensorInfo]:
        if not isinstance(self._opened, Mapping):
            raise CheckpointError(
                f"{self.path}: expected a dictionary of tensors, got {type(self._opened).__name__}; save a model's "
                "state_dict()"
            )
        infos = {}
        for name, tensor in self._opened.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{self.path}: expected a dictionary of tensors, got {name!r}: {type(tensor).__name__}"
                )
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise CheckpointError(
                    f"{self.path}: expected ordinary tensors, got {name} (layout {tensor.layout}, device "
                    f"{tensor.device}, quantised: {tensor.is_quantized})"
                )
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise CheckpointError(
                    f"{self.path}: {name} of shape {tuple(tensor.shape)} has {tensor.untyped_storage().nbytes()} bytes "
                    "in the file, fewer than its values need; save it with .contiguous()"
                )
            infos[name] = TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return infos

    def _get(self, name: str) -> Tensor:
        return self._opened[name].detach()

    def _is_mapped(self) -> bool:
        return _is_zip(self.path)


class CheckpointTensors:
    """The tensors of all files of a checkpoint, by name. `rename` gives the name of each, or None: left out.

    Raises `CheckpointError` if two tensors have the same name.
    """

    def __init__(self, files: Iterable[TensorFile], rename: Callable[[str], str | None] = str) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._files = list(files)
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for file in self._files:
            for original, info in file.infos.items():
                name = rename(original)
                if name is None:
                    continue
                if name in self._places:
                    other, before = self._places[name]
                    raise CheckpointError(
                        f"expected each tensor once, got {before} in {other.path} and {original} in {file.path}"
                    )
                self.infos[name] = info
                self._places[name] = file, original

    @property
    def originals(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name and shape in the files of every tensor."""
        return {name: (original, self.infos[name].shape) for name, (_, original) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU. Drop it before the next one is read."""
        file, original = self._places[name]
        if sum(other.touched for other in self._files) >= REMAP:
            # a checkpoint of many shards holds no more than one of a single file
            for other in self._files:
                other.remap()
        return file.read(original)


def read_torch(path: Path) -> Any:
    """The content of a file of `torch.save`: values and tensors, mapped where the format allows it."""
    # a Namespace holds plain values; everything else that could run code is refused
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))


def read_torch_values(path: Path) -> Any:
    """`read_torch`, where every fault of the file raises `CheckpointError`."""
    try:
        return read_torch(path)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == _ZIP


def _reason(error: Exception) -> str:
    """One line that says what is wrong with a file, from torch's longer message."""
    message = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"expected tensors and plain values, got {refused[1]}; Weights only load failed, because code in a file of "
            "weights is not run: save the model's state_dict() in a file of its own"
        )
    fault = re.search(r"WeightsUnpickler error: (.*)", message)
    first = fault[1] if fault else (message.strip().splitlines() or [type(error).__name__])[0]
    shown = f" ({first})" if first else ""
    return f"expected a file of weights, got one that is cut off or of another kind{shown}; fetch it again"
