# SPDX-License-Identifier: BSD-3-Clause
"""Check that the tokenizer beside an adapter and the base's belong together."""

import re
from functools import lru_cache
from pathlib import Path

from QEfficient.testing.adapter_files import AdapterFiles
from QEfficient.testing.check import Check, Finding, failed, passed, skipped
from QEfficient.testing.checks_identity import IN_NAMES, OUT_NAMES, base_folder, read_json
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import listed
from QEfficient.testing.tokenization import Content, differing_setting, differing_text


def _ask_tokenizer(files: AdapterFiles, subject: str) -> Finding:
    base = base_folder(files.base)
    found = _waits_for(files) or (_ends_otherwise(files.path, base) if base is not None else None)
    if found is not None:
        return found
    ours = _token_ids(files.path)
    if ours is None:
        return skipped("No tokenizer lies beside the adapter.")
    rows = _embedding_rows(files)
    beyond = sorted((i, t) for t, i in ours.items() if rows and i >= rows)
    if beyond:
        text = f"Its tokenizer has {len(beyond)} tokens beyond the embedding's {rows} rows, first {beyond[0][1]!r} (id {beyond[0][0]})"
        return failed(f"{text}: they crash or read another row. Resize the embeddings as in training.", len(beyond))
    theirs = (_token_ids(base) if base is not None else None) or {}
    other = [] if ours is theirs else sorted((i, t) for t, i in ours.items() if theirs and theirs.get(t, i) != i)
    if other:
        text = f"{len(other)} tokens have other ids than in the base's tokenizer, first {other[0][1]!r}: {other[0][0]}, base {theirs[other[0][1]]}"
        return failed(f"{text}. The adapter was trained with another tokenizer; use that one.", len(other))
    added = sorted(t for t in ours if theirs and t not in theirs)
    trained = any(re.search(rf"{IN_NAMES}|{OUT_NAMES}|trainable_tokens", k) for k in files.tensors)
    if added and not trained:
        text = f"Its tokenizer adds {listed([repr(t) for t in added])}, but no embedding was trained with it"
        return Finding(Outcome.WARN, f"{text}: these tokens mean nothing to the model.", len(added))
    if base is not None and (how := _cuts_otherwise(files.path, base)):
        text = f"Its {how}: in training the same text was other tokens"
        return Finding(Outcome.WARN, f"{text}. Serve with the adapter's tokenizer.", 1)
    return passed(f"The {len(ours):,} tokens of its tokenizer fit the base.", 0)


def _embedding_rows(files: AdapterFiles) -> int:
    """Return how many tokens base or adapter have rows for; 0 if neither says."""
    vocab = int(getattr(files.base_config.get_text_config(), "vocab_size", 0) or 0) if files.base_config else 0
    own: list[int] = [
        t.shape[0] for k, t in files.tensors.items() if re.search(rf"{IN_NAMES}\b.*weight$", k) and "lora" not in k
    ]
    return max([vocab, *own])


def _waits_for(files: AdapterFiles) -> Finding | None:
    """Look whether an activated LoRA waits for tokens that there are."""
    tokens: list[int] = getattr(files.config, "alora_invocation_tokens", None) or []
    rows = _embedding_rows(files)
    beyond = [t for t in tokens if rows and not 0 <= t < rows]
    if not beyond:
        return None
    text = f"alora_invocation_tokens names token {beyond[0]}, the embedding has {rows} rows"
    return failed(f"{text}: the adapter waits for what never comes, and does nothing. Restore the field.", len(beyond))


def _ends_otherwise(ours: Path, base: Path) -> Finding | None:
    """Compare where a text ends, in the tokenizers and in the settings for generation."""
    ends = [_end_token(folder) for folder in (ours, base)]
    if all(ends) and ends[0] != ends[1]:
        text = f"Its tokenizer ends a text with {ends[0]!r}, the base's with {ends[1]!r}"
        return Finding(
            Outcome.WARN, f"{text}: generation that stops at the base's runs on. Serve with this tokenizer.", 1
        )
    stops = [_stops_at(folder) for folder in (ours, base)]
    if all(stops) and not stops[0] & stops[1]:
        mine, its = (listed(sorted(map(str, s))) for s in stops)
        text = f"Its generation_config.json ends a text at token {mine}, the base's at {its}"
        return Finding(
            Outcome.WARN, f"{text}: generation that stops at the base's runs on. Serve with the adapter's settings.", 1
        )
    return None


def _stops_at(folder: Path) -> set[int]:
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    return {i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)}


def _cuts_otherwise(ours: Path, base: Path) -> str:
    """Say how the same text becomes other tokens; ``""`` if it does not."""
    settings = [read_json(folder / "tokenizer_config.json") for folder in (ours, base)]
    if found := differing_setting(*settings):
        return f"tokenizer_config.json {found}"
    files = [folder / "tokenizer.json" for folder in (ours, base)]
    found = differing_text(*files) if all(f.is_file() for f in files) else ""
    return f"tokenizer {found}" if found else ""


def _end_token(folder: Path) -> str:
    found = read_json(folder / "tokenizer_config.json").get("eos_token")
    return str(found.get("content", "") if isinstance(found, dict) else found or "")


def _ask_template(files: AdapterFiles, subject: str) -> Finding:
    base = base_folder(files.base)
    ours, theirs = _template(files.path), _template(base) if base is not None else None
    if ours is None:
        return skipped("No chat template lies beside the adapter.")
    if theirs is not None and ours != theirs:
        text = "Its chat template is not the base's: a server that takes the base's frames the conversation as it never saw it in training"
        return Finding(Outcome.WARN, f"{text}. Serve with the adapter's template.")
    return passed(
        "The chat template beside it is the base's." if theirs else "The base has no chat template of its own."
    )


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    found = path.read_text() if path.is_file() else read_json(folder / "tokenizer_config.json").get("chat_template")
    return found.strip() if isinstance(found, str) else None


def _token_ids(folder: Path) -> dict[str, int] | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        return _tokenizer_json(Content.of(path))
    added = folder / "added_tokens.json"
    return {str(k): int(v) for k, v in read_json(added).items()} if added.is_file() else None


@lru_cache(maxsize=8)
def _tokenizer_json(file: Content) -> dict[str, int]:
    content = read_json(file.path)
    vocab = content.get("model", {}).get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    found = {str(token): int(i) for token, i in pairs}
    return found | {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "tokenizer",
        "Tokenizer fits",
        "A token beyond the embedding, with another id, or cut otherwise than in training gives another input without an error.",
        _ask_tokenizer,
        tolerance=0,
        unit="tokens",
    ),
    Check(
        "template",
        "Chat template fits",
        "An adapter answers as trained only to conversations that are framed as in training; the template is a file beside the weights.",
        _ask_template,
    ),
)
"""Asked of each adapter."""
