# SPDX-License-Identifier: BSD-3-Clause
"""A base with one adapter merged into its weights, as a graph without adapter inputs."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from QEfficient.errors import UnsupportedError
from QEfficient.export.lift import plain, shapes_graph
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM
from QEfficient.store import cache_root

_TOLERANCE = 1e-4  # of the logits' range; merging rounds each weight once, which is seen as 1e-6


def export_merged(
    base: str | Path,
    name: str,
    adapter: str | Path,
    destination: Path | None = None,
    *,
    logits: str = "last",
) -> Path:
    """Merge an adapter into a base, export the result, and return the graph's folder; its weights are written.

    Args:
        base: Folder or Hub id.
        name: What to call the adapter.
        adapter: Its folder or Hub id.
        destination: Folder name without the hash; default: in the cache of exported graphs.
        logits: ``"last"`` or ``"all"``.

    Raises:
        UnsupportedError: PEFT cannot merge the adapter, or the merged model computes something else.
        QEffError: As :meth:`QEffAutoPeftModelForCausalLM.from_base`.
    """
    merged = merge(QEffAutoPeftModelForCausalLM.from_base(base, {name: adapter}).model, name)
    architecture = type(merged).__name__
    target = destination or cache_root() / architecture / f"{architecture}-merged"
    return export_graph(merged, target, logits=logits)


def merge(model: PeftModel, name: str) -> PreTrainedModel:
    """Return the transformers model with adapter ``name`` in its weights; ``model`` is used up.

    The result is held against the model before: what cannot be expressed in weights (a tied output projection whose
    embedding alone was adapted, an adapter that acts on some tokens only) is noticed.

    Raises:
        UnsupportedError: PEFT cannot merge the adapter, or the merged model computes something else.
    """
    config = model.peft_config[name]
    method = str(plain(config.peft_type))
    if not shapes_graph(config):
        raise UnsupportedError(f"adapters of the method {method} bring virtual tokens: there is nothing to merge")
    model.set_adapter(name)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        try:
            merged: PreTrainedModel = model.merge_and_unload(safe_merge=True, adapter_names=[name])
        except (NotImplementedError, AttributeError, ValueError, TypeError) as e:
            raise UnsupportedError(f"PEFT cannot merge adapters of the method {method}: {e or type(e).__name__}") from e
        got = merged(input_ids=ids).logits
    off = float((got - want).abs().max() / (want.max() - want.min()))
    if not off <= _TOLERANCE:
        raise UnsupportedError(
            f"adapter {name!r} ({method}) cannot be merged: the merged model's logits differ by {off:.1e} of their range"
        )
    return merged.eval()  # type: ignore[no-untyped-call, no-any-return]
