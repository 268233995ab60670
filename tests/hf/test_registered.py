"""`attn_implementation="longlens"`: the same results, by every way in which transformers takes a name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as tf

import longlens.hf
from longlens.errors import UnsupportedError
from longlens.hf import registered

BUILD = {name: tiny.ALL[name] for name in ("gpt2", "llama", "mistral", "gemma2", "gpt_oss", "esm", "bert", "t5")}


@pytest.fixture
def calls(monkeypatch):
    """How often longlens' attention ran."""
    found = []
    read = registered.read_arguments
    monkeypatch.setattr(registered, "read_arguments", lambda *args: found.append(1) or read(*args))
    return found


def eager_and_ours(build):
    model = tiny.eager(build)
    other = copy.deepcopy(model)
    other.set_attn_implementation("longlens")
    return model, other


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", list(BUILD))
def test_the_name_computes_what_eager_attention_does(name, side, calls):
    model, other = eager_and_ours(BUILD[name])
    ids, mask = tiny.tokens(), tiny.padding(side)
    with torch.no_grad():
        expected, got = tiny.run(model, ids, mask), tiny.run(other, ids, mask)
    assert calls
    keep = mask.bool()
    assert torch.allclose(got[keep], expected[keep], atol=2e-5 * float(expected.abs().amax()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_same_tokens(name, cache, calls):
    model, other = eager_and_ours(BUILD[name])
    ids, mask = tiny.tokens(2, 11), tiny.padding("left", 2, 11)
    keywords = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
                "cache_implementation": cache}  # fmt: skip
    expected, got = (each.generate(ids, **keywords) for each in (model, other))
    assert calls
    assert torch.equal(expected, got)


@pytest.mark.parametrize("name", ["gpt2", "llama", "esm"])
def test_from_config_and_from_pretrained_take_it_and_saved_configurations_do_not_have_it(name, tmp_path, calls):
    model, _ = eager_and_ours(BUILD[name])
    kind = tf.AutoModelForCausalLM if name != "esm" else tf.AutoModel
    fresh = kind.from_config(copy.deepcopy(model.config), attn_implementation="longlens")
    assert fresh.config._attn_implementation == "longlens"
    fresh.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "longlens" not in json.dumps(saved)
    loaded = kind.from_pretrained(tmp_path, attn_implementation="longlens").eval()
    plain = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = tiny.tokens()
    with torch.no_grad():
        expected = tiny.run(plain, ids)
        assert torch.allclose(tiny.run(loaded, ids), expected, atol=2e-5 * float(expected.abs().amax()))
    assert calls
    # without the argument, transformers' default
    assert kind.from_pretrained(tmp_path).config._attn_implementation != "longlens"


@pytest.mark.parametrize("name", ["gpt2", "llama", "esm", "bert"])
def test_weights_are_refused(name):
    _, model = eager_and_ours(BUILD[name])
    with pytest.raises(UnsupportedError, match="output_attentions=True"):
        model(input_ids=tiny.tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    # and it runs again afterwards
    model(input_ids=tiny.tokens())


def test_gradients_are_those_of_eager_attention():
    grads = []
    for model in eager_and_ours(tiny.llama):
        ids = torch.arange(4, 25)[None]
        tiny.run(model, ids).square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.allclose(*grads, atol=1e-5 * float(grads[0].abs().amax()))


def test_attach_takes_the_place_of_the_name_and_gives_it_back():
    _, model = eager_and_ours(tiny.llama)
    with longlens.hf.attach(model, "window:2"):
        assert model.config._attn_implementation != "longlens"
    assert model.config._attn_implementation == "longlens"


@pytest.mark.parametrize(
    "code",
    [
        "import longlens.hf; assert 'transformers' not in sys.modules; import transformers",
        "import transformers.modeling_utils; import longlens.hf",
        "import longlens.watching; from transformers import LlamaConfig",
    ],
)
def test_the_order_of_the_imports_does_not_matter(code):
    check = (
        "import transformers.modeling_utils as home, inspect\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'longlens' in AttentionInterface().valid_keys()\n"
        "assert 'longlens' in AttentionMaskInterface().valid_keys()\n"
        "assert 'class PreTrainedModel' in inspect.getsource(home)\n"
    )
    program = f"import sys\n{code}\n{check}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
