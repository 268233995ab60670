"""The logit lens on transformers models: each layer through the model's norm and head, the last as the model says."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import DECODER, ENCODER, VOCABULARY, bert, gemma2, gpt2, llama, mistral, padding, tokens

import longlens
from longlens.errors import InputError, LensError, UnsupportedError
from longlens.watching import trajectories

ESM = {**ENCODER, "position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": True}
MODELS = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**ENCODER)),
    "xlm_roberta": lambda: tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**ENCODER)),
    "esm": lambda: tf.EsmForMaskedLM(tf.EsmConfig(**ESM)),
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    # capped where it shows
    "gemma2": lambda: gemma2(final_logit_softcapping=3.0),
}


def build(name):
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        # biases and norms start as zeros and ones, which would hide one that is left out
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def norm_and_head(name, model):
    """The model's own modules, written out for each family."""
    if name == "bert":
        return (lambda x: x), model.cls
    if name in ("roberta", "xlm_roberta"):
        return (lambda x: x), model.lm_head
    if name == "esm":
        return model.esm.encoder.emb_layer_norm_after, model.lm_head
    if name == "gpt2":
        return model.transformer.ln_f, model.lm_head
    if name == "gemma2":
        return model.model.norm, lambda x: 3.0 * torch.tanh(model.lm_head(x) / 3.0)
    return model.model.norm, model.lm_head


def streams(name, model, inputs):
    """`hidden_states` of transformers; its last one is normed already in models that have a last norm."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        norm, head = norm_and_head(name, model)
        logits = [head(norm(hidden)) for hidden in output.hidden_states[:-1]]
    return [*logits, output.logits]


def dense(logits, targets):
    log_p = torch.log_softmax(logits.double(), -1)
    return -log_p.gather(1, targets.unsqueeze(1)).squeeze(1), torch.special.entr(log_p.exp()).sum(-1)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_each_layer_goes_through_the_models_norm_and_head(name, side):
    model, ids, mask = build(name), tokens(), padding(side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    targets = torch.randint(VOCABULARY, ids.shape)
    path = trajectories(model, inputs, targets, top=2, chunk=11)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    expected = streams(name, model, inputs)
    assert list(path) == list(range(len(expected)))
    keep = mask.bool()
    assert torch.equal(path[0].places, keep.nonzero())
    for layer, logits in enumerate(expected):
        surprise, entropy = dense(logits[keep], targets[keep])
        torch.testing.assert_close(path[layer].surprise.double(), surprise, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(path[layer].entropy.double(), entropy, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        path[len(expected) - 1].top_log_probability, torch.log_softmax(expected[-1][keep], -1).topk(2).values
    )


def test_a_model_that_is_attached_gives_the_same():
    model, inputs = build("llama"), {"input_ids": tokens(), "attention_mask": padding("left")}
    alone = trajectories(model, inputs)
    with longlens.hf.attach(model):
        attached = trajectories(model, inputs, layers=[1, -1])
    assert list(attached) == [1, 2]
    torch.testing.assert_close(attached[1].entropy, alone[1].entropy, rtol=1e-4, atol=1e-5)


def test_targets_may_be_shifted_with_none_at_the_end():
    model, ids = build("gpt2"), tokens()
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    path = trajectories(model, {"input_ids": ids}, targets)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(path[2].surprise.nanmean(), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "said"),
    [
        (bert, {"input_ids": tokens()}, UnsupportedError, "expected one of .*GPT2LMHeadModel.*, got BertModel"),
        (gpt2, tokens(), InputError, "expected a mapping"),
        (gpt2, {"input_ids": tokens(), "labels": tokens()}, InputError, "give targets="),
        (gpt2, {"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 21, 21)}, InputError, r"\(2, 1, 21, 21\)"),
    ],
)
def test_what_is_not_served_is_named(model, inputs, error, said):
    with pytest.raises(error, match=said):
        trajectories(model(), inputs)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"targets \(2, 21\) as input_ids, got \(42,\)"):
        trajectories(gpt2(), {"input_ids": tokens()}, torch.zeros(42, dtype=torch.int64))


class Doubled(tf.LlamaForCausalLM):
    """Another head than its class says."""

    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        output.logits = output.logits * 2
        return output


def test_a_head_that_is_not_the_models_own_is_noticed():
    model = Doubled(tf.LlamaConfig(**DECODER)).eval()
    with pytest.raises(LensError, match="Doubled: expected the norm and head to give the model's own output"):
        trajectories(model, {"input_ids": tokens()})
    assert all(not module._forward_hooks for module in model.modules())


class OtherNorm(tf.EsmForMaskedLM):
    """Its last vectors are not those after the norm."""

    def __init__(self, config):
        super().__init__(config)
        self.esm.register_forward_hook(self.shift)

    @staticmethod
    def shift(module, args, output):
        output.last_hidden_state = output.last_hidden_state + 1
        return output


def test_a_norm_that_is_not_the_models_own_is_noticed():
    model = OtherNorm(tf.EsmConfig(**ESM)).eval()
    with pytest.raises(LensError, match="OtherNorm: expected the norm and head"):
        trajectories(model, {"input_ids": tokens()})
