"""The finetune command: from arguments to an adapter that PEFT loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import LlamaConfig

from QEfficient.cloud import finetune
from QEfficient.cloud.__main__ import main as qefficient
from QEfficient.errors import ConfigError
from tests.finetune.conftest import make_tokenizer
from tests.tiny import SHAPE, make_base


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, Any]:
    """A base, data and a place for the result."""
    tokenizer = make_tokenizer()
    make_base(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "a" * i, "completion": "b" * i} for i in range(1, 9)]
    for name, letter in (("train", "a"), ("val", "c")):
        lines = [json.dumps({**row, "prompt": letter * len(row["prompt"])}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "model_name": str(tmp_path / "base"),
        "train_file": tmp_path / "train.jsonl",
        "output_dir": tmp_path / "out",
        "lora_r": 2,
    }


def arguments(needed: dict[str, Any]) -> list[str]:
    """Return options as the command line has them."""
    return [part for name, value in needed.items() for part in (f"--{name}", str(value))]


def test_main_trains_and_returns_metrics(needed: dict[str, Any], tmp_path: Path) -> None:
    """Keywords are options; the folder loads with PEFT; two epochs of two steps are four."""
    metrics = finetune.main(**needed, val_file=tmp_path / "val.jsonl", num_epochs=2)
    assert metrics["train_steps"] == 4
    assert metrics["perplexity"] > 1
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].r == 2


def test_main_refuses_unknown_options(needed: dict[str, Any]) -> None:
    """A misspelt keyword is an error with a suggestion, not ignored."""
    with pytest.raises(ConfigError, match="unknown option 'lrr'; did you mean 'lr'"):
        finetune.main(**needed, lrr=1)


def test_command_says_what_it_did(needed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what is trained, the result and its place; the saved options run again."""
    assert qefficient(["finetune", *arguments(needed), "--val-file", str(tmp_path / "val.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "8 examples" in printed
    assert "perplexity" in printed
    assert f"saved {tmp_path / 'out'}" in printed
    again = ["--config", str(tmp_path / "out" / "train_config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert qefficient(["finetune", *again]) == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_mistakes_are_one_line(needed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong option, a wrong method and a broken row exit with 2 and one line each; nothing is written."""
    Path(needed["train_file"]).write_text('{"prompt": "a"\n')
    for extra, message in (
        (["--lora_rr", "2"], "unknown option '--lora_rr'"),
        (["--peft_method", "lorra", "--lora_r", "2"], "lora_r belongs to peft_method 'lora'"),
        ([], "train.jsonl:1: not a line of JSON"),
    ):
        assert qefficient(["finetune", *arguments(needed), *extra]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not Path(needed["output_dir"]).exists()


def test_mistake_in_the_method_does_not_wait_for_the_base(needed: dict[str, Any]) -> None:
    """The method's fields are checked before the base is loaded."""
    values = {**needed, "model_name": "./nowhere", "lora_r": None, "peft_method": "lorra"}
    with pytest.raises(ConfigError, match="unknown peft_method 'lorra'"):
        finetune.main(**values)


def test_cut_examples_are_reported(needed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """It is said how many examples were longer than the context."""
    finetune.main(**needed, context_length=16)
    assert "8 examples, 1 cut to 16 tokens" in capsys.readouterr().out


def test_an_example_is_shown_before_training(needed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What is masked and what is learned can be seen; it can be switched off."""
    finetune.main(**needed)
    assert "<s>a⟦b</s>⟧" in capsys.readouterr().out
    finetune.main(**needed, show_example=False, overwrite=True)
    assert "⟦" not in capsys.readouterr().out


def test_the_verdict_follows_the_training(
    needed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --test the adapter is held against its base, and the exit code is that of the test."""
    asked: list[Any] = []

    def verdict(argv: Any) -> int:
        asked.append(argv)
        return 1

    monkeypatch.setattr("QEfficient.cloud.test.command", verdict)
    assert qefficient(["finetune", *arguments(needed), "--test"]) == 1
    out = needed["output_dir"]
    assert asked == [[needed["model_name"], f"--adapter=out={out}", f"--report={out}.report"]]
    assert finetune.main(**{**needed, "overwrite": True, "test": True})["test_exit_code"] == 1


def test_full_fine_tuning_saves_a_model(needed: dict[str, Any], tmp_path: Path) -> None:
    """Without PEFT the base itself is trained, and its config still allows a cache."""
    finetune.main(**{**needed, "lora_r": None}, use_peft=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_help_does_not_load_pytorch() -> None:
    """--help names every option and is quick because it loads no library of models."""
    code = (
        "import sys\nfrom QEfficient.cloud.finetune import command\n"
        "try:\n    command(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gradient-accumulation-steps" in done.stdout
