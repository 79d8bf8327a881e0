# SPDX-License-Identifier: BSD-3-Clause
"""Checks that an adapter and a base belong together: what was recorded, tied weights."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from QEfficient.peft.loading import checkpoint_folder
from QEfficient.store import RECORD_FILE, changed_since_record
from QEfficient.testing.adapter_files import AdapterFiles
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import listed

_STRUCTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_SAMPLED = 6
_SAMPLE_ROWS = 8
IN_NAMES, OUT_NAMES = r"(embed_tokens|wte|embed_in|word_embeddings)", r"(lm_head|embed_out|output_layer)"


def _ask_base(files: AdapterFiles, subject: str) -> Finding:
    recorded = getattr(files.config, "base_model_name_or_path", None) or ""
    revision = getattr(files.config, "revision", None) or ""
    facts: Facts = {"recorded": recorded or "nothing", "given": files.base}
    facts |= {"revision": revision} if revision else {}
    if not recorded or not files.base:
        return skipped("The adapter does not record its base.")
    ours, theirs = base_folder(files.base), base_folder(recorded)
    if theirs is not None and ours is not None and theirs != ours:
        return _compare(ours, theirs, recorded, facts)
    if _same_name(recorded, files.base) and _revision_fits(revision, ours):
        return passed(f"It was trained on {recorded!r}, which is the base given.", facts=facts)
    if _same_name(recorded, files.base):
        text = f"It was trained on revision {revision!r} of {recorded!r}; the base given is another, {ours and ours.name!r}."
        return Finding(
            Outcome.WARN, f"{text} Load that revision, or make sure that its weights are the same.", facts=facts
        )
    text = f"It records {recorded!r} as its base, and is tested on {files.base!r}; the recorded one is not on this machine to compare."
    return Finding(Outcome.WARN, f"{text} Make sure that both are the same model.", facts=facts)


def _compare(ours: Path, theirs: Path, recorded: str, facts: Facts) -> Finding:
    a, b = read_json(ours / "config.json"), read_json(theirs / "config.json")
    other = [f"{k} {b.get(k)!r}, here {a.get(k)!r}" for k in _STRUCTURE if a.get(k) != b.get(k)]
    if other:
        return failed(
            f"The base that it was trained on ({recorded}) is another model: {listed(other)}. Give that base.",
            len(other),
            facts,
        )
    wrong = _differing_weights(ours, theirs)
    if wrong:
        text = f"The base that it was trained on ({recorded}) has other weights of the same shape, first {wrong[0]}"
        return failed(f"{text}. Give that base, or train the adapter again on this one.", len(wrong), facts)
    return passed(f"The base that it records ({recorded}) has the same structure and weights.", 0, facts)


@lru_cache(maxsize=8)
def _differing_weights(ours: Path, theirs: Path) -> list[str]:
    """Return the tensors of which a few rows differ; some of each checkpoint are looked at."""
    a, b = _weights(ours), _weights(theirs)
    names = sorted(set(a) & set(b))
    chosen = names[:: max(1, len(names) // _SAMPLED)]
    return [n for n in chosen if _rows(a[n], n) != _rows(b[n], n)]


def _weights(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as f:
            found |= {name: path for name in f.keys()}
    return found


def _rows(path: Path, name: str) -> list[Any]:
    with safe_open(str(path), framework="pt") as f:
        part = f.get_slice(name)
        values: list[Any] = part[:_SAMPLE_ROWS].float().flatten().tolist()
        return values


def base_folder(base: str) -> Path | None:
    """Return where a base lies on this machine, given a folder or a Hub id; None if it does not."""
    folder = Path(base).expanduser()
    try:
        found = checkpoint_folder(folder if folder.is_dir() else base)
    except ValueError:  # neither a folder nor an id: a path of another machine
        return None
    return found.resolve() if found is not None and (found / "config.json").is_file() else None


def _same_name(recorded: str, given: str) -> bool:
    return recorded.rstrip("/").rsplit("/", 1)[-1].lower() == given.rstrip("/").rsplit("/", 1)[-1].lower()


def _revision_fits(revision: str, ours: Path | None) -> bool:
    """Whether a recorded commit is the one of the Hub's cache; names of branches say nothing."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision) or ours is None or ours.parent.name != "snapshots":
        return True
    return ours.name == revision


def _ask_record(files: AdapterFiles, subject: str) -> Finding:
    changed = changed_since_record(files.path)
    if changed is None:
        return skipped(f"No {RECORD_FILE} of its training lies beside it.")
    if not changed:
        return passed("Tensors and configuration are as training wrote them.", 0)
    text = f"Since training wrote it, {listed(changed)} changed"
    said = f"{text}. Take the files of the training's output again, or delete {RECORD_FILE} if that is what you want."
    return failed(said, len(changed), {"changed": listed(changed, 8)})


def _ask_tied(files: AdapterFiles, subject: str) -> Finding:
    if not bool(getattr(files.base_config, "tie_word_embeddings", False)):
        return passed("The base's embedding and output projection are not tied.")
    inner = sorted(k for k in files.tensors if re.search(rf"\b{IN_NAMES}\b", k))
    outer = sorted(k for k in files.tensors if re.search(rf"\b{OUT_NAMES}\b", k))
    if not inner and not outer:
        return passed("The base's embedding and output projection are tied, and the adapter touches neither.")
    if any("lora" in k for k in (*inner, *outer)):
        text = f"The base ties embedding and output projection, and the adapter changes {(inner or outer)[0]}: it works, but PEFT merges it wrongly"
        return Finding(
            Outcome.WARN, f"{text} (the change lands in both). Serve it unmerged, or untie the base before training."
        )
    if bool(inner) != bool(outer) and not getattr(files.config, "ensure_weight_tying", False):
        text = f"The base ties embedding and output projection, the adapter replaces only {(inner or outer)[0]}: the two are torn apart"
        return Finding(Outcome.WARN, f"{text}. A merged model must be saved with tie_word_embeddings=False.")
    return passed("Embedding and output projection are tied, and the adapter treats them alike.")


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's object; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "base",
        "Made for this base",
        "PEFT compares nothing with the base it is given; on another one of the same shape the adapter runs and is wrong.",
        _ask_base,
    ),
    Check(
        "record",
        "As training wrote it",
        "A sign turned, layers moved or a field edited make another adapter that is as sound; only a record of the training's output tells.",
        _ask_record,
        tolerance=0,
        unit="changes",
    ),
    Check(
        "tied",
        "Tied weights stay tied",
        "One tensor serves as embedding and as output projection; changing one of them is undone or doubled by merging and reloading.",
        _ask_tied,
    ),
)
"""Asked of each adapter, in this order."""
