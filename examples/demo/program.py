# SPDX-License-Identifier: BSD-3-Clause
"""The demo's use of ``QEffAutoPeftModelForCausalLM``: one exported program, adapters switched in it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from QEfficient import QEffAutoPeftModelForCausalLM

BATCH_SIZE = 25
NEW_TOKENS = 40


def completions(folder: Path, adapters: list[str], prompts: list[str]) -> dict[str, list[str]]:
    """Return what the base and each adapter write after each of ``prompts``, by the compiled program."""
    model = QEffAutoPeftModelForCausalLM.from_base(folder / "base", {name: folder / name for name in adapters})
    model.export(folder / "graph")
    model.compile(ctx_len=128, prefill_seq_len=64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    written: dict[str, list[str]] = {}
    with model.disable_adapter():
        written["base"] = complete(model, tokenizer, prompts)
    for name in adapters:
        model.set_adapter(name)
        written[name] = complete(model, tokenizer, prompts)
    return written


def complete(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Return the greedy continuation of each prompt."""
    texts: list[str] = []
    for i in range(0, len(prompts), BATCH_SIZE):
        batch = tokenizer(prompts[i : i + BATCH_SIZE], return_tensors="pt", padding=True, return_token_type_ids=False)
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
