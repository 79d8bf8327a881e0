# SPDX-License-Identifier: BSD-3-Clause
"""What people complained of in public, each reproduced here and caught by a named check.

The table of bad checkpoints at the end are files that PEFT loads without an error.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.checks_graph import CHECKS as GRAPH_CHECKS
from QEfficient.testing.graphs import Graph, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.selection import Selection
from tests.testing.conftest import Folders
from tests.testing.planted_adapters import _short, config, dropped, every, one, poke, renamed, tensors
from tests.testing.planted_graphs import GRAPH_FAULTS, SESSION_FAULTS
from tests.testing.planted_pytorch import MODEL_FAULTS
from tests.testing.test_checks_lifecycle import ask_all, loaded
from tests.tiny import lora, save_adapter, save_base


@dataclass(frozen=True)
class Complaint:
    """Where it was said, what was seen, how it is brought about, and the check that says so."""

    issue: str
    symptom: str
    cause: Any
    check: str


def flagged(results: list[CheckResult]) -> dict[str, str]:
    """Return what failed or warned."""
    return {r.name: r.message for r in results if r.outcome in (Outcome.FAIL, Outcome.WARN)}


def _vocabulary(loaded: dict[str, np.ndarray]) -> None:
    loaded["base_model.model.model.embed_tokens.weight"] = np.ones((140, 64), np.float32)


def _rows_of_another(loaded: dict[str, np.ndarray]) -> None:
    loaded["base_model.model.lm_head.weight"] = np.ones((128, 64), np.float32)


def _first_layer(names: list[str]) -> list[str]:
    return [f"model.layers.0.self_attn.{n}" for n in ("q_proj", "v_proj")]


def _only_first_layer(folder: Path) -> None:
    config(target_modules=_first_layer)(folder)
    tensors(lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj" in k or "layers.0.self_attn.v_proj" in k})(folder)  # fmt: skip


FILES = (
    Complaint("peft#2115", "wrapped twice before loading: outputs are the base's", renamed(lambda k: k.replace("base_model.model.", "base_model.model.base_model.model.", 1)), "adapter.coverage"),
    Complaint("peft#1678", "half of it is fresh and random at each load", dropped(r"lora_B"), "adapter.coverage"),
    Complaint("peft#3554", "the default targets reach few layers", _only_first_layer, "adapter.targets"),
    Complaint("peft#3016", "layers_to_transform selects other layers than were trained", config(layers_to_transform=[0], target_modules=_short), "adapter.coverage"),
    Complaint("peft#1567", "the base's revision is not used", config(base_model_name_or_path="org/another", revision="a" * 40), "adapter.base"),
    Complaint("peft#2415, #1457, #1554; transformers#36550", "tokens were added, the embedding has another size", tensors(_vocabulary), "adapter.shapes"),
    Complaint("vllm#48019, #34186, #34591, #55193", "the prefix of the modules differs, nothing is applied", renamed(lambda k: k.replace("model.model.layers", "model.model.language_model.layers")), "adapter.coverage"),
    Complaint("unsloth#9331, #6936, #11014; sglang#32406", "modules are listed as targets but were never adapted", dropped(r"down_proj"), "adapter.coverage"),
    Complaint("llama.cpp#11554, #9114", "the adapter carries the base's lm_head", tensors(_rows_of_another), "adapter.own_weights"),
    Complaint("sentence-transformers#3247", "modules are attached, the weights are not in the file", tensors(lambda t: {}), "adapter.files"),
)  # fmt: skip


@pytest.mark.parametrize("complaint", FILES, ids=lambda c: c.issue)
def test_files(folders: Folders, tmp_path: Path, complaint: Complaint):
    """Seen in the adapter's folder, before anything runs."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    complaint.cause(folder)
    found = examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), Selection())
    assert complaint.check in flagged(found.results), flagged(found.results)


def test_tied_weights(tmp_path: Path):
    """peft#2018, #2777; transformers#45127: an adapter of a tied embedding is merged wrongly."""
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(base, tmp_path / "one", config=lora(target_modules=["q_proj", "embed_tokens"]))
    found = examine("one", adapter, str(base), AutoConfig.from_pretrained(base), Selection())
    assert "PEFT merges it wrongly" in flagged(found.results)["adapter.tied"]


