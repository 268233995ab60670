"""What each approximator promises of its own: convergence, exact cases, refusals, learned projections, large inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from approximators import assert_same, error, make
from torch import Tensor

import longlens
from longlens import CosFormer, Linear, Linformer, Nystrom, Performer, Scatterbrain, Taylor
from longlens.errors import MethodError, UnsupportedError
from longlens.models.linformer import LinformerProjections
from longlens.ops.approximate.blocks import recompute
from longlens.ops.approximate.linear import phi
from longlens.ops.approximate.nystrom import pseudo_inverse
from longlens.ops.approximate.performer import orthogonal_features
from longlens.ops.approximate.taylor import feature_count, products
from longlens.ops.inputs import Inputs
from longlens.ops.reference import softmax_attention


def softmax(inputs: Inputs) -> Tensor:
    return softmax_attention(inputs)[0]


def square(length: int, size: float, **options: int) -> Inputs:
    """One head of width 64."""
    return make(length, batch=1, heads=4, kv_heads=4, width=64, value_width=64, size=size, **options)


# linear


def test_elu_feature_keeps_its_precision_far_below_zero() -> None:
    x = torch.tensor([-60.0, -20.0, 0.0, 3.0], requires_grad=True)
    torch.testing.assert_close(phi(x).double(), torch.where(x > 0, x + 1, x.exp()).double(), rtol=2e-7, atol=0)
    torch.testing.assert_close(torch.autograd.grad(phi(x).sum(), x)[0], torch.where(x > 0, 1, x.exp()))


def test_linear_default_scale_is_the_papers() -> None:
    inputs = make(50, heads=2, kv_heads=2)
    weights = (torch.nn.functional.elu(inputs.query) + 1) @ (torch.nn.functional.elu(inputs.key) + 1).mT
    expected = weights @ inputs.value / weights.sum(-1, keepdim=True)
    assert_same(Linear().attend(inputs).output, expected)


# performer


def test_projection_is_orthogonal_and_fixed_by_its_seed() -> None:
    w = orthogonal_features(100, 16, seed=4)
    assert w.shape == (100, 16)
    unit = w / w.norm(dim=1, keepdim=True)
    for block in unit.split(16):
        assert_same(block @ block.mT, torch.eye(len(block), dtype=torch.float64), 1e-12)
    # lengths are those of Gaussian rows, chi with 16 degrees of freedom
    assert 3.6 < orthogonal_features(4096, 16, seed=4).norm(dim=1).mean() < 4.2
    torch.manual_seed(1)
    orthogonal_features.cache_clear()
    assert torch.equal(orthogonal_features(100, 16, seed=4), w)
    assert not torch.equal(orthogonal_features(100, 16, seed=5), w)


@pytest.mark.parametrize("causal", [False, True])
def test_performer_converges_for_small_norms(causal: bool) -> None:
    inputs = replace(square(512, 0.25), causal=causal)
    errors = [error(Performer(features).attend(inputs).output, softmax(inputs)) for features in (64, 256, 1024, 4096)]
    # about one over the root of the number of features
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] > 3.3 * errors[3]
    assert errors[3] < 0.03


@pytest.mark.parametrize("seed", [0, 1])
def test_projection_is_independent_of_inputs_drawn_with_its_seed(seed: int) -> None:
    torch.manual_seed(seed)
    inputs = square(1024, 0.5)
    found = error(Performer(4096, seed).attend(inputs).output, softmax(inputs))
    assert found < 1.5 * error(Performer(4096, seed + 1).attend(inputs).output, softmax(inputs))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_performer_of_large_inputs_stays_what_it_is_in_float64(causal: bool, size: float) -> None:
    inputs = replace(square(300, size), causal=causal)
    narrow = replace(inputs, query=inputs.query.float(), key=inputs.key.float(), value=inputs.value.float())
    wide = replace(inputs, query=narrow.query.double(), key=narrow.key.double(), value=narrow.value.double())
    found, expected = Performer(64).attend(narrow).output, Performer(64).attend(wide).output
    assert found.isfinite().all()
    # exponents of the order of size^2 / 8 x 64 carry rounding of that size
    assert error(found, expected) < 1e-6 * (1 + size**2 / 8 * 64)


def test_underflow_is_met_with_float64_in_that_row_alone() -> None:
    inputs = make(3, batch=1, heads=1, kv_heads=1, width=16, dtype=torch.float32, causal=True)
    query, key = inputs.query * 0.1, inputs.key * 0.1
    query[:, :, 1], key[:, :, :2] = 50 * inputs.query[:, :, 0], -50 * inputs.query[:, :, 0].unsqueeze(2)
    method = Performer(32)
    far = replace(inputs, query=query, key=key)
    # both of its keys are the same and so must be the weights, however small
    assert_same(method.attend(far).output[0, 0, 1], inputs.value[0, 0, :2].mean(0), 1e-4)
    milder = query.clone()
    milder[:, :, 1] = 0
    other = method.attend(replace(far, query=milder)).output
    assert torch.equal(method.attend(far).output[:, :, ::2], other[:, :, ::2])


@pytest.mark.parametrize("arguments", [{"features": 0}, {"features": 2.5}, {"seed": -1}, {"kernel": "gelu"}])
def test_performer_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(MethodError, match="performer: expected"):
        Performer(**arguments)  # type: ignore[arg-type]


# cosformer


def test_cosformer_refuses_a_leaking_or_short_horizon() -> None:
    q = torch.randn(1, 2, 40, 8)
    with pytest.raises(UnsupportedError, match="horizon=64"):
        longlens.attention(q, q, q, is_causal=True, method=CosFormer())
    with pytest.raises(UnsupportedError, match="40 keys do not fit in horizon 39"):
        longlens.attention(q, q, q, method=CosFormer(39))
    with pytest.raises(UnsupportedError, match="scale 0"):
        longlens.attention(q, q, q, method=CosFormer(), scale=0.0)
    bounds = torch.tensor([0, 30, 40], dtype=torch.int32)
    longlens.attention(q, q, q, is_causal=True, method=CosFormer(30), cu_seqlens=bounds)
    with pytest.raises(MethodError):
        CosFormer(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lengths", "causal", "place", "rows"),
    [
        # one key, one step from the first query, at a horizon of 1
        ((2, 1), False, 0, [0]),
        # the only key with a positive entry is the last one, and queries before the first stand at M from it
        ((90, 40), False, 39, range(50)),
        # queries after the last key stand at M from the first
        ((90, 40), False, 0, range(40, 90)),
        ((90, 40), True, 0, range(40, 90)),
    ],
)
def test_cosformer_rows_without_weight_are_exactly_zero(lengths, causal, place, rows, dtype) -> None:
    inputs = make(*lengths, dtype=dtype, causal=causal)
    after = place == 0 and lengths != (2, 1)
    key = torch.full_like(inputs.key, -1.0)
    key[:, :, place] = inputs.key[:, :, place].abs()
    query = inputs.query.abs()
    leaves = [tensor.requires_grad_() for tensor in (query, key, inputs.value)]
    inputs = replace(inputs, query=query, key=key, offset=0 if after else inputs.offset)
    method = CosFormer(40 if causal else None)
    output = method.attend(inputs).output
    lost = torch.zeros(lengths[0], dtype=torch.bool)
    lost[list(rows)] = True
    assert torch.equal(output[:, :, lost], torch.zeros_like(output[:, :, lost]))
    assert (output[:, :, ~lost] != 0).all()
    assert_same(output, method.reference(inputs), 1e-5 if dtype == torch.float32 else 1e-11)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert gradient.isfinite().all()


def test_cosformer_weights_are_never_negative_in_float32() -> None:
    inputs = make(400, 90, dtype=torch.float32)
    eye = torch.eye(90).expand(2, 2, 90, 90)
    assert CosFormer().attend(replace(inputs, value=eye)).output.min() >= 0


def test_cosformer_weights_are_not_negative_and_ignore_the_size_of_the_scale() -> None:
    inputs = make(400, 90)
    inputs = replace(inputs, value=torch.eye(90, dtype=torch.float64).expand(2, 2, 90, 90))
    weights = CosFormer().attend(inputs).output
    assert weights.min() > -1e-15
    assert_same(CosFormer().attend(replace(inputs, scale=7.0)).output, weights)


# taylor


def test_taylor_features_are_the_expansion() -> None:
    q, k = torch.randn(2, 5, 19, dtype=torch.float64)
    found = products(q, 0.3, 0.3**2 / 2) @ products(k, 1.0, 1.0).mT
    scores = 0.3 * q @ k.mT
    assert found.shape == (5, 5)
    assert products(q, 1.0, 1.0).shape[-1] == feature_count(19)
    assert_same(found, 1 + scores + scores**2 / 2)


def test_taylor_error_falls_with_the_cube_of_the_scores() -> None:
    errors = [error(Taylor().attend(i).output, softmax(i)) for i in (square(300, 0.5), square(300, 0.25))]
    # the scores of the second are a quarter, their third powers a sixty-fourth
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 30


# nystrom


@pytest.mark.parametrize("lengths", [(64, 64), (10, 300), (300, 20), (1, 1)])
def test_nystrom_with_enough_landmarks_is_exact(lengths: tuple[int, int]) -> None:
    inputs = make(*lengths)
    assert_same(Nystrom(64).attend(inputs).output, softmax(inputs))


def test_nystrom_converges_with_landmarks() -> None:
    walk = torch.randn(1, 4, 512, 16, dtype=torch.float64).cumsum(2) / 10
    inputs = make(512, batch=1, kv_heads=4, width=16, value_width=16)
    inputs = replace(inputs, query=walk, key=walk, value=walk)
    errors = [error(Nystrom(m, 20).attend(inputs).output, softmax(inputs)) for m in (4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_pseudo_inverse() -> None:
    matrix = torch.softmax(torch.randn(3, 2, 12, 12, dtype=torch.float64) * 2, -1)
    assert_same(pseudo_inverse(matrix, 30), torch.linalg.pinv(matrix), 1e-8)
    # each matrix by itself
    assert torch.equal(pseudo_inverse(matrix, 6)[1], pseudo_inverse(matrix[1:2], 6)[0])


# linformer


@pytest.mark.parametrize("keys", [1, 40, 64])
def test_linformer_with_enough_rank_is_exact(keys: int) -> None:
    inputs = make(50, keys)
    assert_same(Linformer(64).attend(inputs).output, softmax(inputs))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_linformer_projections_train(heads: int | None, shared: bool) -> None:
    module = LinformerProjections(120, 16, heads, shared).double()
    assert len(list(module.parameters())) == 2 - shared
    inputs = make(100, grad=True)
    method = module.method()
    output, expected = method.attend(inputs).output, method.reference(inputs)
    assert_same(output, expected)
    weights = torch.randn_like(output)
    grads = torch.autograd.grad((output * weights).sum(), list(module.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(module.parameters()))
    for grad, want in zip(grads, wanted, strict=True):
        assert_same(grad, want, 1e-10)
        # columns beyond the keys are not used
        assert not grad[..., 100:].any()


def test_linformer_refuses_what_its_projections_do_not_fit() -> None:
    module = LinformerProjections(100, 16, heads=2)
    q = torch.randn(1, 2, 101, 8)
    with pytest.raises(UnsupportedError, match="101 keys"):
        longlens.attention(q, q, q, method=module.method())
    one = q[:, :1, :50]
    with pytest.raises(UnsupportedError, match="1 key heads"):
        longlens.attention(one, one, one, method=module.method())
    keep = torch.arange(101).unsqueeze(0) > 0
    assert longlens.attention(q, q, q, method=module.method(), key_mask=keep).shape == q.shape
    with pytest.raises(MethodError, match="shape"):
        Linformer(16, torch.zeros(15, 100))
    with pytest.raises(MethodError, match="beside"):
        Linformer(16, None, torch.zeros(16, 100))
    with pytest.raises(MethodError, match="rank <= length"):
        LinformerProjections(100, 101)


def test_linformer_is_equal_where_it_holds_the_same_tensors() -> None:
    e, f = torch.zeros(2, 16, 100)
    assert Linformer(16) == Linformer(16) != Linformer(17)
    assert Linformer(16, e) == Linformer(16, e) != Linformer(16, f)
    assert hash(Linformer(16, e, f)) == hash(Linformer(16, e, f))
    assert longlens.parse_method("linformer:16") == Linformer(16)


# scatterbrain


@pytest.mark.parametrize("causal", [False, True])
def test_scatterbrain_is_exact_where_the_window_holds_everything(causal: bool) -> None:
    inputs = make(200, 150, causal=causal)
    assert_same(Scatterbrain(200, 16).attend(inputs).output, softmax(inputs))


@pytest.mark.parametrize("causal", [False, True])
def test_scatterbrain_without_a_window_keeps_the_own_pair_exact(causal: bool) -> None:
    inputs = make(200, causal=causal)
    assert_same(Scatterbrain(0, 16).attend(inputs).output, Scatterbrain(0, 16).reference(inputs))


def test_scatterbrain_beats_its_parts() -> None:
    # sines of position make near tokens alike, so that they hold most weight; distant ones hold the rest
    at = torch.arange(1024, dtype=torch.float64)
    angles = at.unsqueeze(1) / torch.tensor([16.0, 32.0, 64.0, 128.0])
    place = torch.cat([angles.cos(), angles.sin()], -1).expand(1, 4, 1024, 8)
    tokens = torch.cat([place, 0.3 * torch.randn(1, 4, 1024, 8, dtype=torch.float64)], -1)
    inputs = make(1024, batch=1, kv_heads=4, width=16, value_width=16)
    inputs = replace(inputs, query=tokens, key=tokens, scale=1.0)
    near = (at.unsqueeze(1) - at).abs() <= 64
    scores = (tokens @ tokens.mT).masked_fill(~near, -torch.inf)
    exact = softmax(inputs)
    found = error(Scatterbrain(64, 256).attend(inputs).output, exact)
    assert found < error(Performer(256).attend(inputs).output, exact)
    assert found < error(torch.softmax(scores, -1) @ inputs.value, exact)


# all


@pytest.mark.parametrize(
    "text",
    ["linear", "performer:128,kernel=relu", "cosformer:512", "taylor", "nystrom:32,iterations=8", "linformer:64",
     "scatterbrain:64,features=128,seed=2"],
)  # fmt: skip
def test_string_forms(text: str) -> None:
    method = longlens.parse_method(text)
    assert longlens.parse_method(str(method)) == method


def test_recomputation_gives_second_derivatives_and_drops_intermediates() -> None:
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return (x @ x).exp().sum(-1)

    assert torch.autograd.gradgradcheck(lambda x: recompute(function, x), (x,))
    calls.clear()
    recompute(function, x).sum().backward()
    assert len(calls) == 2
