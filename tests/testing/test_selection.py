# SPDX-License-Identifier: BSD-3-Clause
import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from QEfficient import testing
from QEfficient.cloud.test import diff, parse_skips
from QEfficient.errors import ConfigError
from QEfficient.testing import baseline, document, quality, render_json, render_markdown
from QEfficient.testing.check import Check, Finding, failed
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome, Report
from tests.testing.conftest import Folders
from tests.testing.sample import sample

ROOT = Path(__file__).parents[2]


def test_skipped_check_says_why(folders: Folders):
    """A check that is skipped on request is in the report, with the reason."""
    found = testing.run(folders.base, {"one": folders.one}, only=["adapter.*"], skip={"adapter.base": "moved folder"})
    result = next(r for r in found.results if r.name == "adapter.base")
    assert (result.outcome, result.message) == (Outcome.SKIP, "Skipped on request: moved folder")


def test_skip_needs_a_reason_and_a_check(folders: Folders):
    """A reason is needed, and the check must exist."""
    assert parse_skips(["a.b=x=y"]) == {"a.b": "x=y"}
    with pytest.raises(ConfigError, match="takes CHECK=REASON"):
        parse_skips(["pytorch.merge"])
    with pytest.raises(ConfigError, match=r"did you mean 'pytorch\.merge'"):
        testing.run(folders.base, {"one": folders.one}, skip={"pytorch.merg": "why"})


def own_check(files: object, subject: str) -> Finding:
    """Fail."""
    return failed("Our own rule.")


def entry(checks: object) -> list[SimpleNamespace]:
    """Return what an installed package would register."""
    return [SimpleNamespace(value="team:CHECKS", load=lambda: checks)]


