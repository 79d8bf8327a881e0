# SPDX-License-Identifier: BSD-3-Clause
"""A base that numbers its tokens itself and leaves padding out, as RoBERTa does, is not accused of it."""

from pathlib import Path

from QEfficient import testing
from QEfficient.testing.report import Outcome
from scripts.coverage.shrink import tiny_model
from tests.tiny import lora, save_adapter


def test_padding_and_generation(tmp_path: Path) -> None:
    """Padding changes nothing; what transformers' generate() does to the numbers is said, and held against no adapter."""
    tiny_model("roberta").save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "one", config=lora(target_modules=["query", "value"]))
    report = testing.run(
        tmp_path / "base", {"one": adapter}, measure_speed=False, only=["pytorch.generate", "pytorch.padding"]
    )
    found = {(r.subject, r.name): r for r in report.results}
    assert found["base", "pytorch.generate"].outcome is Outcome.WARN
    assert "numbers tokens from 0, the forward pass of this base from 1" in found["base", "pytorch.generate"].message
    assert found["one", "pytorch.generate"].outcome is Outcome.PASS
    assert {found[s, "pytorch.padding"].outcome for s in ("base", "one")} == {Outcome.PASS}
