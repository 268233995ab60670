"""Parts that no family of ESM or BERT uses, in an encoder of T5's form: the bias reaches attention and the lens."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

import longlens
from longlens.errors import InputError
from longlens.io.alphabet import Alphabet
from longlens.jobs.memory import parameter_count
from longlens.lens.collect.rows import Entropy, LogSumExp
from longlens.models.encoder import EncoderConfig, Packed, pack
from longlens.models.language_model import MaskedLM
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import LearnedPositions, RelativePositions
from longlens.models.parts.projections import Projections

# residues then an end token: no start, no mask
ALPHABET = Alphabet(("<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY"), start=None, end=1, mask=None, unknown=2, pad=0)
LENGTHS = (37, 150, 1)


def t5(function: str, *, gated: bool) -> tuple[MaskedLM, T5EncoderModel]:
    """The same random encoder, ours and transformers'; heads x their width is not the width."""
    torch.manual_seed(0)
    theirs = T5EncoderModel(T5Config(
        vocab_size=len(ALPHABET), d_model=24, d_kv=10, num_heads=4, num_layers=3, d_ff=40, is_gated_act=gated,
        feed_forward_proj=f"gated-{function}" if gated else function, dropout_rate=0.0,
    )).double().eval()  # fmt: skip
    for module in theirs.modules():
        if isinstance(module, T5LayerNorm):
            # its own sums are in float32, also for float64; the formula is the same
            module.forward = partial(rms, module)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    config = EncoderConfig(
        len(ALPHABET), layers=3, width=24, heads=4, feed_forward=40, norm=Norm("rms", 1e-6),
        projections=Projections(bias=False, head_width=10, scale=1.0),
        feed=FeedForward({"gelu_new": "gelu_tanh"}.get(function, function), gated=gated, bias=False),
        positions=RelativePositions(), token_dropout=False, head=None,
    )  # fmt: skip
    ours = MaskedLM(config, ALPHABET, contacts=False).double().eval()
    named = dict(theirs.named_parameters())
    state = {"encoder.embedding.weight": named["shared.weight"]}
    state["encoder.norm.weight"] = named["encoder.final_layer_norm.weight"]
    state["encoder.relative.weight"] = named["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    for i in range(3):
        attention, feed = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        ups = ("wi_0", "wi_1") if gated else ("wi",)
        state |= {f"encoder.layers.{i}.{name}.weight": torch.cat(parts) for name, parts in {
            "attention_norm": [named[f"{attention}.layer_norm.weight"]],
            "qkv": [named[f"{attention}.SelfAttention.{part}.weight"] for part in "qkv"],
            "out": [named[f"{attention}.SelfAttention.o.weight"]],
            "feed_norm": [named[f"{feed}.layer_norm.weight"]],
            "up": [named[f"{feed}.DenseReluDense.{part}.weight"] for part in ups],
            "down": [named[f"{feed}.DenseReluDense.wo.weight"]],
        }.items()}  # fmt: skip
    ours.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
    assert parameter_count(config) - (3 * 4 + 1) == sum(parameter.numel() for parameter in ours.parameters())
    return ours, theirs


def rms(norm: T5LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def texts(generator: np.random.Generator) -> list[str]:
    return ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in LENGTHS]


@pytest.mark.parametrize(("function", "gated"), [("relu", False), ("gelu_new", True), ("silu", True)])
def test_an_encoder_of_t5s_parts_equals_transformers(function, gated):
    ours, theirs = t5(function, gated=gated)
    proteins = texts(np.random.default_rng(0))
    packed = ours.pack(proteins)
    assert (packed.cu_seqlens.diff() == torch.tensor(LENGTHS) + 1).all()
    kept = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            kept[grad] = ours(packed, keep=range(4)).layers
    for place, protein in enumerate(proteins):
        rows = slice(*packed.cu_seqlens[place : place + 2].tolist())
        wanted = theirs(packed.tokens[rows].unsqueeze(0), output_hidden_states=True).hidden_states
        for layer, states in enumerate(wanted):
            for layers in kept.values():
                torch.testing.assert_close(layers[layer][rows], states[0], rtol=1e-9, atol=1e-9)
        assert len(protein) + 1 == len(packed.tokens[rows])


def test_gradients_of_the_bias_table_equal_transformers():
    ours, theirs = t5("relu", gated=False)
    packed = ours.pack(texts(np.random.default_rng(1))[0])
    for recompute in (False, True):
        ours.encoder.recompute = recompute
        ours.zero_grad()
        ours(packed).last.pow(2).sum().backward()
        theirs.zero_grad()
        theirs(packed.tokens.unsqueeze(0)).last_hidden_state.pow(2).sum().backward()
        table = theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for mine, wanted in (
            (ours.encoder.relative.weight, table),
            (ours.encoder.embedding.weight, theirs.shared.weight),
        ):
            assert (mine.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


def test_the_lens_sees_the_biased_scores():
    """`watch` compares its weights with the model's own output, so an unseen bias would be an error."""
    ours, theirs = t5("relu", gated=False)
    packed = ours.pack(texts(np.random.default_rng(2))[1])
    with longlens.watch(ours, collect=[Entropy(), LogSumExp()]) as seen, torch.no_grad():
        ours(packed)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        weights = theirs(packed.tokens.unsqueeze(0), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        entropy = -(matrix * matrix.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer].values, entropy, rtol=1e-5, atol=1e-5)


def test_masked_copies_need_a_mask_token():
    with pytest.raises(InputError, match="a model with a mask token"):
        ALPHABET.require_mask()


def test_parts_that_do_not_exist_are_refused():
    for make, message in (
        (lambda: Norm("batch"), "a norm 'layer' or 'rms', got 'batch'"),
        (lambda: FeedForward("swish"), "a function gelu, gelu_tanh, silu, relu, got 'swish'"),
        (lambda: LearnedPositions(4, offset=4), "an offset below the 4 rows"),
        (lambda: EncoderConfig(33, 1, 12, 4, 12), "an even width of each head"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_learned_positions_with_an_offset_and_a_norm():
    config = EncoderConfig(
        len(ALPHABET), layers=1, width=16, heads=2, feed_forward=16, positions=LearnedPositions(9, 2, normed=True),
        token_dropout=False,
    )  # fmt: skip
    encoder = MaskedLM(config, ALPHABET).double().encoder
    tokens = torch.arange(7) + 3
    first = encoder(pack([tokens.numpy()]), keep=[0]).layers[0]
    wanted = encoder.position_norm(encoder.embedding.weight[tokens] + encoder.position.weight[2:9])
    torch.testing.assert_close(first, wanted)
    with pytest.raises(InputError, match="at most 7 tokens, got 8"):
        encoder(Packed(torch.arange(8), torch.tensor([0, 8])))
