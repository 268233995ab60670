"""Real trained weights: AntiBERTy's, from its package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import longlens
from esm_peer import literal
from longlens.jobs.score import position_log_probabilities

# trastuzumab's heavy and light variable domains
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"


@pytest.fixture(scope="module")
def model():
    return longlens.load("antiberty")


def test_every_layer_and_the_logits_equal_the_literal_ones(model):
    spec = importlib.util.find_spec("antiberty")
    folder = Path(spec.submodule_search_locations[0]) / "trained_models" / "AntiBERTy_md_smooth"
    said = json.loads((folder / "config.json").read_text())
    theirs = BertForMaskedLM(BertConfig(**{k: v for k, v in said.items() if k not in ("model_type", "architectures")}))
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    theirs.load_state_dict({k: v for k, v in state.items() if k in theirs.state_dict()})
    packed = model.pack([HEAVY, LIGHT])
    with torch.no_grad():
        encoded = model(packed, keep=range(9))
        logits = model.logits(encoded.last)
    for start, stop in packed.cu_seqlens.unfold(0, 2, 1).tolist():
        states, expected = literal(theirs.eval(), packed.tokens[start:stop])
        for layer, hidden in enumerate(states):
            torch.testing.assert_close(encoded.layers[layer][start:stop], hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[start:stop], expected, rtol=1e-4, atol=1e-4)


def test_it_knows_antibodies(model):
    for text, least in ((HEAVY, 0.75), (LIGHT, 0.75)):
        # every third position, since each is a pass of its own
        positions = range(0, len(text), 3)
        table = position_log_probabilities(model, text, positions, masked=True)
        truth = model.alphabet.encode(text)[1:-1][positions.start : positions.stop : positions.step]
        assert (table.argmax(1) == truth).mean() >= least
