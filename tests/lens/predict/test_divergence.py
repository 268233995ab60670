"""The divergence of two models' predictions, against dense log-softmaxes in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longlens.errors import InputError
from longlens.lens.predict.divergence import divergence
from longlens.lens.predict.vocabulary import Head
from longlens.testing import peak_growths


def dense(hidden, head):
    return head(hidden).double().log_softmax(-1)


@pytest.mark.parametrize("block", [None, 7, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_that_of_the_dense_log_softmax(block, dtype):
    hidden_p, hidden_q = torch.randn(11, 8, dtype=dtype), torch.randn(11, 5, dtype=dtype)
    head_p = Head(3 * torch.randn(30, 8, dtype=dtype), torch.randn(30, dtype=dtype), softcap=9.0)
    head_q = Head(torch.randn(30, 5, dtype=dtype), transform=lambda hidden: 2 * hidden)
    targets = torch.randint(0, 30, (11,))
    found = divergence(hidden_p, head_p, hidden_q, head_q, targets, chunk=4, block=block)
    p, q = dense(hidden_p, head_p), dense(hidden_q, head_q)
    close = {"atol": 1e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    rows = torch.arange(11)
    assert torch.allclose(found.kl_pq, (p.exp() * (p - q)).sum(-1), **close)
    assert torch.allclose(found.kl_qp, (q.exp() * (q - p)).sum(-1), **close)
    assert torch.allclose(found.surprise_p, -p[rows, targets], **close)
    assert torch.allclose(found.surprise_q, -q[rows, targets], **close)
    assert torch.allclose(found.entropy_p, -(p.exp() * p).sum(-1), **close)
    assert torch.allclose(found.entropy_q, -(q.exp() * q).sum(-1), **close)
    assert torch.equal(found.agree, p.argmax(-1) == q.argmax(-1))


def test_a_model_does_not_diverge_from_itself_nor_from_one_that_adds_a_constant():
    hidden, weight = torch.randn(6, 4), 5 * torch.randn(20, 4)
    targets = torch.zeros(6, dtype=torch.int64)
    same = divergence(hidden, Head(weight), hidden, Head(weight), targets, block=3)
    assert same.kl_pq.tolist() == same.kl_qp.tolist() == [0.0] * 6
    assert same.agree.all()
    shifted = Head(weight, torch.full((20,), 3.0))
    assert float(divergence(hidden, Head(weight), hidden, shifted, targets).kl_pq.amax()) < 1e-5


def test_large_logits_and_sure_predictions():
    hidden = torch.eye(3)
    head_p, head_q = Head(torch.tensor([[900.0, 0, 0], [0, 5e3, 0]])), Head(torch.tensor([[0.0, 0, 2], [900, 0, 1]]))
    found = divergence(hidden, head_p, hidden, head_q, torch.tensor([0, 1, -100]), block=1)
    p, q = dense(hidden, head_p), dense(hidden, head_q)
    expected = torch.nan_to_num(p.exp() * (p - q)).sum(-1)
    assert torch.allclose(found.kl_pq, expected, atol=1e-3)
    assert found.surprise_p[:2].tolist() == [0.0, 0.0]
    assert found.surprise_p[2].isnan()


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize(
    ("of_p", "of_q", "infinite"),
    [
        ([1.0, 2.0, 0.0, 1.0], [-torch.inf, 2.0, 1.0, 1.0], (True, False)),
        ([0.0, -torch.inf, 1.0, 3.0], [1.0, 0.0, -torch.inf, 3.0], (True, True)),
        ([-torch.inf, 1.0, 2.0, 0.0], [-torch.inf, 2.0, 1.0, 0.0], (False, False)),
        # the other's probability is 0 in float64 too
        ([1.0, 2.0, -900.0, 0.0], [2.0, 2.0, -torch.inf, 0.0], (False, False)),
    ],
)
def test_it_is_infinite_where_the_other_model_excludes_a_token_that_this_one_does_not(of_p, of_q, infinite, block):
    hidden = torch.zeros(1, 2, dtype=torch.float64)
    head_p, head_q = (Head(hidden.expand(4, 2), torch.tensor(of, dtype=torch.float64)) for of in (of_p, of_q))
    found = divergence(hidden, head_p, hidden, head_q, torch.tensor([-100]), block=block)
    p, q = dense(hidden, head_p), dense(hidden, head_q)
    for kl, one, other, is_infinite in ((found.kl_pq, p, q, infinite[0]), (found.kl_qp, q, p, infinite[1])):
        assert torch.allclose(kl, torch.where(one.exp() > 0, one.exp() * (one - other), 0.0).sum(-1), rtol=1e-12)
        assert bool(kl.isinf()) is is_infinite


def test_what_does_not_fit_is_refused():
    hidden, targets = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    head = Head(torch.randn(9, 4))
    with pytest.raises(InputError, match="one vocabulary, got 9 and 8"):
        divergence(hidden, head, hidden, Head(torch.randn(8, 4)), targets)
    with pytest.raises(InputError, match="as many rows"):
        divergence(hidden, head, hidden[:2], head, targets)
    assert len(divergence(hidden[:0], head, hidden[:0], head, targets[:0]).kl_pq) == 0


@pytest.mark.memory
def test_no_matrix_of_tokens_by_vocabulary_is_held_by_either_model():
    here = str(Path(__file__).parent)
    cases = [{"tokens": 1024}, {"tokens": 2048}]
    one, two = peak_growths("divergence_pass:divergence_pass", cases, path=[here], warm_up={"tokens": 64}, runs=1)
    print(f"1,024 tokens {one / 2**20:.1f} MiB, 2,048 tokens {two / 2**20:.1f} MiB")
    # the logits of one model grow by 256 MiB
    assert two - one < 2**25
    assert two < 2048 * 65_536 * 4
