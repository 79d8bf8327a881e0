# SPDX-License-Identifier: BSD-3-Clause
"""Do two tokenizers make the same tokens of the same text? Both are asked: their files can say the same in many ways."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from QEfficient.store import digest_file
from QEfficient.testing.text import listed

_WORDS = 96
_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
"""Fields of ``tokenizer_config.json`` that change the tokens of a text."""
_TEXTS = (
    "The farmer counted his sheep; none were missing.",
    "def average(values):\n    return sum(values) / len(values)  # 3.50",
    "  Zwölf Boxkämpfer\tjagen\r\n\r\nVIKTOR 1234567 - naïve café, 東京 🙂",
)


@dataclass(frozen=True, slots=True)
class Content:
    """A file, known by its content: adapters of one training mostly carry the same tokenizer."""

    digest: str
    path: Path = field(compare=False)

    @classmethod
    def of(cls, path: Path) -> "Content":
        """Read a file's digest."""
        return cls(digest_file(path), path)


def differing_setting(ours: dict[str, object], theirs: dict[str, object]) -> str:
    """Say which field of two ``tokenizer_config.json`` changes the tokens of a text; ``""`` if none does."""
    for key in _SETTINGS:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            return f"says {key} {str(ours[key]).lower()}, the base's {str(theirs[key]).lower()}"
    return ""


def differing_text(ours: Path, theirs: Path) -> str:
    """Say how the tokens of two ``tokenizer.json`` differ; ``""`` if they do not, or one of them cannot be read."""
    mine, base = Content.of(ours), Content.of(theirs)
    return "" if mine == base else _compare(mine, base)


@lru_cache(maxsize=64)
def _compare(mine: Content, base: Content) -> str:
    try:
        one, other = (Tokenizer.from_file(str(file.path)) for file in (mine, base))
    except Exception:  # noqa: BLE001, RUF100 -- what cannot be read is not compared: other checks say so
        return ""
    for tokenizer in (one, other):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for text in (*_TEXTS, *_own_words(other)):
        got, want = one.encode(text), other.encode(text)
        if got.ids != want.ids:
            pairs = zip(got.ids, want.ids, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got.ids), len(want.ids)))
            ours_, theirs_ = (listed([repr(t) for t in e.tokens[at : at + 3]]) or "nothing" for e in (got, want))
            return f"makes {ours_} of a text of which the base's makes {theirs_}, from token {at} of {text[:40]!r} on"
    return ""


def _own_words(tokenizer: Tokenizer) -> list[str]:
    """Return text of the tokenizer's own words, also in capitals: what cuts or writes words otherwise shows there."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    words = [tokenizer.decode([i]) for i in range(0, size, max(1, size // _WORDS))]
    text = " ".join(w.strip() for w in words if w.strip().isprintable() and w.strip())
    return [text, text.upper(), text.title()]