def test_type_of_the_tensors_is_reported(folders: Folders, tmp_path: Path):
    """peft#2421: a float16 adapter is loaded as float32; the report says what the file holds."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    every(r"", lambda t: t.astype(np.float16))(folder)
    found = examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), Selection())
    assert next(r for r in found.results if r.name == "adapter.files").facts["types"] == "F16"


def planted(faults: Any, name: str) -> Callable[[Any], Any]:
    """Return a fault by its name."""
    fault = next(f for f in faults if f.name == name)
    cause: Callable[[Any], Any] = fault.make if hasattr(fault, "make") else fault.plant
    return cause


def _bypassed(reference: Reference) -> None:
    for module in reference.model.modules():
        if hasattr(module, "lora_A"):
            module._disable_adapters = True


def _generates_with_base(reference: Reference) -> None:
    generate = reference.model.generate

    def plain(**kwargs: Any) -> Any:
        with reference.model.disable_adapter():
            return generate(**kwargs)

    reference.model.generate = plain


def _merged_in_bfloat16(reference: Reference) -> None:
    for layer in [m for m in reference.model.modules() if hasattr(m, "lora_A")]:
        merge = layer.merge

        def rounded(*args: Any, layer: Any = layer, merge: Any = merge, **kwargs: Any) -> None:
            merge(*args, **kwargs)
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.bfloat16).float()

        layer.merge = rounded


def _shares_parameters(reference: Reference) -> None:
    for layer in [m for m in reference.model.modules() if hasattr(m, "lora_A")]:
        layer.lora_A["one"].register_forward_hook(
            lambda m, i, out, layer=layer: out + 1e-4 * layer.lora_A["two"](i[0]).sum()
        )


MODELS = (
    Complaint("peft#2123", "generate ignores the adapter", _generates_with_base, "pytorch.generate"),
    Complaint("transformers#36473", "the pipeline drops the adapter", _generates_with_base, "pytorch.generate"),
    Complaint("peft#2787", "the adapter is not applied on this device", _bypassed, "pytorch.effect"),
    Complaint("peft#1043, #1035, #2502, #1836; transformers#31293", "merged, the model is far worse", planted(MODEL_FAULTS, "merge leaves a module out"), "pytorch.merge"),
    Complaint("peft#1388", "merging in bfloat16 moves the loss", _merged_in_bfloat16, "pytorch.merge"),
    Complaint("peft#1802", "set_adapter changes nothing", planted(MODEL_FAULTS, "adapter never selected"), "pytorch.several"),
    Complaint("peft#2381, #2422, #2206, #3716", "deleting an adapter leaves something behind", planted(MODEL_FAULTS, "deleting changes another adapter"), "pytorch.delete"),
    Complaint("peft#3638", "every checkpoint holds the active adapter's weights", planted(MODEL_FAULTS, "saving writes other tensors"), "pytorch.reload"),
    Complaint("sentence-transformers#3247", "weights are discarded after loading", planted(MODEL_FAULTS, "adapter's tensors zeroed after loading"), "pytorch.effect"),
    Complaint("peft#54", "the result depends on the padding", planted(MODEL_FAULTS, "padding attended"), "pytorch.padding"),
    Complaint("peft#2206", "training one adapter changes another", _shares_parameters, "pytorch.gradients"),
)  # fmt: skip


@pytest.mark.parametrize("complaint", MODELS, ids=lambda c: f"{c.issue} {c.check}")
def test_models(folders: Folders, complaint: Complaint):
    """Seen in PyTorch."""
    reference = loaded(folders.base, one=folders.one, two=folders.two)
    complaint.cause(reference)
    found = ask_all(reference)
    assert complaint.check in flagged(list(found.values())), {n: r.message for n, r in found.items()}


def _renamed_inputs(graph: Path) -> None:
    path = graph / "adapters" / "one.safetensors"
    _rewrite(path, lambda t: {f"x.{k}": v for k, v in t.items()})


def _other_shapes(graph: Path) -> None:
    path = graph / "adapters" / "one.safetensors"
    _rewrite(path, lambda t: {k: np.ascontiguousarray(v.T) if v.ndim == 2 else v for k, v in t.items()})


def _rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(str(path), framework="np") as f:
        metadata = f.metadata()
    save_file(change({k: v.copy() for k, v in load_file(path).items()}), path, metadata=metadata)


GRAPHS = (
    Complaint("vllm#10798, lorax#700", "rsLoRA's scaling is ignored, so all factors are wrong", planted(GRAPH_FAULTS, "alpha changed after the export"), "graph.tensors"),
    Complaint("Olive#2277, onnxruntime-genai#1186", "tensor names are not the graph's inputs", _renamed_inputs, "graph.tensors"),
    Complaint("Olive#1451", "shapes are not the graph's", _other_shapes, "graph.tensors"),
)  # fmt: skip
SESSIONS = (
    Complaint("vllm#42125, #30931; llama.cpp#26207", "the cache of another adapter's prompt is used", planted(SESSION_FAULTS, "switch one call late"), "graph.switching"),
    Complaint("vllm#47724", "a request is served with another adapter", planted(SESSION_FAULTS, "always the other adapter"), "graph.effect"),
    Complaint("onnx#5326, #6144", "exported, it is the base that answers", planted(SESSION_FAULTS, "always the base"), "graph.features"),
)  # fmt: skip


@pytest.mark.parametrize("complaint", [*GRAPHS, *SESSIONS], ids=lambda c: c.issue)
def test_graphs(graph: Graph, reference: Reference, tmp_path: Path, complaint: Complaint):
    """Seen in an exported graph, or in what runs it."""
    folder = Path(shutil.copytree(graph.folder, tmp_path / "graph", ignore=shutil.ignore_patterns("qpc-*")))
    if complaint in GRAPHS:
        complaint.cause(folder)
    with opened(Stage.GRAPH, Graph(folder, graph.fitted), reference) as candidate:
        if complaint in SESSIONS:
            candidate.session = complaint.cause(candidate.session)
        check = next(c for c in GRAPH_CHECKS if f"graph.{c.name}" == complaint.check)
        found = check.perform(Stage.GRAPH, candidate, "one")
    assert found.outcome is Outcome.FAIL, found.message


BAD_CHECKPOINTS = (
    Complaint("keys without base_model.model.", "output is the base's", renamed(lambda k: k.removeprefix("base_model.model.")), "adapter.coverage"),
    Complaint("modules renamed", "output is the base's", renamed(lambda k: k.replace("self_attn", "attn")), "adapter.coverage"),
    Complaint("half of the keys missing", "output is off", dropped(r"layers\.1\."), "adapter.coverage"),
    Complaint("lora_B all zero", "output is the base's, no warning", every(r"lora_B", np.zeros_like), "adapter.effect"),
    Complaint("NaN in one tensor", "logits are not finite, no warning", one(r"lora_A", poke(float("nan"))), "adapter.finite"),
    Complaint("r doubled in the config", "PEFT refuses, without saying which is wrong", config(r=8), "adapter.shapes"),
    Complaint("target_modules a superset", "PEFT warns of missing keys", config(target_modules=lambda t: [*t, "lm_head"]), "adapter.coverage"),
    Complaint("base and revision wrong", "PEFT compares nothing", config(base_model_name_or_path="org/another", revision="b" * 40), "adapter.base"),
)  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS, ids=lambda c: c.issue)
def test_bad_checkpoints(folders: Folders, tmp_path: Path, bad: Complaint):
    """What PEFT loads all the same."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    bad.cause(folder)
    found = examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), Selection())
    assert bad.check in flagged(found.results), flagged(found.results)


@pytest.mark.parametrize("fields", [{"lora_alpha": 16}, {"use_rslora": True}], ids=str)
def test_edited_scaling(graph: Graph, folders: Folders, tmp_path: Path, fields: dict[str, Any]):
    """Alpha doubled or rsLoRA flipped: any number is possible, so an earlier export is what tells."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    config(**fields)(folder)
    reference = loaded(folders.base, one=folder)
    from QEfficient.testing.graphs import find_graph

    with opened(Stage.GRAPH, find_graph(reference, ("one",), graph.folder), reference) as candidate:
        check = next(c for c in GRAPH_CHECKS if c.name == "tensors")
        found = check.perform(Stage.GRAPH, candidate, "one")
    assert "its configuration now says" in found.message
