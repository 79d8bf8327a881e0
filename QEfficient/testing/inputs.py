# SPDX-License-Identifier: BSD-3-Clause
"""What a test is given, as the report shows it."""

from pathlib import Path
from typing import Any

from QEfficient.testing.adapter_files import AdapterFiles
from QEfficient.testing.report import Subject
from QEfficient.testing.text import counted, size


def describe_base(base: str, config: Any) -> Subject:
    """Return the base as the report shows it."""
    text = config.get_text_config()
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    layers = getattr(text, "num_hidden_layers", None)
    width = getattr(text, "hidden_size", None)
    parts = [kind, f"{layers} layers" if layers else "", f"{width} wide" if width else ""]
    return Subject("base", base, "", ", ".join(p for p in parts if p))


def describe_adapter(name: str, path: str | Path, files: AdapterFiles) -> Subject:
    """Return an adapter as the report shows it."""
    config = files.config
    rank = f"rank {config.r}, " if getattr(config, "r", None) else ""
    return Subject(
        name,
        str(path),
        str(config.peft_type.value),
        f"{rank}{counted(len(files.tensors), 'tensor')}, {size(files.volume)}",
    )


def trained_tokens(config: Any) -> tuple[int, ...]:
    """Return the tokens whose embeddings an adapter trains by their ids: it shows its effect at these only."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = found.values() if isinstance(found, dict) else [found]
    return tuple(sorted({int(i) for tokens in lists for i in tokens}))
