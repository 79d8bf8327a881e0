# SPDX-License-Identifier: BSD-3-Clause
"""One case: a tiny model with two adapters is exported, and the graph is held against PyTorch.

Every way of feeding the graph is compared at every call: the whole prompt, chunks, tokens one by one, ragged rows
together; with the adapter it was exported with, with another one, and with none.
"""

import ast
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from QEfficient.contract import BASE, Manifest
from QEfficient.errors import AdapterMismatchError, UnsupportedError
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors
from QEfficient.peft.neutral import neutral_of
from QEfficient.peft.tasks import choose_task, tasks_of
from QEfficient.runtime.session import OrtSession
from scripts.coverage.shrink import VOCAB, tiny_model
from scripts.coverage.vary import variation

TOLERANCE = 1e-4
LENGTHS = (13, 9, 4)
CONTEXT = 24
SCHEDULES = {"prefill": [13], "chunks": [5, 5, 3], "decode": [6] + 7 * [1]}

Array = npt.NDArray[Any]


def lora(**fields: Any) -> LoraConfig:
    """Return a LoRA configuration on all linear layers, with fields replaced."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def run_architecture(model_type: str, **fields: Any) -> dict[str, Any]:
    """Compare a tiny model of a type, with LoRA on all linear layers; return the outcome, JSON-ready."""

    def base() -> PreTrainedModel:
        return tiny_model(model_type, **fields)

    try:
        linear = [(path.rsplit(".", 1)[-1], m) for path, m in base().named_modules() if isinstance(m, torch.nn.Linear)]
        own = sorted({name for name, module in linear if _returns_more(module)})
    except Exception as e:
        return {"outcome": "no tiny model", "reason": _said(e)}
    # PEFT's layer cannot run these, in PyTorch either.
    skipped: dict[str, Any] = {"exclude_modules": own} if own else {}

    def adapter(**changed: Any) -> LoraConfig:
        return lora(**skipped, **changed)

    seconds = [{"r": 2, "lora_alpha": 32}, {"lora_alpha": 32}]  # where LoRA stacks experts, the rank is fixed
    found = compare(base, adapter, seconds) | skipped
    if "incompatible with Mamba" in found.get("reason", ""):  # PEFT names what it does not take
        skipped = {"exclude_modules": ["out_proj", "conv1d"]}
        found = compare(base, adapter, seconds) | skipped
    elif found["outcome"] == "no adapter" and (
        own := sorted({n for n, m in linear if type(m).forward is not torch.nn.Linear.forward})
    ):
        skipped = {"exclude_modules": own}
        found = compare(base, adapter, seconds) | skipped
    return found


def run_varied(model_type: str, seed: int) -> dict[str, Any]:
    """Compare a held-out configuration of a type; return the outcome and the fields that were set otherwise."""
    fields = variation(model_type, seed)
    for left in ((), ("rope_parameters",), ("num_attention_heads", "num_key_value_heads", "head_dim")):
        fields = {name: value for name, value in fields.items() if name not in left}
        found = run_architecture(model_type, **fields)
        if found["outcome"] != "no tiny model":  # transformers takes the fields together
            break
    return {"fields": fields} | found


def _returns_more(module: torch.nn.Module) -> bool:
    """Return whether ``module`` is a linear layer whose own ``forward`` returns several things, as some routers do."""
    own = type(module).forward
    if own is torch.nn.Linear.forward:
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    return any(isinstance(node.value, ast.Tuple) for node in ast.walk(tree) if isinstance(node, ast.Return))


def compare(
    base: Callable[[], PreTrainedModel], config: Callable[..., PeftConfig], seconds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Export one adapter of a base; hold the graph with it, with a second adapter and with none against PyTorch.

    Args:
        base: Makes the same base at every call.
        config: Makes the adapter's configuration, with fields replaced.
        seconds: Fields in which the second adapter differs, the most different one first: the first that fits the graph
            is fed to it. One that differs in nothing always fits.

    Returns:
        The outcome, JSON-ready; ``second`` says in what the second adapter differs, ``misfit`` why not in more.
    """
    onnxruntime.set_default_logger_severity(4)
    try:
        made = base()
        bare = reference(made)
    except Exception as e:
        return {"outcome": "no tiny model", "reason": _said(e)}
    try:
        model = trained(base, config(), 1)
        adapted = reference(model)
    except Exception as e:
        return {"outcome": "no adapter", "reason": _said(e)}
    if getattr(config(), "layer_replication", None):  # the adapter's configuration makes a base of its own
        with model.disable_adapter():
            bare = reference(model)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = export_graph(
                model, Path(scratch) / "graph", adapter_name="a", neutral=lambda: neutral_of(model, "a")
            )
        except UnsupportedError as e:
            return {"outcome": "refused", "reason": str(e)}
        session = OrtSession(folder, threads=1)
        manifest, neutral = Manifest.read(folder), neutral_tensors(folder)
        session.load_adapter("first", fit(Adapter.from_model(model, "a"), manifest, neutral))
        other, fitted, swap = _second(base, config, seconds, lambda a: fit(a, manifest, neutral))
        session.load_adapter("second", fitted)
        wants = {"first": adapted, "second": reference(other), BASE: bare}
        errors = {
            f"{adapter}, {way}": difference(session, adapter, wants[adapter], way)
            for adapter in wants
            for way in (SCHEDULES if adapter == "first" else ("chunks",))
        }
    worst = max(errors, key=lambda k: np.inf if np.isnan(errors[k]) else errors[k])
    effect = max(float(np.abs(a - b).max()) for a, b in zip(wants["first"], bare, strict=True))
    right = errors[worst] < TOLERANCE
    found = {"outcome": "pass" if right else "wrong", "error": errors[worst], "worst": worst, "effect": effect} | swap
    return found if right else found | {"reason": f"{worst}: {errors[worst]:.1e} of the logits' range"}


