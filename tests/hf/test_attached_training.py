"""PEFT, gradient checkpointing and transformers' Trainer on attached models: the same gradients, and the loss falls."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers as tf
from tiny_models import ENCODER

import longlens.hf

# PEFT and transformers name gradient checkpointing by what its next version calls activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PROTEINS = torch.randint(4, 40, (6, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROTEINS)
MASK[1, 17:] = 0
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


def classifier():
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tf.EsmConfig(**ENCODER, **no_dropout, position_embedding_type="rotary", mask_token_id=3, num_labels=2)
    return tf.EsmForSequenceClassification(config)


def adapted(model):
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value"], lora_dropout=0.0,
                               modules_to_save=["classifier"])  # fmt: skip
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            # so that every adapter has a gradient
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return wrapped


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def gradients(model):
    model.train()
    loss = model(input_ids=PROTEINS, attention_mask=MASK, labels=LABELS).loss
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_are_those_of_the_model_alone(checkpointing):
    plain, attached = adapted(classifier()), adapted(classifier())
    if checkpointing:
        plain, attached = checkpointed(plain), checkpointed(attached)
    expected_loss, expected = gradients(plain)
    with longlens.hf.attach(attached):
        loss, found = gradients(attached)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(found) == set(expected)
    # A and B of three projections in two layers, and the head
    assert sum("lora_" in name for name in found) == 12
    for name, value in found.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_falls_with_adapters_checkpointing_and_attachment():
    model = checkpointed(adapted(classifier())).train()
    frozen = copy.deepcopy({name: value for name, value in model.named_parameters() if not value.requires_grad})
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=5e-3)
    losses = []
    with longlens.hf.attach(model):
        for _ in range(15):
            loss = model(input_ids=PROTEINS, attention_mask=MASK, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        assert (merged(input_ids=PROTEINS, attention_mask=MASK).logits.argmax(1) == LABELS).all()


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, number):
        place = number % 6
        return {"input_ids": PROTEINS[place], "attention_mask": MASK[place], "labels": LABELS[place]}


def trained(folder, *, attach):
    model = adapted(classifier())
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=6, learning_rate=5e-3, report_to=[], seed=0,
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = tf.Trainer(model=model, args=arguments, train_dataset=Examples())
    with warnings.catch_warnings():
        # of accelerate and transformers themselves
        warnings.simplefilter("ignore")
        if attach:
            with longlens.hf.attach(model):
                trainer.train()
        else:
            trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_runs_an_attached_model_to_the_same_losses(tmp_path):
    expected = trained(tmp_path / "plain", attach=False)
    found = trained(tmp_path / "attached", attach=True)
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found[-1] < 0.8 * found[0]
