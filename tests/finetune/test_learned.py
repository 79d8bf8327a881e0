"""Logits are computed where a token is learned, and the loss is that of all of them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, xLSTMConfig, xLSTMForCausalLM

from QEfficient.finetune.batches import Collator, Rows
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import IGNORED, Example
from QEfficient.finetune.learned import chooses_logits, learned_only
from QEfficient.finetune.train import train
from tests.tiny import SHAPE, STYLES, lora, make_base, make_peft

EXAMPLES = [
    Example([1, 5, 6, 7, 8, 9, 2], [IGNORED] * 4 + [8, 9, 2]),
    Example([1, 5, 2], [IGNORED, IGNORED, 2]),
    Example([1, 9, 8, 7, 2], [1, 9, 8, 7, 2]),
]


def batch_of(*, packed: bool) -> dict[str, torch.Tensor]:
    """Return two rows, the first of two examples if packed."""
    rows = [[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2]]] if packed else [[EXAMPLES[0]], [EXAMPLES[2]]]
    batch = Collator(0, packed=packed)(rows)
    if packed:
        del batch["attention_mask"]
    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("style", sorted(STYLES))
def test_loss_and_gradients_are_those_of_all_logits(style: str, packed: bool) -> None:
    """Masked prompts, padding and packed rows; every parameter of the adapter."""
    model = make_peft(make_base(style))
    batch, found = batch_of(packed=packed), {}
    for name, values in (("all", batch), ("learned", learned_only(batch))):
        model.zero_grad()
        outputs = model(**values, num_items_in_batch=torch.tensor(7))
        outputs.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[name] = (outputs.loss.detach(), outputs.logits.shape, gradients)
    assert found["learned"][1] == (3 + 1 + 4 if packed else 3 + 4, found["all"][1][-1])
    torch.testing.assert_close(found["learned"][0], found["all"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["learned"][2], found["all"][2], rtol=1e-4, atol=1e-6)
    assert found["learned"][2]


def test_a_batch_without_learned_tokens_is_left_as_it_is() -> None:
    """Rows that only fill a step up."""
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.full((1, 2), IGNORED)}
    assert learned_only(batch) is batch


@pytest.mark.parametrize(("style", "packed"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", True)])
def test_architectures_that_choose(style: str, packed: bool) -> None:
    """The trial says so and leaves the model training."""
    model = make_peft(make_base(style)).train()
    assert chooses_logits(model, Rows(EXAMPLES, 1, context_length=16 if packed else 0), Collator(0, packed=packed))
    assert model.training


def test_experts_choose() -> None:
    """A loss that balances experts is added to that of the tokens."""
    shape = {**SHAPE, "num_local_experts": 4, "output_router_logits": True}
    base = GraniteMoeForCausalLM(GraniteMoeConfig(**shape))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert chooses_logits(model, Rows(EXAMPLES, 1), Collator(0))


def test_methods_and_architectures_that_do_not() -> None:
    """Virtual tokens are in front of the labels; a base may know nothing of it."""
    rows = Rows(EXAMPLES, 1)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not chooses_logits(get_peft_model(make_base("llama"), prompts), rows, Collator(0))

    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 16}
    assert not chooses_logits(xLSTMForCausalLM(xLSTMConfig(**shape)), rows, Collator(0))


@pytest.mark.parametrize("learned", [True, False])
def test_a_training_computes_only_those(tmp_path: Path, tokenizer: Any, learned: bool) -> None:
    """The output layer sees the learned tokens of a step; with prompt tuning, all tokens and the virtual ones."""
    config = TrainConfig(output_dir=tmp_path / "out", train_batch_size=3, gradient_accumulation_steps=1)
    base, seen = make_base("llama"), []
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(base, lora() if learned else virtual)
    base.lm_head.register_forward_hook(
        lambda layer, given, result: seen.append(tuple(result.shape)) if model.training else None
    )
    train(config, model, tokenizer, EXAMPLES, console=Console(file=io.StringIO()))
    assert seen == [(3 + 1 + 4, 128) if learned else (3, 3 + 7, 128)]
