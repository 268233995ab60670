"""String forms from strangers: refused at once, in our words, and in a message that can be read."""

from __future__ import annotations

import pytest
import torch

import longlens as ll
from longlens.errors import MethodError
from longlens.ops.registry import parse_method

HOSTILE = {
    "deep": "global:" + "(" * 90_000,
    "deep and closed": "global:" + "(" * 5_000 + "0" + ",)" * 5_000,
    "signs": "window:" + "-" * 90_000 + "1",
    "sums": "window:" + "1+" * 40_000 + "1",
    "digits": "window:" + "9" * 4_000,
    "more digits than Python reads": "window:" + "9" * 5_000,
    "beyond 64 bits": "window:9223372036854775808",
    "a token beyond 64 bits": "global:(9223372036854775808,)",
    "a seed beyond 64 bits": "random:1,64,seed=9223372036854775808",
    "a million rounds": "lsh:1000000",
    "letters": "window:" + "x" * 90_000,
    "a name": "x" * 90_000,
    "parameters": "window:" + ",".join(["1"] * 40_000),
    "a parameter's name": "window:" + "x" * 90_000 + "=1",
    "a million letters": "window:(" + "0," * 500_000 + ")",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_a_short_method_error(text):
    with pytest.raises(MethodError) as raised:
        parse_method(text)
    assert len(str(raised.value)) < 400


def test_a_long_layout_is_still_read():
    layout = tuple((block, block + 1) for block in range(500))
    method = ll.BlockSparse(layout, 16)
    assert parse_method(str(method)) == method


def test_a_million_global_blocks_are_as_many_as_there_are():
    query = torch.randn(1, 1, 40, 4)
    assert len(ll.BigBird(8, 1, 10**6).everywhere(40)) == 40
    want = ll.attention(query, query, query)
    torch.testing.assert_close(ll.attention(query, query, query, method="bigbird:8,1,1000000"), want)
