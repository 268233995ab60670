"""Build a model from a checkpoint: every tensor is accounted for and converted to the wanted dtype, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from longlens.errors import CheckpointError
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.tensors import FLOATS
from longlens.models.config import EncoderConfig
from longlens.models.families.written import WrittenForm
from longlens.models.language_model import MaskedLM
from longlens.models.parts.positions import RotaryPositions
from longlens.models.rotary import Rotary

# a message lists at most this many faulty tensors
_LISTED = 12


def build(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> MaskedLM:
    """The model, its parameters in `dtype` on `device`, frozen.

    Beside the model, memory holds one tensor of the checkpoint at a time and `tensors.REMAP` bytes. Raises
    `CheckpointError` for tensors that are missing, extra, of another shape or not floating-point numbers.
    """
    _refuse_other_sizes(checkpoint)
    _refuse_untied(checkpoint)
    names, config, infos = checkpoint.names, checkpoint.config, checkpoint.tensors.infos
    head = {source for sources in names.head_table().values() for source in sources}
    predicts = checkpoint.predicts or not head.isdisjoint(infos)
    contacts = names.contact is not None and f"{names.contact}.weight" in infos
    with torch.device("meta"):
        model = MaskedLM(config, checkpoint.alphabet, contacts=contacts, predicts=predicts)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # a format's names are of all parts that it may have; the model has those of its configuration
    table = {
        ours: sources
        for ours, sources in names.table(config, predicts=predicts, contacts=contacts).items()
        if ours in shapes
    }
    _refuse_other_tensors(checkpoint, table, shapes)
    state = {name: _assemble(checkpoint, sources, shapes[name], dtype, device) for name, sources in table.items()}
    if names.token_type is not None and names.token_type in infos:
        # every token is of type 0, so the vector of type 0 is added to every position
        (positions,) = table["encoder.position.weight"]
        first = checkpoint.tensors.read(names.token_type)[0].float()
        whole = checkpoint.tensors.read(positions).float() + first
        state["encoder.position.weight"] = whole.to(device=device, dtype=dtype)
    if config.rotary:
        state["encoder.rotary.frequencies"] = _frequencies(checkpoint).to(device)
    model.load_state_dict(state, strict=True, assign=True)
    model.source = checkpoint.source
    if checkpoint.files:
        model.written = WrittenForm(names, config, checkpoint.tensors.originals, _contents(checkpoint.files))
    return model.eval().requires_grad_(False)


def _contents(files: Iterable[Path]) -> dict[str, bytes]:
    """Files by name."""
    try:
        return {path.name: path.read_bytes() for path in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: expected a file of a model, it cannot be read ({error})") from None


def _assemble(
    checkpoint: Checkpoint, sources: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor of the model from the tensors of the checkpoint that are stacked in it."""
    whole = torch.empty(shape, dtype=dtype, device=device)
    for source, rows in zip(sources, whole.chunk(len(sources)), strict=True):
        tensor = checkpoint.tensors.read(source)
        if checkpoint.names.reorder is not None:
            tensor = checkpoint.names.reorder(source, tensor, checkpoint.config)
        rows.copy_(tensor)
    return whole


def _refuse_other_sizes(checkpoint: Checkpoint) -> None:
    """Compare the configuration with the files before allocating anything of the sizes that it gives."""
    config, infos = checkpoint.config, checkpoint.tensors.infos
    embedding = infos.get(checkpoint.names.embedding)
    if embedding is None:
        shown = ", ".join(sorted(infos)[:5])
        raise CheckpointError(
            f"{checkpoint.source}: missing {checkpoint.names.embedding}, got {len(infos)} tensors: {shown}, ...; are "
            "these the weights of this configuration?"
        )
    if embedding.shape != (config.vocabulary, config.width):
        raise CheckpointError(
            f"{checkpoint.source}: {checkpoint.names.embedding} of shape {embedding.shape}, expected "
            f"{(config.vocabulary, config.width)} as the configuration says"
        )
    if config.layers > len(infos):
        raise CheckpointError(
            f"{checkpoint.source}: expected {config.layers:,} layers as the configuration says, got {len(infos)} "
            "tensors in all"
        )


def _refuse_untied(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.tensors
    for copy, original in checkpoint.names.tied:
        if copy not in tensors.infos or original not in tensors.infos:
            continue
        if tensors.infos[copy] != tensors.infos[original] or not torch.equal(
            tensors.read(copy), tensors.read(original)
        ):
            raise CheckpointError(f"{checkpoint.source}: expected {copy} to equal {original} (tied), got other values")


def _refuse_other_tensors(
    checkpoint: Checkpoint, table: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]
) -> None:
    names, config, infos = checkpoint.names, checkpoint.config, checkpoint.tensors.infos
    expected: dict[str, tuple[int, ...]] = {}
    for ours, sources in table.items():
        whole = shapes[ours]
        expected |= dict.fromkeys(sources, (whole[0] // len(sources), *whole[1:]))
    if names.token_type is not None and names.token_type in infos:
        types = infos[names.token_type].shape
        expected[names.token_type] = (max(1, types[0]) if types else 1, config.width)
    if config.rotary:
        frequencies = [name for name in names.frequency_names(config) if name in infos]
        for name in frequencies:
            expected[name] = (config.head_width // 2,)
    problems = [f"missing {name}" for name in expected if name not in infos]
    for name, shape in expected.items():
        info = infos.get(name)
        if info is not None and info.shape != shape:
            problems.append(f"{name} of shape {info.shape}, expected {shape}")
        elif info is not None and info.dtype not in FLOATS:
            problems.append(f"{name} of dtype {info.dtype}, expected one of {', '.join(FLOATS)}")
    listed = {*expected, *(copy for copy, _ in names.tied)}
    # no name begins with a zero
    ignored = names.ignored or ("\0",)
    problems += [f"extra {name}" for name in infos if name not in listed and not name.startswith(ignored)]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{checkpoint.source}: expected the tensors of {_described(config)}: {'; '.join(problems[:_LISTED])}{more}"
        )


def _described(config: EncoderConfig) -> str:
    return (
        f"an encoder of {config.layers} layers, {config.heads} heads, width {config.width}, feed-forward width "
        f"{config.feed_forward} and {config.vocabulary} tokens"
    )


def _frequencies(checkpoint: Checkpoint) -> Tensor:
    """The checkpoint's rotary frequencies, float32; those of the formula if it has none."""
    tensors = checkpoint.tensors
    names = [name for name in checkpoint.names.frequency_names(checkpoint.config) if name in tensors.infos]
    if not names:
        positions = checkpoint.config.positions
        assert isinstance(positions, RotaryPositions)
        return Rotary(checkpoint.config.head_width, positions.base).frequencies
    first = tensors.read(names[0]).clone()
    for name in names[1:]:
        if not torch.equal(tensors.read(name), first):
            raise CheckpointError(
                f"{checkpoint.source}: expected the same rotary frequencies in every layer, {name} differs"
            )
    return first.float()
