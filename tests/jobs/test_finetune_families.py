"""Low-rank adaptation of other families than ESM-2: what was trained is written, read again, and predicts the same."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import EsmcConfig, EsmcForMaskedLM, T5EncoderModel

import longlens
import t5_peer
from family_peer import randomise
from longlens.errors import CheckpointError
from longlens.finetuning.trainer import TuneSettings

SETTINGS = TuneSettings(steps=12, every=3, tokens=300, hidden=8, rank=2, rate=3e-3)


def pairs(path: Path, count: int = 40) -> Path:
    """The target is a number of pairs of neighbours, which the composition does not tell."""
    draw, lines = random.Random(0), ["id,sequence,target"]
    for number in range(count):
        sequence = "".join(draw.choice("KADEFGLMVY") for _ in range(draw.randint(15, 25)))
        found = sum(first in "KAD" and second in "EFG" for first, second in pairwise(sequence))
        lines.append(f"p{number},{sequence},{found}")
    path.write_text("\n".join(lines) + "\n")
    return path


def prot_t5(folder: Path) -> Path:
    t5_peer.save(t5_peer.encoder("ProtT5"), folder, "ProtT5")
    return folder


def esmc(folder: Path) -> Path:
    config = EsmcConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    model = EsmcForMaskedLM(config)
    randomise(model, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::longlens.errors.LonglensWarning")
@pytest.mark.parametrize("make", [prot_t5, esmc])
def test_an_adapted_model_of_another_family_predicts_what_was_measured(make, tmp_path):
    base, output = make(tmp_path / "base"), tmp_path / "tuned"
    before = longlens.load(base, dtype="float32").state_dict()
    tuned = longlens.finetune(
        pairs(tmp_path / "c.csv"), task="sequence_to_value", method="lora", model=base, output=output,
        settings=SETTINGS, dtype="float32",
    )  # fmt: skip
    assert tuned.report["stages"]["lora"]["best_step"] > 0
    after = longlens.load(output / "model", dtype="float32").state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    layers = range(sum(name.endswith("qkv.weight") for name in after))
    assert changed == {f"encoder.layers.{i}.{part}.weight" for i in layers for part in ("qkv", "out")}
    measured = pq.read_table(output / "predictions.parquet").to_pylist()
    sequences = dict(line.split(",")[:2] for line in (tmp_path / "c.csv").read_text().splitlines())
    proteins = {row["id"]: sequences[row["id"]] for row in measured}
    predictions = longlens.predict(proteins, model=output, dtype="float32")
    for row in measured:
        assert predictions[row["id"]] == pytest.approx(row["predicted"], abs=1e-4)
    if make is prot_t5:
        assert T5EncoderModel.from_pretrained(output / "model").config.num_layers == len(layers)


def test_a_model_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    EsmcForMaskedLM(EsmcConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
                    ).save_pretrained(tmp_path / "folder")  # fmt: skip
    model = longlens.load(tmp_path / "folder")
    model.written = None
    with pytest.raises(CheckpointError, match=r"expected a model that can be written, .* give the model's folder"):
        longlens.finetune(
            pairs(tmp_path / "c.csv"), task="sequence_to_value", method="lora", model=model, output=tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()
