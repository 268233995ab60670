"""Hiding in models of longlens, against the same weights in transformers; and passes counted where they are made."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from transformers import EsmcConfig, EsmcForMaskedLM

import esm_peer
import text_models as texts
from family_peer import load_float64, randomise
from longlens.hf.documents import read_document
from longlens.hf.hiding import TextContext
from longlens.hf.language_heads import language_head
from longlens.hf.modules import attention_modules
from longlens.hf.texts import load_text_model
from longlens.jobs.context import ContextOptions, predicted_passes, target_context
from longlens.jobs.context_protein import ProteinContext
from longlens.jobs.context_regions import regular_spans

PROTEIN = "MTSENPLLALREKISALDEKLLALLAERRELAVEVGKAKL"


def _esmc():
    config = EsmcConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2)
    model = EsmcForMaskedLM(config).eval()
    randomise(model)
    return model


def _masked_by_transformers(model, tokens, target, span, mask_token):
    """-log p of the masked target by the model's eager attention, with a 4-D mask put into every layer."""
    ids = torch.from_numpy(tokens)[None].clone()
    ids[0, target] = mask_token
    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    allowed[:, slice(*span)] = False
    allowed[:, target] = True
    mask = torch.zeros(1, 1, *allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)

    def masked(module, args, keywords):
        bound = inspect.signature(module.forward).bind(*args, **keywords)
        bound.arguments["attention_mask"] = mask
        return bound.args, bound.kwargs

    hooks = [module.register_forward_pre_hook(masked, with_kwargs=True) for module in attention_modules(model).values()]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, target]
    for hook in hooks:
        hook.remove()
    return -logits.log_softmax(-1)[tokens[target]].item()


@pytest.mark.parametrize("make", [lambda: esm_peer.esm(3, 64, 4), _esmc], ids=["esm2", "esmc"])
def test_the_exact_form_is_transformers_model_with_the_stretch_masked(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    subject = ProteinContext(load_float64(tmp_path), PROTEIN)
    theirs = theirs.double()
    theirs.set_attn_implementation("eager")
    cases = [(30, (1, 9)), (30, (20, 33)), (12, (33, 34)), (12, (1, len(PROTEIN) + 1))]
    got = subject.surprise([target for target, _ in cases], [span for _, span in cases])
    mask_token = subject.model.alphabet.mask
    expected = [_masked_by_transformers(theirs, subject.tokens, *case, mask_token) for case in cases]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (np.abs(got - subject.surprise([target for target, _ in cases])) > 1e-3).all()


@pytest.mark.parametrize("make", [texts.gpt2_folder, texts.bert_folder])
def test_the_cost_of_a_text_is_what_its_model_computed(tmp_path, make):
    """Counted at the model itself: calls with their rows, and their tokens."""
    model = load_text_model(str(make(tmp_path / "model")))
    head = language_head(model.model)
    subject = TextContext(model, head, read_document(model, texts.TEXT, "text", causal=head.causal))
    counted = {"rows": 0, "tokens": 0}

    def count(module, args, keywords):
        ids = keywords["input_ids"]
        counted["rows"] += ids.shape[0]
        counted["tokens"] += ids.numel()

    hook = head.base.register_forward_pre_hook(count, with_kwargs=True)
    able = [place for place, special in enumerate(subject.special) if not special]
    spans, options, target = regular_spans(able, 6), ContextOptions(targets=("x",), exact=3, halve=1), 30
    found = target_context(subject, target, spans, options)
    hook.remove()
    # surprise, estimate, three stretches and the halves of one
    halves = sum(effect.halvings > 0 for effect in found.effects)
    assert subject.passes.forward == counted["rows"] == 2 + 3 + halves
    assert subject.passes.tokens == counted["tokens"]
    assert subject.passes.backward == 1
    most = predicted_passes(len(subject), len(able), 1, spans, options, causal=subject.causal)
    assert subject.passes.forward <= most.forward
    assert most.backward == 1
    if subject.causal:
        # the tokens before a stretch are computed once
        assert counted["tokens"] < counted["rows"] * target
