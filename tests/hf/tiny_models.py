"""Small transformers models with random weights, large enough that attention is far from uniform."""

from __future__ import annotations

import torch
import transformers as tf

VOCABULARY = 40
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip


def bert(**more):
    return tf.BertModel(tf.BertConfig(**{**ENCODER, **more}))


def roberta(**more):
    return tf.RobertaModel(tf.RobertaConfig(**{**ENCODER, **more}))


def esm(**more):
    given = {**ENCODER, "position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": True, **more}
    return tf.EsmModel(tf.EsmConfig(**given), add_pooling_layer=False)


def distilbert(**more):
    given = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, **more}
    return tf.DistilBertModel(tf.DistilBertConfig(initializer_range=0.3, max_position_embeddings=128, **given))


def modernbert(**more):
    given = {**ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3, **more}
    given["initializer_cutoff_factor"] = 3.0
    special = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"))
    return tf.ModernBertModel(tf.ModernBertConfig(**given, **special))


def gpt2(**more):
    given = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **more}
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0, **given)
    )


def llama(**more):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **more}))


def mistral(**more):
    return tf.MistralForCausalLM(tf.MistralConfig(**{**DECODER, "sliding_window": 8, **more}))


def gemma2(**more):
    given = {"sliding_window": 8, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**{**DECODER, **given, **more}))


def gpt_oss(**more):
    given = {"sliding_window": 8, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**{**DECODER, **given, **more}))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def t5(**more):
    given = {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0, "dropout_rate": 0.0, **more,
    }  # fmt: skip
    return tf.T5ForConditionalGeneration(tf.T5Config(**given))


ENCODERS = {f.__name__: f for f in (bert, roberta, esm, distilbert, modernbert)}
DECODERS = {f.__name__: f for f in (gpt2, llama, mistral, gemma2, gpt_oss)}
ALL = {**ENCODERS, **DECODERS, "t5": t5}


def eager(build, **more):
    """The model in evaluation mode, on transformers' own N x N attention."""
    model = build(**more).eval()
    model.set_attn_implementation("eager")
    return model


def tokens(batch=2, length=21):
    return torch.randint(4, VOCABULARY, (batch, length))


def padding(kind, batch=2, length=21):
    """A 2-D mask: the first row is padded on one side, or, for "none", no row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[0, :6] = 0
    elif kind == "right":
        mask[0, -6:] = 0
    return mask


def run(model, ids, mask=None, **more):
    """What the model computes for each token, (B, N, width); T5 gets the same ids on both sides."""
    if model.config.model_type == "t5":
        given = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return model(input_ids=ids, attention_mask=mask, **given, **more).logits
    output = model(input_ids=ids, attention_mask=mask, **more)
    return output.logits if "logits" in output else output.last_hidden_state