def _second(
    base: Callable[[], PreTrainedModel],
    config: Callable[..., PeftConfig],
    seconds: Sequence[Mapping[str, Any]],
    fitted: Callable[[Adapter], dict[str, Array]],
) -> tuple[PeftModel, dict[str, Array], dict[str, Any]]:
    """Return the first second adapter that fits: its model, its inputs, and in what it differs."""
    misfit = {}
    for fields in (*seconds, {}):
        try:
            model = trained(base, config(**fields), 2)
        except Exception as e:  # PEFT itself does not take these fields together
            misfit = misfit or {"misfit": _said(e)}
            continue
        try:
            return model, fitted(Adapter.from_model(model, "a")), {"second": dict(fields), **misfit}
        except AdapterMismatchError as e:
            misfit = misfit or {"misfit": str(e)}
    raise AdapterMismatchError(f"an adapter of the same configuration does not fit: {misfit['misfit']}")


def trained(base: Callable[[], PreTrainedModel], config: PeftConfig, seed: int) -> PeftModel:
    """Return a base with adapter ``a``, moved at random, saved and loaded again."""
    model = get_peft_model(base(), config, adapter_name="a")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.is_floating_point:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), f"{folder}/a", adapter_name="a").eval()
    if tasks := tasks_of(config):
        choose_task(loaded, "a", seed % tasks)
    return loaded


def prompts() -> list[torch.Tensor]:
    """Return ragged rows of token ids, ``(n_b,)`` each."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def reference(model: torch.nn.Module) -> list[Array]:
    """Return PyTorch's logits of every position of each row, ``(n_b, V)``."""
    with torch.no_grad():
        made = [model(input_ids=row[None], use_cache=False).logits[0].float().numpy() for row in prompts()]
    return [logits[-len(row) :] for logits, row in zip(made, prompts(), strict=True)]  # behind virtual tokens


def difference(session: OrtSession, adapter: str, want: list[Array], way: str) -> float:
    """Return the largest difference of logits from PyTorch's, relative to their range, over all calls."""
    session.set_adapter(adapter)
    session.allocate(len(want), CONTEXT)
    span = max(float(np.ptp(row)) for row in want)
    return max(float(np.abs(got - want[b][at]).max()) for b, at, got in feed(session, SCHEDULES[way])) / span


def feed(session: OrtSession, widths: list[int]) -> Iterator[tuple[int, int, Array]]:
    """Run ragged rows through a session, ``widths`` tokens at a time; yield row, position and logits."""
    rows = [row.numpy() for row in prompts()]
    start = 0
    for width in widths:
        ids, positions = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -1)
        for b, row in enumerate(rows):
            first = min(start, len(row) - 1)
            part = row[first : first + width]
            ids[b, : len(part)], positions[b, : len(part)] = part, np.arange(first, first + len(part))
        logits = session.run(ids, positions)
        for b in range(len(rows)):
            yield b, int(positions[b].max()), logits[b, 0]
        start += width


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
