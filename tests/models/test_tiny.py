"""The model inside the package: what its card says, in so far as a test can see it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import longlens
from longlens.io.alphabet import clean_protein
from longlens.io.fasta import read_fasta
from longlens.models.pretrained import TINY
from longlens.training.objective import held_out_perplexity

EXAMPLES = Path(__file__).parents[2] / "examples" / "proteins.fasta.gz"


def test_it_is_small_and_complete():
    model = longlens.load("tiny")
    assert model.source == "tiny"
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 20e6
    # nothing was fitted to structures
    assert model.contact_head is None
    assert (TINY / "README.md").is_file()


def test_it_beats_counting_on_real_proteins():
    model = longlens.load("tiny")
    proteins = [clean_protein(record.sequence).sequence for record in read_fasta(EXAMPLES)][:30]
    packed = model.pack(proteins)
    perplexity = held_out_perplexity(model, [packed])
    counts = torch.bincount(packed.tokens, minlength=33).float()[4:24]
    shares = counts / counts.sum()
    # the best that frequencies can do, even those of these very proteins
    unigram = math.exp(-float((shares * shares.log()).sum()))
    assert perplexity < unigram