def test_a_package_adds_a_check(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """A check of another package is asked like ours; one with a taken name is refused."""
    check = Check("team_rule", "Team rule", "Because.", own_check)
    monkeypatch.setattr(metadata, "entry_points", lambda group: entry([("adapter", check)]))
    found = testing.run(folders.base, {"one": folders.one}, only=["adapter.*"])
    assert [r.message for r in found.with_outcome(Outcome.FAIL)] == ["Our own rule."]
    taken = dataclasses.replace(check, name="coverage")
    monkeypatch.setattr(metadata, "entry_points", lambda group: entry([("adapter", taken)]))
    with pytest.raises(ConfigError, match="already has one"):
        testing.run(folders.base, {"one": folders.one})


def worse(report: Report, **fields: object) -> Report:
    """Return a report whose passing results are changed."""
    results = [dataclasses.replace(r, **fields) if r.outcome is Outcome.PASS else r for r in report.results]
    return dataclasses.replace(report, results=results)


def test_regression_is_told_from_noise():
    """An error ten times as large, a failure and a lost check are regressions; three times as large is noise."""
    before = sample(fail=False)
    assert baseline.compare(before, before) == []
    assert baseline.compare(before, worse(before, measured=9e-6)) == []
    assert all(c.worse for c in baseline.compare(before, worse(before, measured=9e-5)))
    assert [c.what for c in baseline.compare(before, sample(fail=True)) if c.worse] == ["graph.decode"]
    missing = dataclasses.replace(before, results=[r for r in before.results if r.name != "graph.decode"])
    assert "was asked before" in baseline.compare(before, missing)[0].text


def test_slower_than_the_baseline():
    """A ratio of speeds that fell by more than its noise is a regression, one of both engines alike is none."""
    before, after = sample(fail=False), sample(fail=False)
    after.measurements = [dataclasses.replace(m, value=m.value / 2) for m in after.measurements]
    assert baseline.compare(before, after) == []
    after.measurements = [
        dataclasses.replace(m, value=m.value / 2) if m.engine == "program" else m for m in after.measurements
    ]
    assert "decode_tokens_per_second" in [c.what for c in baseline.compare(before, after) if c.worse]


def test_run_against_a_baseline(folders: Folders, tmp_path: Path):
    """The same run passes against its own report; a report that is none is refused."""
    given = {"one": folders.one}
    testing.run(folders.base, given, only=["adapter.*"], report_dir=tmp_path)
    found = testing.run(folders.base, given, only=["adapter.*"], baseline=tmp_path)
    assert [r.outcome for r in found.results if r.name == "baseline.regressions"] == [Outcome.PASS] * 2
    with pytest.raises(ConfigError, match="does not exist"):
        testing.run(folders.base, given, baseline=tmp_path / "none.json")


def test_diff_of_two_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """``--diff`` exits with 1 if something is worse, and says what."""
    for name, fail in (("a", False), ("b", True)):
        (tmp_path / f"{name}.json").write_text(render_json.render(sample(fail=fail)))
    assert diff([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "worse  adapter-1  graph.decode: pass → fail" in capsys.readouterr().out
    assert diff([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0


@pytest.mark.parametrize("adapters", [1, 300])
def test_markdown_is_short(adapters: int):
    """Verdict and reason come first; hundreds of adapters stay readable; messages do not become markup."""
    text = render_markdown.render(sample(adapters))
    assert text.startswith("### ❌ 0 of 1" if adapters == 1 else "### ❌ 299 of 300")
    assert r"\<PyTorch\>" in text
    assert len(text.splitlines()) < 130


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of single letters."""
    letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    made = Tokenizer(models.WordLevel({"<unk>": 0, **letters}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


def test_eval_gives_loss_and_perplexity(folders: Folders, tmp_path: Path):
    """Loss is that of the completion's tokens, of base and adapter, as PyTorch computes it."""
    models_ = folders.copy(tmp_path)
    tokenizer(models_.base)
    data = tmp_path / "data.jsonl"
    rows = [{"text": "the river had risen"}, {"prompt": "a b", "completion": " c d"}]
    data.write_text("\n".join(json.dumps(r) for r in rows))
    found = testing.run(models_.base, {"one": models_.one}, only=["adapter.files"], eval_data=data)
    loss = {m.subject: m.value for m in found.measurements if m.metric == "eval_loss"}
    assert set(loss) == {"base", "one"}
    assert 1 < loss["base"] < 20
    result = next(r for r in found.results if r.name == "quality.loss" and r.subject == "one")
    assert result.facts["rows"] == 2


def test_loss_is_the_completion_s(reference: Reference):
    """Only tokens behind the prompt are judged."""
    import torch

    row = reference.workload.rows[0]
    logits = torch.from_numpy(reference.logits("one", row))
    want = torch.nn.functional.cross_entropy(logits[9:-1], torch.from_numpy(row[10:]))
    got = quality.evaluate(reference, [quality.Row(row, 10)], ("one",), lambda n: None)
    assert got.loss("one") == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize(
    ("line", "says"), [("{", "line 1 is not JSON"), ('{"question": 1}', "must have 'text'"), ("", "holds no text")]
)
def test_bad_text_is_refused(tmp_path: Path, line: str, says: str):
    """A row that is something else is refused with its number."""
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=says):
        quality.read_rows(tmp_path / "data.jsonl", lambda text: [1, 2])


@pytest.mark.parametrize("page", document.PAGES)
def test_documentation_is_up_to_date(page: str):
    """The generated pages say what the code says; ``python -m QEfficient.testing.document docs`` renews them."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == document.PAGES[page]()


def plugin(folders: Folders, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin in an empty folder."""
    installed = any(e.value == "QEfficient.testing.pytest_plugin" for e in metadata.entry_points(group="pytest11"))
    load = [] if installed else ["-p", "QEfficient.testing.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *load, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)


def test_plugin_makes_an_item_of_each_check(folders: Folders, tmp_path: Path):
    """Selected checks run; the failing one fails with its message, the others pass, JUnit has them all."""
    (tmp_path / "models").mkdir()
    copy = folders.copy(tmp_path / "models")
    config = copy.one / "adapter_config.json"
    config.write_text(config.read_text().replace('"CAUSAL_LM"', '"SEQ_CLS"'))
    (copy.one / "optimizer.pt").write_bytes(b"0")  # which is a warning
    words = ["--peft-base", str(copy.base), "--peft-adapter", f"one={copy.one}", "-k", "adapter.", "--junitxml=j.xml"]
    done = plugin(folders, tmp_path, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 17 passed" in done.stdout
    assert "FAILED peft::adapter.task[one]" in done.stdout
    assert "It was trained for SEQ_CLS" in done.stdout
    assert "PytestWarning: adapter.leftovers[one]" in done.stdout
    cases = {c.get("name"): c for c in ElementTree.parse(tmp_path / "j.xml").iter("testcase")}
    assert {c.get("classname") for c in cases.values()} == {"peft"}
    failures = {name: c.find("failure") for name, c in cases.items() if c.find("failure") is not None}
    assert list(failures) == ["adapter.task[one]"]
    assert failures["adapter.task[one]"].get("message").startswith("It was trained for SEQ_CLS")


def test_plugin_says_once_why_nothing_can_be_tested(folders: Folders, tmp_path: Path):
    """A base that is not there is one line in each item, without our frames, and is looked for once."""
    words = [
        "--peft-base",
        str(tmp_path / "nowhere"),
        "--peft-adapter",
        f"one={folders.one}",
        "-k",
        "adapter.files or adapter.task",
    ]
    done = plugin(folders, tmp_path, *words)
    assert done.returncode == 1
    assert done.stdout.count("Nothing could be tested: ") >= 2
    assert "nowhere" in done.stdout
    assert "conformance.py" not in done.stdout


def test_plugin_refuses_a_skip_without_reason(folders: Folders, tmp_path: Path):
    """``--peft-skip`` without a reason is refused before anything runs."""
    words = ["--peft-base", str(folders.base), "--peft-adapter", f"one={folders.one}", "--peft-skip", "pytorch.merge"]
    done = plugin(folders, tmp_path, *words)
    assert done.returncode == 4
    assert "--peft-skip takes CHECK=REASON" in done.stderr


def test_plugin_is_off_without_options(folders: Folders, tmp_path: Path):
    """Without its options it adds nothing and imports nothing of weight; half of them is refused."""
    (tmp_path / "test_x.py").write_text(
        "import sys\ndef test_x():\n    assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
    )
    assert "1 passed" in plugin(folders, tmp_path).stdout
    assert "belong together" in plugin(folders, tmp_path, "--peft-base", "x").stderr
