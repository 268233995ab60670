"""Training: what is hidden, what counting predicts, and going on exactly where a run stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from esm_peer import protein
from longlens.cli.train import train as command
from longlens.errors import CheckpointError, InputError, SequenceError
from longlens.io.alphabet import ESM
from longlens.io.results import lock
from longlens.jobs.baselines import count_perplexities
from longlens.models.encoder import pack
from longlens.models.pretrained import load
from longlens.training.data import Crops, encode_files
from longlens.training.loop import TrainSettings, train
from longlens.training.objective import mask_tokens

SMALL = TrainSettings(layers=2, width=32, heads=4, steps=6, tokens=256, crop=64, warmup=2)


def proteins(count=30, most=150):
    return [ESM.encode(protein(20 + 7 * i % most, i)).astype(np.int16) for i in range(count)]


def run(folder, settings=SMALL, **keywords):
    return train(settings, proteins(), proteins(3), folder, lambda progress: None, every=3, **keywords)[0]


def test_masking_hides_fifteen_percent_as_bert_does():
    packed = pack([ESM.encode(protein(200, i)) for i in range(100)])
    masked = mask_tokens(packed, ESM, torch.Generator().manual_seed(0))
    standard = torch.isin(packed.tokens, torch.from_numpy(ESM.standard))
    assert standard[masked.places].all()
    assert torch.equal(packed.tokens[masked.places], masked.truth)
    share = len(masked.places) / int(standard.sum())
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / int(standard.sum()))
    now = masked.packed.tokens[masked.places]
    kinds = torch.stack([now == ESM.mask, (now != ESM.mask) & (now != masked.truth), now == masked.truth]).float()
    # a random residue is the same one time in twenty
    expected = torch.tensor([0.8, 0.1 * 0.95, 0.1 + 0.1 * 0.05])
    assert ((kinds.mean(1) - expected).abs() < 4 * (expected * (1 - expected) / len(now)).sqrt()).all()
    others = torch.ones(len(packed.tokens), dtype=torch.bool)
    others[masked.places] = False
    assert torch.equal(masked.packed.tokens[others], packed.tokens[others])


def test_measuring_masks_all_that_it_asks_about():
    packed = pack([ESM.encode(protein(200, i)) for i in range(10)])
    masked = mask_tokens(packed, ESM, torch.Generator().manual_seed(0), all_masked=True)
    assert (masked.packed.tokens[masked.places] == ESM.mask).all()
    assert int((masked.packed.tokens == ESM.mask).sum()) == len(masked.places)


def test_masking_keeps_the_chains_of_a_complex():
    packed = pack([ESM.encode(protein(50, 1))])
    chains = torch.tensor([0, 20, 52], dtype=torch.int32)
    masked = mask_tokens(packed._replace(chains=chains), ESM, torch.Generator().manual_seed(0))
    assert masked.packed.chains is chains
    assert masked.packed.cu_seqlens is packed.cu_seqlens


@pytest.mark.parametrize("joined", [False, True])
def test_crops_are_stretches_of_proteins_and_every_protein_comes_by(joined):
    source = proteins()
    text = "|".join(ESM.decode(tokens) for tokens in source)
    crops = Crops(source, 64, 256, seed=3, joined=joined)
    seen = 0
    for _ in range(40):
        packed = crops.next_step()
        lengths = packed.cu_seqlens.diff()
        assert int(lengths.max()) <= 64
        assert int(lengths.sum()) >= (256 if joined else 250)
        seen += int((packed.tokens == ESM.start).sum())
        if not joined:
            for a, b in pairwise(packed.cu_seqlens.tolist()):
                assert ESM.decode(packed.tokens[a:b].numpy()) in text
        else:
            assert lengths.tolist() == [64] * 4
    assert crops.epoch >= 1
    assert seen > 30


@pytest.mark.parametrize("joined", [False, True])
def test_the_stream_goes_on_where_its_state_was_taken(joined):
    one, two = (Crops(proteins(), 64, 256, seed=3, joined=joined) for _ in range(2))
    for _ in range(17):
        one.next_step()
    two.load_state_dict(one.state_dict())
    for _ in range(17):
        assert torch.equal(one.next_step().tokens, two.next_step().tokens)


def test_counting_by_hand():
    train_on = [ESM.encode("AAAG").astype(np.int16)]
    held_out = [ESM.encode("AG").astype(np.int16)]
    found = count_perplexities(train_on, held_out, ESM)
    # pairs counted: (start, A), (A, A) twice, (A, G); every row has one more for each of 20 residues
    rows = len(ESM)
    single = {"A": (3 + rows) / (4 + 20 * rows), "G": (1 + rows) / (4 + 20 * rows)}
    assert found["unigram"] == pytest.approx(math.exp(-(math.log(single["A"]) + math.log(single["G"])) / 2))
    pairs = math.log((1 + 1) / (1 + 20)) + math.log((1 + 1) / (3 + 20))
    assert found["bigram"] == pytest.approx(math.exp(-pairs / 2))


@pytest.mark.parametrize("method", ["exact", "performer:16"])
def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path, method):
    settings = replace(SMALL, method=method)
    whole = run(tmp_path / "whole", settings)
    steps = []
    run(tmp_path / "parts", settings, stop=lambda: steps.append(1) or len(steps) == 2)
    assert not (tmp_path / "parts" / "checkpoint.pt.half").exists()
    again = run(tmp_path / "parts", settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    last = [log[-1]["held_out"] for log in logs]
    assert last[0] == last[1]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        run(tmp_path, replace(SMALL, seed=1))


@pytest.mark.parametrize("stopped", [2, 5, None])
def test_more_steps_in_the_same_folder_give_what_they_give_from_the_beginning(tmp_path, stopped):
    longer, notes, seen = replace(SMALL, steps=12), [], []
    run(tmp_path / "parts", stop=lambda: seen.append(1) or len(seen) == stopped)
    again = run(tmp_path / "parts", longer, note=notes.append)
    # the learning rate of 6 steps begins to fall after the third
    assert len(notes) == (stopped != 2)
    whole = run(tmp_path / "whole", longer)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    steps = [[line["step"] for line in log] for log in logs]
    assert steps[0] == [3, 6, 9, 12]
    assert [step for step in steps[1] if step != 2] == steps[0]
    assert logs[0][-1]["held_out"] == logs[1][-1]["held_out"]


def test_fewer_steps_than_a_run_has_settled_on_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"a run of 6 steps that has reached step 6, past the point .*step 2"):
        run(tmp_path, replace(SMALL, steps=4))


def test_training_learns(tmp_path):
    reports = []
    # one residue follows from its neighbours: a pattern that counting pairs predicts too
    cycle = [ESM.encode(("ACDEFGHIKL" * 20)[i : i + 120]).astype(np.int16) for i in range(10)]
    settings = TrainSettings(layers=2, width=64, heads=4, steps=150, tokens=512, crop=128, warmup=5, dtype="float32")
    train(settings, cycle, cycle[:2], tmp_path, reports.append, every=150)
    assert reports[-1].held_out < 2


def test_the_command_writes_a_model_that_loads(tmp_path):
    for name, count in (("train", 20), ("held", 3)):
        (tmp_path / f"{name}.fasta").write_text("".join(f">{i}\n{protein(50, i)}\n" for i in range(count)))
    arguments = [tmp_path / "train.fasta", "--held-out", tmp_path / "held.fasta", "-o", tmp_path / "run", "--layers", 2,
                 "--width", 32, "--heads", 4, "--steps", 4, "--tokens", 128, "--crop", 64, "--every", 2]  # fmt: skip
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert "step 4: loss" in result.output
    assert "bigram" in result.output
    model = load(tmp_path / "run" / "model")
    assert model(model.pack(["MKT"])).last.shape == (5, 32)


def test_no_proteins_is_an_error(tmp_path):
    (tmp_path / "none.fasta").write_text("")
    with pytest.raises(SequenceError, match="found none"):
        encode_files([tmp_path / "none.fasta"], ESM)


def test_a_checkpoint_that_is_cut_or_foreign_is_refused(tmp_path):
    run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[: len(whole) // 2], b"text"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="expected a checkpoint of longlens train, got a broken one"):
            run(tmp_path / "run")
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="got another file"):
        run(tmp_path / "run")


def test_a_folder_that_is_a_file_or_in_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file: cannot be written"):
        run(tmp_path / "file")
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run" / ".lock", tmp_path / "run"), pytest.raises(InputError, match="no other process uses"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("width", 0, "width"),
        ("heads", 0, "width"),
        ("tokens", 0, "tokens"),
        ("crop", 2, "crop"),
        ("rate", -1.0, "rate"),
        ("warmup", -1, "warmup"),
    ],
)
def test_settings_that_cannot_be(setting, value, named):
    with pytest.raises(InputError, match=f"got {named} = "):
        replace(SMALL, **{setting: value})
