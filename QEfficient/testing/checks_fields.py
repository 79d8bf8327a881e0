# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what PEFT does with a configuration's fields when it loads them: ignores some, acts on others."""

import dataclasses
import json
from typing import Any

from QEfficient.options import suggest
from QEfficient.testing.adapter_files import AdapterFiles
from QEfficient.testing.check import Check, Finding, passed
from QEfficient.testing.known import takes_from_base
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed


def _ask_fields(files: AdapterFiles, subject: str) -> Finding:
    content: dict[str, Any] = json.loads((files.path / "adapter_config.json").read_text())
    known = {f.name for f in dataclasses.fields(files.config)}
    unknown = sorted(k for k, v in content.items() if k not in known and v not in (None, False, "", [], {}))
    if not unknown:
        return passed(f"PEFT knows all {len(content)} fields of the configuration.", 0)
    hint = suggest(unknown[0], known - set(content)).removeprefix("; ")
    text = (
        f"PEFT does not know {counted(len(unknown), 'field')} of the configuration and ignores them: {listed(unknown)}"
    )
    said = f"{text}{f' ({hint})' if hint else ''}. Correct the name, or use the version of PEFT that it was made with."
    return Finding(Outcome.WARN, said, len(unknown))


def _ask_loading(files: AdapterFiles, subject: str) -> Finding:
    if getattr(files.config, "layer_replication", None):
        text = "layer_replication makes the base deeper when it is loaded, for every other adapter and for the base alone too"
        return Finding(Outcome.WARN, f"{text}. Load it into a model of its own.")
    if why := takes_from_base(files.config):
        text = f"{why}, for every other adapter and for the base alone too"
        return Finding(
            Outcome.WARN, f"{text}. Save it with path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    return passed("Loading it changes nothing of the base.")


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "fields",
        "PEFT knows every field",
        "A misspelt or newer field is ignored with a warning, and its default is used instead.",
        _ask_fields,
        tolerance=0,
        unit="unknown fields",
    ),
    Check(
        "loading",
        "Loading leaves the base as it is",
        "PiSSA and OLoRA take their first factors off the base's weights, again at every loading; an adapter trained otherwise is then wrong.",
        _ask_loading,
    ),
)
"""Asked of each adapter."""
