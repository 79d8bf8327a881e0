# SPDX-License-Identifier: BSD-3-Clause
"""One case: a tiny model with two adapters is exported, and the graph is held against PyTorch.

Every way of feeding the graph is compared at every call: the whole prompt, chunks, tokens one by one, ragged rows
together; with the adapter it was exported with, with another one, and with none.
"""

import ast
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Iterator
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
        own = sorted({path.rsplit(".", 1)[-1] for path, module in base().named_modules() if _returns_more(module)})
    except Exception as e:
        return {"outcome": "no tiny model", "reason": _said(e)}
    skipped: dict[str, Any] = (
        {"exclude_modules": own} if own else {}
    )  # PEFT's layer cannot run these, in PyTorch either

    def adapter(**changed: Any) -> LoraConfig:
        return lora(**skipped, **changed)

    found = compare(base, adapter, lambda: adapter(r=2, lora_alpha=32), lambda: adapter(lora_alpha=32)) | skipped
    if "incompatible with Mamba" in found.get("reason", ""):  # PEFT names what it does not take
        skipped = {"exclude_modules": ["out_proj", "conv1d"]}
        found = compare(base, lambda: lora(**skipped), lambda: lora(r=2, lora_alpha=32, **skipped)) | skipped
    if "AdapterMismatchError" in found.get(
        "reason", ""
    ):  # LoRA on stacked experts: the rank is no dimension of its own
        found = compare(base, adapter, lambda: adapter(lora_alpha=32)) | skipped | {"rank": "fixed"}
    return found


def run_varied(model_type: str, seed: int) -> dict[str, Any]:
    """Compare a held-out configuration of a type; return the outcome and the fields that were set otherwise."""
    fields = variation(model_type, seed)
    return {"fields": fields} | run_architecture(model_type, **fields)


def _returns_more(module: torch.nn.Module) -> bool:
    """Return whether ``module`` is a linear layer whose own ``forward`` returns several things, as some routers do."""
    own = type(module).forward
    if not isinstance(module, torch.nn.Linear) or own is torch.nn.Linear.forward:
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    return any(isinstance(node.value, ast.Tuple) for node in ast.walk(tree) if isinstance(node, ast.Return))


def compare(
    base: Callable[[], PreTrainedModel],
    first: Callable[[], PeftConfig],
    second: Callable[[], PeftConfig],
    otherwise: Callable[[], PeftConfig] | None = None,
) -> dict[str, Any]:
    """Export one adapter of a base; hold the graph with it, with a second adapter and with none against PyTorch.

    Args:
        base: Makes the same base at every call.
        first: Makes the configuration of the adapter that is exported.
        second: Makes the configuration of the adapter that is fed to the same graph afterwards.
        otherwise: The second one's if the first does not fit: where LoRA stacks experts, rank is no dimension of its own.
    """
    onnxruntime.set_default_logger_severity(4)
    try:
        made = base()
        bare = reference(made)
    except Exception as e:
        return {"outcome": "no tiny model", "reason": _said(e)}
    try:
        models = [trained(base, config(), seed) for seed, config in enumerate((first, second), 1)]
    except Exception as e:
        return {"outcome": "no adapter", "reason": _said(e)}
    if getattr(first(), "layer_replication", None):  # the adapter's configuration makes a base of its own
        with models[0].disable_adapter():
            bare = reference(models[0])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = export_graph(
                models[0], Path(scratch) / "graph", adapter_name="a", neutral=lambda: neutral_of(models[0], "a")
            )
        except UnsupportedError as e:
            return {"outcome": "refused", "reason": str(e)}
        session = OrtSession(folder, threads=1)
        manifest, neutral = Manifest.read(folder), neutral_tensors(folder)
        session.load_adapter("first", fit(Adapter.from_model(models[0], "a"), manifest, neutral))
        try:
            fitted = fit(Adapter.from_model(models[1], "a"), manifest, neutral)
        except AdapterMismatchError:
            if otherwise is None:
                raise
            models[1] = trained(base, otherwise(), 2)
            fitted = fit(Adapter.from_model(models[1], "a"), manifest, neutral)
        session.load_adapter("second", fitted)
        wants = {"first": reference(models[0]), "second": reference(models[1]), BASE: bare}
        errors = {
            f"{adapter}, {way}": difference(session, adapter, wants[adapter], way)
            for adapter in wants
            for way in (SCHEDULES if adapter == "first" else ("chunks",))
        }
    worst = max(errors, key=lambda k: np.inf if np.isnan(errors[k]) else errors[k])
    effect = max(float(np.abs(a - b).max()) for a, b in zip(wants["first"], bare, strict=True))
    right = errors[worst] < TOLERANCE
    found = {"outcome": "pass" if right else "wrong", "error": errors[worst], "worst": worst, "effect": effect}
    return found if right else found | {"reason": f"{worst}: {errors[worst]:.1e} of the logits' range"}


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
