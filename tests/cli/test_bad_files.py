"""Every command that takes a file refuses one that is missing, a folder, empty, cut off or of other bytes: an error of
longlens or of the command line, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import random
import shutil

import click
import pytest
from click.testing import CliRunner
from transformers import EsmConfig, EsmForMaskedLM

import text_models
from esm_peer import esm, save
from longlens.cli.main import cli
from longlens.errors import CheckpointError, LonglensError
from longlens.models.families.saprot import TOKENS

# None: there is no such file; "folder": an empty one
KINDS = {
    "missing": None, "folder": "folder", "empty": b"", "bytes": bytes(range(256)) * 20, "zeros": b"\0" * 500,
    "latin-1": ">a\nMK\xe9T\nid,sequence\n".encode("latin-1"), "cut": gzip.compress(b">a\nMKTAYIAK\n" * 500)[:60],
    "half": b"PAR1" + b"\0\1" * 40,
}  # fmt: skip
# the command with "@" for the file, and its name
COMMANDS = {
    "embed": ("embed @ -o out -m m", "p.fasta"),
    "embed gz": ("embed @ -o out -m m", "p.fasta.gz"),
    "embed, structures": ("embed ok.fasta -o out -m saprot --structures @", "s.cif"),
    "embed, letters": ("embed ok.fasta -o out -m saprot --structures @", "s.fasta"),
    "embed, model": ("embed ok.fasta -o out -m @", "x.pt"),
    "embed, ESM-C": ("embed ok.fasta -o out -m @", "x.pth"),
    "plan": ("plan @ -m m", "p.fasta"),
    "score": ("score @ --fasta one.fasta -o out.csv -m m", "v.csv"),
    "score, fasta": ("score v.csv --fasta @ -o out.csv -m m", "p.fasta"),
    "score, assay": ("score --proteingym @ -o out -m m", "a.csv"),
    "score, reference": ("score --proteingym gym --reference @ -o out -m m", "r.csv"),
    "contacts": ("contacts @ -o out -m m", "p.fasta"),
    "contacts, head": ("contacts ok.fasta -o out -m m --head @", "h.safetensors"),
    "fit": ("contacts fit @ -o out.safetensors -m m", "s.cif"),
    "fit, PDB": ("contacts fit @ -o out.safetensors -m m", "s.pdb"),
    "fit, pairs": ("contacts fit @ --fasta ok.fasta -o out.safetensors -m m", "c.csv"),
    "fit, fasta": ("contacts fit c.csv --fasta @ -o out.safetensors -m m", "p.fasta"),
    "evaluate": ("contacts evaluate @ s.pdb", "x.rr"),
    "evaluate, structure": ("contacts evaluate x.rr @", "s2.cif"),
    "look": ("look @ -o out -m m --no-figures", "p.fasta"),
    "look, text": ("look @ -o out -m g --no-figures --input text", "t.txt"),
    "surprise": ("surprise @ -m g -o out.csv", "t.txt"),
    "compare": ("compare-models g g @ -o out.csv", "t.txt"),
    "context": ("context @ -m m -o out --no-figures", "p.fasta"),
    "context, text": ("context @ -m g -o out --no-figures --input text", "t.txt"),
    "context, spans": ("context ok.fasta -m m -o out --no-figures --spans @", "s.bed"),
    "finetune": ("finetune @ --task sequence_to_value -o out -m m", "t.csv"),
    "finetune, Parquet": ("finetune @ --task sequence_to_value -o out -m m", "t.parquet"),
    "finetune, FASTA": ("finetune @ --task sequence_to_value -o out -m m", "t.fasta"),
    "finetune, labels": ("finetune ok.fasta --task residue_to_class --labels @ -o out -m m", "l.csv"),
    "finetune, clusters": ("finetune t.csv --task sequence_to_value --clusters @ -o out -m m", "c.tsv"),
    "predict, head": ("predict ok.fasta --model @ -o out.csv", "h"),
    "paint": ("paint @ --values v2.csv -o out.cif", "s.cif"),
    "paint, values": ("paint s.pdb --values @ -o out.cif", "v.csv"),
    "paint, Parquet": ("paint s.pdb --values @ -o out.cif", "v.parquet"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    save(esm(1, 32, 4), path / "m")
    text_models.gpt2_folder(path / "g")
    config = EsmConfig(
        vocab_size=len(TOKENS), mask_token_id=4, pad_token_id=1, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=64, token_dropout=True, position_embedding_type="rotary",
        emb_layer_norm_before=False,
    )  # fmt: skip
    save(EsmForMaskedLM(config), path / "saprot")
    (path / "saprot" / "vocab.txt").write_text("\n".join(TOKENS))
    draw = random.Random(0)
    rows = [f"p{n},{''.join(draw.choices('ACDEFGHIKLMNPQRSTVWY', k=20))},{draw.random()}" for n in range(30)]
    atom = "ATOM      {0}  CA  ALA A  1{0}     {1:7.3f}   0.000   0.000  1.00 50.00           C\n"
    files = {
        "ok.fasta": ">a\nMKTAYIAKQRQISFVKSHFSRQ\n>b\nGAVLIPFMKT\n", "one.fasta": ">a\nMKTAYIAKQRQISFVKSHFSRQ\n",
        "v.csv": "mutant\nM1A\n", "c.csv": "id,i,j\na,1,9\n", "v2.csv": "residue,surprise\nA,1\nA,2\nA,3\n",
        "x.rr": "PFRMAT RR\nTARGET a\n1 9 0 8 0.5\n", "s.pdb": "".join(atom.format(n, 3.8 * n) for n in (1, 2, 3)),
        "t.csv": "\n".join(["id,sequence,target", *rows]) + "\n",
    }  # fmt: skip
    for name, text in files.items():
        (path / name).write_text(text)
    (path / "gym").mkdir()
    (path / "gym" / "A.csv").write_text("mutant,DMS_score\nM1A,0.5\n")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_file_is_refused(command, kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    line, name = COMMANDS[command]
    content, bad = KINDS[kind], folder / f"bad-{kind}-{name}"
    if content == "folder":
        bad.mkdir(exist_ok=True)
    elif content is not None:
        bad.write_bytes(content)
    before = {path.name for path in folder.iterdir()}
    words = [bad.name if word == "@" else word for word in line.split()]
    result = CliRunner().invoke(cli, words, standalone_mode=False)
    assert isinstance(result.exception, LonglensError | click.ClickException), repr(result.exception)
    said = str(result.exception) or result.exception.format_message()
    # a message names the file, and says what was expected or what to do; click's own says what is wrong with a path
    assert bad.name in said or "expected a structure of each protein" in said, said
    assert any(words in said for words in ("expected", "fetch the file again", "does not exist", "is a directory")), (
        said
    )
    assert {path.name for path in folder.iterdir()} == before


TEXT_COMMANDS = {
    "look": "look t.txt -o out -m @ --no-figures --input text", "surprise": "surprise t.txt -m @ -o out.csv",
    "compare": "compare-models g @ t.txt -o out.csv", "context": "context t.txt -m @ -o out --no-figures --input text",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cut", "empty", "bytes", "empty pickle", "pickle of bytes", "configuration"])
@pytest.mark.parametrize("command", TEXT_COMMANDS)
def test_a_damaged_model_of_text_is_refused(command, kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "t.txt").write_text("The fox sleeps, and the dog watches it.\n")
    bad = folder / f"bad {kind}".replace(" ", "-")
    shutil.copytree(folder / "g", bad, dirs_exist_ok=True)
    weights = bad / "model.safetensors"
    if kind == "configuration":
        settings = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**settings, "n_head": "two"}))
    elif "pickle" in kind:
        weights.unlink(missing_ok=True)
        (bad / "pytorch_model.bin").write_bytes(KINDS["empty" if "empty" in kind else "bytes"])
    else:
        weights.write_bytes({"cut": (folder / "g" / weights.name).read_bytes()[:-100]}.get(kind, KINDS.get(kind)))
    before = {path.name for path in folder.iterdir()}
    result = CliRunner().invoke(cli, TEXT_COMMANDS[command].replace("@", bad.name).split(), standalone_mode=False)
    assert isinstance(result.exception, CheckpointError), repr(result.exception)
    assert bad.name in str(result.exception)
    assert "expected" in str(result.exception)
    assert "weights_only" not in str(result.exception)
    assert {path.name for path in folder.iterdir()} == before
