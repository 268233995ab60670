"""Loading takes the memory of the weights in their final dtype, not of a second copy or of the file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from esm_peer import esm, save
from longlens.models.checkpoints.tensors import REMAP, SafetensorsFile
from longlens.testing import peak_growths

WIDTH, LAYERS = 1024, 4
# a layer's tensors lie in different shards, so that all are read alternately
SHARDS = 7
# what Python, torch and the files' headers take
SLACK = 8 * 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same 200 MB of float32, as safetensors and as torch writes them, whole and in shards; and their values."""
    root = tmp_path_factory.mktemp("large")
    small = save(esm(LAYERS, 32, 4), root / "small")
    packed, pickled = root / "safetensors", root / "bin"
    config = (small / "config.json").read_text().replace('"hidden_size": 32', f'"hidden_size": {WIDTH}')
    config = config.replace('"intermediate_size": 128', f'"intermediate_size": {4 * WIDTH}')
    for folder in (packed, pickled):
        folder.mkdir()
        (folder / "config.json").write_text(config)

    def grown(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("inv_freq"):
            return torch.ones(WIDTH // 8)
        if "contact_head" in name or name == "lm_head.bias":
            return tensor
        return torch.zeros([{32: WIDTH, 128: 4 * WIDTH}.get(size, size) for size in tensor.shape])

    tensors = {name: grown(name, tensor) for name, tensor in load_file(small / "model.safetensors").items()}
    save_file(tensors, packed / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    shards, bins = root / "shards", root / "bin-shards"
    names = sorted(tensors)
    for folder, ending, write in (
        (shards, "safetensors", save_file), (bins, "bin", lambda held, path: torch.save(held, path)),
    ):  # fmt: skip
        folder.mkdir()
        (folder / "config.json").write_text(config)
        index = {}
        for number in range(SHARDS):
            held, file = names[number::SHARDS], f"part-{number}.{ending}"
            write({name: tensors[name] for name in held}, folder / file)
            index |= dict.fromkeys(held, file)
        stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
    written = {"safetensors": packed, "bin": pickled, "shards": shards, "bin-shards": bins}
    return written, sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.memory
@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards", "bin-shards"])
def test_the_peak_is_the_weights_and_one_tensor(folders, kind):
    paths, values = folders
    sizes = {"float32": 4, "bfloat16": 2}
    cases = [{"folder": str(paths[kind]), "dtype": dtype} for dtype in sizes]
    warm_up = {"folder": str(paths[kind].parent / "small"), "dtype": "bfloat16"}
    here = str(Path(__file__).parent)
    peaks = peak_growths("load_pass:load_pass", cases, path=[here], warm_up=warm_up, runs=1)
    largest = 4 * WIDTH * 4 * WIDTH
    for peak, size in zip(peaks, sizes.values(), strict=True):
        # a mapping is given back once more than REMAP of it was read
        assert values * size <= peak <= values * size + REMAP + largest + SLACK


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="RSS is counted in another way")
def test_small_tensors_among_large_ones_do_not_map_the_file(tmp_path):
    """The kernel may map 2 MiB of the file for a bias of a few bytes; a model of 650M parameters has 300 of them."""
    path = tmp_path / "model.safetensors"
    save_file({f"{number:03}": torch.zeros(2**19) for number in range(64)}, path)
    with path.open("rb") as written:
        # out of the page cache, so that reading ahead fills it by large pages
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = SafetensorsFile(path)
    file.read("000")
    before, most = mapped_bytes(), 0
    for number in range(64):
        # a few values of each tensor, as if it were a bias
        with mock.patch.object(file, "_get", lambda name: file._opened.get_tensor(name)[:4]):
            file.read(f"{number:03}").clone()
        most = max(most, mapped_bytes() - before)
    assert most <= REMAP + SLACK


def mapped_bytes() -> int:
    """File pages in this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024
