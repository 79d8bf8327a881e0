# SPDX-License-Identifier: BSD-3-Clause
"""Tasks of lm-evaluation-harness: a small one of our own, without a network."""

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from QEfficient import testing
from QEfficient.errors import ConfigError
from QEfficient.testing.check import Finding
from QEfficient.testing.harness import CHECKS, Scores, evaluate_tasks
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome, Stage
from tests.testing.conftest import Folders

WORDS = {f"w{i}": i for i in range(3, 128)} | {"<pad>": 0, "<s>": 1, "</s>": 2}


def test_absent_harness_is_named(reference: Reference, monkeypatch: pytest.MonkeyPatch):
    """Without the harness the error says what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"efficient-transformers\[lm-eval\]"):
        evaluate_tasks(reference, "base", ["arc_easy"], ["base"])


@pytest.mark.parametrize(
    ("value", "outcome"), [(0.5, Outcome.PASS), (0.42, Outcome.PASS), (0.2, Outcome.WARN), (float("nan"), Outcome.FAIL)]
)
def test_a_task_is_judged_by_its_error(value: float, outcome: Outcome):
    """An accuracy far below the base's is worth a look, one within two standard errors is not."""
    scores = Scores({"base": {("t", "acc"): (0.5, 0.05)}, "one": {("t", "acc"): (value, 0.05)}})
    found: Finding = CHECKS[0].ask(scores, "one")
    assert found.outcome is outcome
    assert CHECKS[0].perform(Stage.QUALITY, scores, "base").outcome is Outcome.PASS


@pytest.mark.slow
def test_own_task_runs_on_base_and_adapter(folders: Folders, tmp_path: Path):
    """A YAML file with local rows gives an accuracy of base and adapter; an unknown task is refused."""
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed")
    copied = folders.copy(tmp_path)
    words = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<pad>"
    ).save_pretrained(copied.base)
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w7", "w9"], "answer": i % 2} for i in range(10, 18)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "own.yaml"
    task.write_text(
        f"""task: qefficient_own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    options = {"only": ["adapter.files"], "measure_speed": False}
    report = testing.run(copied.base, {"one": copied.one}, lm_eval=[str(task)], **options)
    scores = {m.subject: m.value for m in report.measurements if m.metric == "lm_eval.qefficient_own.acc"}
    assert scores.keys() == {"base", "one"}
    assert all(0 <= v <= 1 and (v * 8).is_integer() for v in scores.values())
    assert {r.outcome for r in report.results if r.name == "quality.tasks"} <= {Outcome.PASS, Outcome.WARN}
    with pytest.raises(ConfigError, match="knows no task 'nothing_like_it'"):
        testing.run(copied.base, {"one": copied.one}, lm_eval=["nothing_like_it"], **options)
