# SPDX-License-Identifier: BSD-3-Clause
"""Checks that an adapter and a base belong together: what was recorded, tokenizers, tied weights."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from QEfficient.peft.loading import checkpoint_folder
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
_IN, _OUT = r"(embed_tokens|wte|embed_in|word_embeddings)", r"(lm_head|embed_out|output_layer)"


def _ask_base(files: AdapterFiles, subject: str) -> Finding:
    recorded = getattr(files.config, "base_model_name_or_path", None) or ""
    revision = getattr(files.config, "revision", None) or ""
    facts: Facts = {"recorded": recorded or "nothing", "given": files.base}
    facts |= {"revision": revision} if revision else {}
    if not recorded or not files.base:
        return skipped("The adapter does not record its base.")
    ours, theirs = _folder(files.base), _folder(recorded)
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
    a, b = _read(ours / "config.json"), _read(theirs / "config.json")
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


def _folder(base: str) -> Path | None:
    found = checkpoint_folder(Path(base).expanduser() if Path(base).expanduser().is_dir() else base)
    return found.resolve() if found is not None and (found / "config.json").is_file() else None


def _same_name(recorded: str, given: str) -> bool:
    return recorded.rstrip("/").rsplit("/", 1)[-1].lower() == given.rstrip("/").rsplit("/", 1)[-1].lower()


def _revision_fits(revision: str, ours: Path | None) -> bool:
    """Whether a recorded commit is the one of the Hub's cache; names of branches say nothing."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision) or ours is None or ours.parent.name != "snapshots":
        return True
    return ours.name == revision


def _ask_tokenizer(files: AdapterFiles, subject: str) -> Finding:
    ends = [_end_token(folder) for folder in (files.path, Path(files.base))]
    if all(ends) and ends[0] != ends[1]:
        text = f"Its tokenizer ends a text with {ends[0]!r}, the base's with {ends[1]!r}"
        return Finding(
            Outcome.WARN, f"{text}: generation that stops at the base's runs on. Serve with this tokenizer.", 1
        )
    ours = _token_ids(files.path)
    if ours is None:
        return skipped("No tokenizer lies beside the adapter.")
    vocab = int(getattr(files.base_config.get_text_config(), "vocab_size", 0) or 0) if files.base_config else 0
    rows = max(
        [
            vocab,
            *(t.shape[0] for k, t in files.tensors.items() if re.search(rf"{_IN}\b.*weight$", k) and "lora" not in k),
        ]
    )
    beyond = sorted((i, t) for t, i in ours.items() if rows and i >= rows)
    if beyond:
        text = f"Its tokenizer has {len(beyond)} tokens beyond the embedding's {rows} rows, first {beyond[0][1]!r} (id {beyond[0][0]})"
        return failed(f"{text}: they crash or read another row. Resize the embeddings as in training.", len(beyond))
    theirs = _token_ids(Path(files.base)) or {}
    other = sorted((i, t) for t, i in ours.items() if theirs and theirs.get(t, i) != i)
    if other:
        text = f"{len(other)} tokens have other ids than in the base's tokenizer, first {other[0][1]!r}: {other[0][0]}, base {theirs[other[0][1]]}"
        return failed(f"{text}. The adapter was trained with another tokenizer; use that one.", len(other))
    added = sorted(t for t in ours if theirs and t not in theirs)
    trained = any(re.search(rf"{_IN}|{_OUT}|trainable_tokens", k) for k in files.tensors)
    if added and not trained:
        text = f"Its tokenizer adds {listed([repr(t) for t in added])}, but no embedding was trained with it"
        return Finding(Outcome.WARN, f"{text}: these tokens mean nothing to the model.", len(added))
    return passed(f"The {len(ours):,} tokens of its tokenizer fit the base.", 0)


def _end_token(folder: Path) -> str:
    found = _read(folder / "tokenizer_config.json").get("eos_token")
    return str(found.get("content", "") if isinstance(found, dict) else found or "")


def _token_ids(folder: Path) -> dict[str, int] | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        return _tokenizer_json(path, path.stat().st_size, path.stat().st_mtime_ns)
    added = folder / "added_tokens.json"
    return {str(k): int(v) for k, v in _read(added).items()} if added.is_file() else None


@lru_cache(maxsize=8)
def _tokenizer_json(path: Path, size: int, modified: int) -> dict[str, int]:
    content = _read(path)
    vocab = content.get("model", {}).get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    found = {str(token): int(i) for token, i in pairs}
    return found | {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}


def _ask_tied(files: AdapterFiles, subject: str) -> Finding:
    if not bool(getattr(files.base_config, "tie_word_embeddings", False)):
        return passed("The base's embedding and output projection are not tied.")
    inner = sorted(k for k in files.tensors if re.search(rf"\b{_IN}\b", k))
    outer = sorted(k for k in files.tensors if re.search(rf"\b{_OUT}\b", k))
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


def _read(path: Path) -> dict[str, Any]:
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
        "tokenizer",
        "Tokenizer fits",
        "A token beyond the embedding, or with another id than in training, gives another input without an error.",
        _ask_tokenizer,
        tolerance=0,
        unit="tokens",
    ),
    Check(
        "tied",
        "Tied weights stay tied",
        "One tensor serves as embedding and as output projection; changing one of them is undone or doubled by merging and reloading.",
        _ask_tied,
    ),
)
"""Asked of each adapter, in this order."""
