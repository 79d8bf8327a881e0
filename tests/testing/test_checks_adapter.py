# SPDX-License-Identifier: BSD-3-Clause
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from QEfficient.errors import AdapterMismatchError
from QEfficient.peft.adapters import Adapter
from QEfficient.testing.checks_adapter import CHECKS, AdapterFiles, expected_tensors, refuse_other_shapes
from QEfficient.testing.report import CheckResult, Outcome, Stage
from tests.testing.conftest import Folders
from tests.tiny import SHAPE, lora, save_adapter, save_base


@pytest.fixture
def files(folders: Folders) -> AdapterFiles:
    """Read a healthy adapter."""
    return read(folders.base, folders.one)


def read(base: Path, path: Path) -> AdapterFiles:
    """Read one adapter against one base."""
    adapter = Adapter.load(path, "one")
    expected, own = expected_tensors(AutoConfig.from_pretrained(base), adapter.config, "one")
    return AdapterFiles(path, adapter.config, dict(adapter.tensors), expected, own)


def ask(name: str, files: AdapterFiles) -> CheckResult:
    """Perform one check."""
    return next(c for c in CHECKS if c.name == name).perform(Stage.ADAPTER, files, "one")


@pytest.mark.parametrize("name", [c.name for c in CHECKS])
def test_healthy_adapter_passes(files: AdapterFiles, name: str):
    """No check accuses an adapter that PEFT saved after training."""
    assert ask(name, files).outcome is Outcome.PASS


def test_missing_tensor_is_named(files: AdapterFiles):
    """A targeted module whose tensor is missing fails, and the message names it."""
    gone = sorted(files.tensors)[3]
    del files.tensors[gone]
    found = ask("coverage", files)
    assert (found.outcome, found.measured) == (Outcome.FAIL, 1)
    assert gone in found.message


def test_renamed_tensors_reach_no_module(files: AdapterFiles):
    """Names without PEFT's prefix, which PEFT drops with a warning only, fail for every tensor."""
    count = len(files.tensors)
    for key in list(files.tensors):
        files.tensors[key.removeprefix("base_model.model.")] = files.tensors.pop(key)
    found = ask("coverage", files)
    assert (found.outcome, found.measured) == (Outcome.FAIL, 2 * count)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_fails(files: AdapterFiles, value: float):
    """One NaN or infinity in one tensor fails, and the message names the tensor."""
    key = sorted(files.tensors)[0]
    files.tensors[key] = files.tensors[key].copy()
    files.tensors[key].flat[5] = value
    found = ask("finite", files)
    assert (found.outcome, found.measured) == (Outcome.FAIL, 1)
    assert key in found.message


def test_value_beyond_float16_warns(files: AdapterFiles):
    """A finite value that half precision cannot hold is worth a look."""
    key = sorted(files.tensors)[0]
    files.tensors[key] = np.full_like(files.tensors[key], 1e5)
    assert ask("finite", files).outcome is Outcome.WARN


def test_untrained_adapter_has_no_effect(folders: Folders, tmp_path: Path):
    """An adapter as PEFT initialises it, lora_B = 0, fails."""
    untrained = save_adapter(folders.base, tmp_path / "untrained", scale=0.0)
    found = ask("effect", read(folders.base, untrained))
    assert found.outcome is Outcome.FAIL
    assert "before it was trained" in found.message


def test_one_dead_module_warns(files: AdapterFiles):
    """One module whose lora_B is zero is worth a look, not a failure."""
    key = next(k for k in sorted(files.tensors) if ".lora_B." in k)
    files.tensors[key] = np.zeros_like(files.tensors[key])
    found = ask("effect", files)
    assert found.outcome is Outcome.WARN
    assert key in found.message


def test_file_without_tensors_fails(files: AdapterFiles):
    """A file that is valid and empty fails."""
    files.tensors.clear()
    assert ask("files", files).outcome is Outcome.FAIL


def test_other_base_is_refused(folders: Folders, tmp_path: Path):
    """An adapter of a wider base is refused, with the tensor and both shapes."""
    wider = save_base(
        tmp_path / "wider", type(AutoConfig.from_pretrained(folders.base))(**{**SHAPE, "hidden_size": 128})
    )
    adapter = save_adapter(wider, tmp_path / "adapter")
    with pytest.raises(AdapterMismatchError, match=r"lora_B.weight is \(128, 4\), this base .* need \(64, 4\)"):
        refuse_other_shapes("one", read(folders.base, adapter))


def test_targets_that_the_base_lacks_are_refused(folders: Folders, tmp_path: Path):
    """An adapter whose target modules do not exist in the base is refused by name."""
    gpt2 = save_base(tmp_path / "gpt2", "gpt2")
    adapter = save_adapter(gpt2, tmp_path / "adapter", config=lora(target_modules=["c_attn"]))
    with pytest.raises(AdapterMismatchError, match="'one' does not fit the base"):
        read(folders.base, adapter)
