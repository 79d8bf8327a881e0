# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.test import parse_adapters
from QEfficient.errors import ConfigError
from tests.testing.faults import copied, scale_weight
from tests.tiny import SHAPE, STYLES, save_adapter, save_base


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, two adapters, and one of a wider base."""
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    save_adapter(base, root / "one", seed=1)
    save_adapter(base, root / "two", seed=2)
    wide = save_base(root / "wide", type(STYLES["llama"])(**{**SHAPE, "hidden_size": 128}))
    save_adapter(wide, root / "wider", seed=3)
    return root


@pytest.fixture(scope="module")
def graph(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the two adapters."""
    from QEfficient import QEffAutoPeftModelForCausalLM

    model = QEffAutoPeftModelForCausalLM.from_pretrained(models / "one", "one")
    model.load_adapter(models / "two", "two")
    return model.export(tmp_path_factory.mktemp("graphs") / "tiny").parent


def ask(models: Path, *words: str, one: str = "one", two: str = "two") -> int:
    """Run the command on the two adapters, quickly."""
    given = ["--adapter", f"one={models / one}", "--adapter", f"two={models / two}"]
    return run("test", [str(models / "base"), *given, "--no-speed", "--tokens", "4", *words])


def test_pass_is_0(models: Path, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Sound adapters exit with 0; verdict, table and the report's path are printed, three files written."""
    assert ask(models, "--graph", str(graph), "--report", str(tmp_path / "report")) == 0
    out = capsys.readouterr().out
    assert out.startswith(" PASS   All 2 adapters function")
    assert f"report: {tmp_path / 'report' / 'report.html'}" in out.replace("\n", "")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["verdict"] == "pass"


def test_changed_weight_is_1(models: Path, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A single number of the graph's weights changed by 5 % exits with 1 and names the file."""
    folder = copied(graph, tmp_path)
    path = scale_weight(folder, "layers.1.mlp.down_proj.weight", elements=slice(5, 6))
    assert ask(models, "--graph", str(folder)) == 1
    assert f"{path.name} changed since it was written" in " ".join(capsys.readouterr().out.split())


def test_swapped_adapters_are_1(models: Path, graph: Path, capsys: pytest.CaptureFixture[str]):
    """Two adapters given the wrong way round exit with 1 and are called swapped."""
    assert ask(models, "--graph", str(graph), one="two", two="one") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("FAIL 0 of 2 adapters function")
    assert "the two were swapped" in out


def test_edited_alpha_is_1(models: Path, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An adapter whose lora_alpha was changed after the export exits with 1 and both scalings are given."""
    edited = Path(shutil.copytree(models / "one", tmp_path / "one"))
    config = edited / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 12'))
    assert ask(models, "--graph", str(graph), one=str(edited)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "The graph scales the adapter by 2, its configuration now says 3" in out
    assert "1 of 2 adapters function" in out


def missing(folder: Path) -> None:
    """Remove the whole adapter."""
    shutil.rmtree(folder)


def unconfigured(folder: Path) -> None:
    """Remove the configuration."""
    (folder / "adapter_config.json").unlink()


def truncated(folder: Path) -> None:
    """Cut the tensors' file."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "does not exist"),
        (unconfigured, "has no adapter_config.json"),
        (truncated, "adapter_model.safetensors is damaged or not a safetensors file"),
    ],
)
def test_damaged_adapter_is_2(
    models: Path, tmp_path: Path, damage: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
):
    """What cannot be tested exits with 2 and one line, no traceback; beside a sound adapter it is a failed check."""
    folder = Path(shutil.copytree(models / "one", tmp_path / "one"))
    damage(folder)
    given = [str(models / "base"), "--adapter", f"one={folder}"]
    assert run("test", given) == 2
    refused(capsys, says)
    assert run("test", [*given, "--adapter", f"two={models / 'two'}", "--only", "adapter.*"]) == 1
    assert "".join(says.split()) in "".join(capsys.readouterr().out.split())


def test_adapter_of_another_base_is_2(models: Path, capsys: pytest.CaptureFixture[str]):
    """An adapter of another base's shapes exits with 2, with tensor and shapes."""
    assert run("test", [str(models / "base"), "--adapter", f"one={models / 'wider'}"]) == 2
    refused(capsys, "adapter 'one' does not fit the base: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--grph", "x"], "unknown option '--grph'; did you mean '--graph'?"),
        (["--only", "graph.prefil"], "no check is called 'graph.prefil'; did you mean 'graph.prefill'?"),
        (["--adapter", "nothing"], "--adapter takes NAME=PATH, for example sql=adapters/sql, not 'nothing'"),
        (["--adapter", "one=elsewhere"], "two adapters are called 'one'"),
        (["--adapter", "base=elsewhere"], "an adapter cannot be called 'base'"),
        (["--adapter", "a.b=elsewhere"], "adapter name 'a.b' may hold letters"),
        (["--graph", "not/there"], "graph folder 'not/there' does not exist"),
        (["--tokens", "0"], "--tokens must be at least 1, not 0"),
        (["--max-overhead", "much"], "--max-overhead must be a share"),
    ],
)
def test_bad_words_are_2(models: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    """A wrong option exits with 2 and one line that says what to do."""
    assert ask(models, *words) == 2
    refused(capsys, says)


def refused(capsys: pytest.CaptureFixture[str], says: str) -> None:
    """Check that one line was printed, on stderr, with the reason."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert captured.out == ""


def test_missing_base_is_2(models: Path, capsys: pytest.CaptureFixture[str]):
    """A base folder that is not there exits with 2."""
    assert run("test", [str(models / "none"), "--adapter", f"one={models / 'one'}"]) == 2
    refused(capsys, "does not exist")


@pytest.mark.parametrize("pair", ["a", "=path", "a=", ""])
def test_pairs_need_both_parts(pair: str):
    """A name without a path, and a path without a name, are refused."""
    with pytest.raises(ConfigError, match="takes NAME=PATH"):
        parse_adapters([pair])


def test_paths_may_hold_an_equals_sign():
    """Only the first equals sign separates name and path."""
    assert parse_adapters(["a=x=y", "b=z"]) == {"a": "x=y", "b": "z"}


def test_help_needs_no_torch():
    """``--help`` shows the options without importing torch or transformers."""
    code = (
        "import sys\nfrom QEfficient.cloud.__main__ import main\n"
        "try:\n    main(['test', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "--adapter NAME=PATH" in done.stdout
    assert done.stdout.rstrip().endswith("[]")
