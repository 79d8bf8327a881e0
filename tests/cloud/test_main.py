# SPDX-License-Identifier: BSD-3-Clause
"""The ``qefficient`` command itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from QEfficient import __version__
from QEfficient.cloud.__main__ import COMMANDS, main

LIGHT = """
import sys
from QEfficient.cloud.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
heavy = {"torch", "transformers", "peft", "onnx", "onnxruntime", "numpy"} & {m.split(".")[0] for m in sys.modules}
print(code or 0, sorted(heavy))
"""


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` names the commands; no argument at all is bad input."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [c for c in COMMANDS if f"  {c} " not in text] == []
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{__version__}\n")


@pytest.mark.parametrize("argv", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_needs_no_heavy_library(argv: list[str]) -> None:
    """Help answers at once: nothing heavy is imported for it, and it starts with how to call the command."""
    done = subprocess.run([sys.executable, "-c", LIGHT, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: qefficient")
    assert done.stdout.splitlines()[-1] == "0 []"


def test_unknown_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt command gets the one that was meant, on stderr, and exit code 2."""
    assert main(["tset"]) == 2
    assert capsys.readouterr().err == "qefficient: unknown command 'tset'; did you mean 'test'?\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["test", "base", "--adaptor", "a=b"], "unknown option '--adaptor'; did you mean '--adapter'?"),
        (["export", "nowhere/at/all", "--adapter", "a=b"], "base folder 'nowhere/at/all' does not exist"),
        (["export", __file__, "--adapter", "a=b"], "is a file; a base is a folder: give '"),
        (["export", "base"], "the following arguments are required: --adapter"),
        (["compile", "nowhere"], "nowhere is not an exported graph: it has no manifest.json"),
        (["finetune", "--modle_name", "x"], "unknown option '--modle_name'; did you mean '--model_name'?"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input is one line on stderr that names it, exit code 2, no traceback."""
    assert main(argv) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert len(out.err.splitlines()) == 1


def test_modules_run_as_scripts() -> None:
    """``python -m QEfficient.cloud.<command>`` is the same as ``qefficient <command>``."""
    for command in COMMANDS:
        module = Path(sys.modules["QEfficient.cloud.__main__"].__file__ or "").with_name(f"{command}.py").read_text()
        assert f'sys.exit(run("{command}"))' in module.replace("run_command", "run")
