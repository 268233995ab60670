"""The effect of hiding keys to first order, against the dense formulas in float64."""

import pytest
import torch

from longlens.errors import InputError, UnsupportedError
from longlens.lens.deletion import LEAST, DeletionSums
from longlens.ops.observe import AttentionCall
from longlens.ops.sparse.window import Window

# one that takes nearly all of the mass, and one that takes hardly any
SINKS = torch.tensor([1.0, 9.0, -30.0, 4.0], dtype=torch.float64)
SPANS = [(0, 5), (3, 9), (100, 101), (20, 120), (0, 150)]


def _call(dtype=torch.float64, tokens=150, heads=4, groups=1, **settings):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 8), *[(2, heads // groups, tokens, 8)] * 2, (2, heads, tokens, 8)]
    query, key, value, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    if settings.get("is_causal"):
        allowed = allowed.tril()
    if "attn_mask" in settings:
        q = torch.arange(tokens)
        allowed = allowed & settings["attn_mask"].allowed(q[:, None], q[None], tokens)
    wide_key, wide_value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = 0.4 * query @ wide_key.transpose(2, 3)
    if "softcap" in settings:
        scores = settings["softcap"] * torch.tanh(scores / settings["softcap"])
    scores = scores.masked_fill(~allowed, -torch.inf)
    if "sinks" in settings:
        # the last key is the sink, whose value is 0
        sink = settings["sinks"].view(-1, 1, 1).expand(2, -1, tokens, 1)
        scores = torch.cat([scores, sink], 3)
        wide_value = torch.nn.functional.pad(wide_value, (0, 0, 0, 1))
    output = scores.softmax(-1) @ wide_value
    call = AttentionCall(
        0, "layer", query, key, value, output, {"scale": 0.4, "method": "exact", **settings}, output_gradient=gradient
    )
    return call, scores, wide_value


def _dense(scores, value, gradient, output, span, reader, kept):
    """d(S) of one batch row by its definition: the softmax over the keys that are left."""
    hidden = torch.zeros(scores.shape[-1], dtype=torch.bool)
    hidden[slice(*span)] = True
    if kept >= 0:
        hidden[kept] = False
    left = (scores.softmax(-1) * ~hidden).sum(-1)
    without = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    change = (gradient * (without - output)).sum(-1)
    rows = torch.ones(scores.shape[-2], dtype=torch.bool)
    rows[slice(*span)] = False
    rows[reader] = True
    return torch.where((left < LEAST) | ~rows, 0.0, change).sum()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"is_causal": True}, {"is_causal": True, "groups": 2}, {"attn_mask": Window(40)}, {"softcap": 1.5},
        {"sinks": SINKS}, {"sinks": SINKS, "softcap": 1.5, "is_causal": True, "groups": 2},
    ],
    ids=str,
)  # fmt: skip
def test_sums_equal_the_dense_definition(settings):
    call, scores, value = _call(**settings)
    readers, kept = [4, 50], [4, -1]
    sums = DeletionSums(2, 150, SPANS, readers, kept)
    sums.add(call)
    weights = scores.softmax(-1)
    per_pair = weights * (
        (call.output_gradient * call.output).sum(-1, keepdim=True) - call.output_gradient @ value.transpose(2, 3)
    )
    torch.testing.assert_close(sums.keys, per_pair.sum((1, 2))[:, :150], rtol=1e-10, atol=1e-10)
    expected = [
        [
            _dense(scores[row], value[row], call.output_gradient[row], call.output[row], span, readers[row], kept[row])
            for span in SPANS
        ]
        for row in range(2)
    ]
    torch.testing.assert_close(sums.of_spans, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_keys_are_minus_the_derivative_by_a_bias_of_the_key():
    call, scores, value = _call()
    bias = torch.zeros(2, 150, dtype=torch.float64, requires_grad=True)
    output = (scores + bias[:, None, None]).softmax(-1) @ value
    (output * call.output_gradient).sum().backward()
    sums = DeletionSums(2, 150, [], [0, 0])
    sums.add(call)
    torch.testing.assert_close(sums.keys, -bias.grad, rtol=1e-10, atol=1e-10)


def test_float32_is_as_near_as_its_rounding():
    double, _, _ = _call()
    sums, small = (DeletionSums(2, 150, SPANS, [4, 50]) for _ in range(2))
    sums.add(double)
    single, _, _ = _call()
    tensors = {name: getattr(single, name).float() for name in ("query", "key", "value", "output", "output_gradient")}
    small.add(AttentionCall(0, "layer", settings=single.settings, **tensors))
    torch.testing.assert_close(small.keys, sums.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.of_spans, sums.of_spans, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_summed_is_refused():
    call, _, _ = _call()
    with pytest.raises(InputError, match="none of them empty"):
        DeletionSums(2, 150, [(5, 5)], [0, 0])
    with pytest.raises(InputError, match=r"0\.\.150"):
        DeletionSums(2, 150, [(5, 151)], [0, 0])
    with pytest.raises(InputError, match="output_gradient"):
        DeletionSums(2, 150, SPANS, [0, 0]).add(AttentionCall(0, "x", call.query, call.key, call.value, call.output))
    window = AttentionCall(
        0, "x", call.query, call.key, call.value, call.output, {"method": "window:8"}, output_gradient=call.query
    )
    with pytest.raises(UnsupportedError, match="exact attention, got method 'window:8'"):
        DeletionSums(2, 150, SPANS, [0, 0]).add(window)
