# SPDX-License-Identifier: BSD-3-Clause
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from peft import AdamssConfig
from transformers import AutoConfig

from QEfficient.errors import AdapterMismatchError
from QEfficient.testing.adapter_files import AdapterFiles, read_adapter, refuse_other_shapes
from QEfficient.testing.adapter_stage import Examined, examine, examine_all, examine_there, in_processes
from QEfficient.testing.checks_adapter import CHECKS
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.selection import Selection
from tests.testing.conftest import Folders
from tests.testing.planted_adapters import ADAPTER_FAULTS, Fault, config
from tests.tiny import SHAPE, lora, save_adapter, save_base


@pytest.fixture
def files(folders: Folders) -> AdapterFiles:
    """Read a healthy adapter."""
    return read(folders.base, folders.one)


def read(base: Path, path: Path) -> AdapterFiles:
    """Read one adapter against one base."""
    return read_adapter("one", path, str(base), AutoConfig.from_pretrained(base))


def ask(name: str, files: AdapterFiles) -> CheckResult:
    """Perform one check."""
    return next(c for c in CHECKS if c.name == name).perform(Stage.ADAPTER, files, "one")


@pytest.mark.parametrize("name", [c.name for c in CHECKS])
def test_healthy_adapter_passes(files: AdapterFiles, name: str):
    """No check accuses an adapter that PEFT saved after training."""
    found = ask(name, files)
    assert found.outcome is (Outcome.SKIP if name in ("tokenizer", "template", "record") else Outcome.PASS), (
        found.message
    )


def look(folders: Folders, path: Path) -> Examined:
    """Examine one folder as a run does."""
    config = AutoConfig.from_pretrained(folders.base)
    return examine("one", path, str(folders.base), config, Selection())


@pytest.mark.parametrize("fault", ADAPTER_FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_named(folders: Folders, tmp_path: Path, fault: Fault):
    """Each fault of a folder is flagged by the check that is there for it, first of all or with one that follows."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    fault.plant(folder)
    found = look(folders, folder)
    flagged = [r for r in found.results if r.outcome in (Outcome.FAIL, Outcome.WARN)]
    assert set(fault.checks) & {r.name for r in flagged}, [f"{r.name}: {r.message}" for r in flagged]


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


def rewrite(path: Path, **fields: object) -> None:
    """Edit a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_base_of_the_same_shape_is_told_apart(folders: Folders, tmp_path: Path):
    """A base of the same shape and other weights fails, with a tensor; a copy of the right base passes."""
    other = save_base(tmp_path / "other", seed=5)
    copy = Path(shutil.copytree(folders.base, tmp_path / "copy"))
    found = ask("base", read(other, folders.one))
    assert found.outcome is Outcome.FAIL
    assert "other weights of the same shape, first" in found.message
    assert ask("base", read(copy, folders.one)).outcome is Outcome.PASS


def test_base_of_another_structure_is_told_apart(folders: Folders, tmp_path: Path):
    """A recorded base of another structure fails, with both values."""
    other = save_base(tmp_path / "other", "qwen2")
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(other))
    found = ask("base", read(folders.base, folder))
    assert found.outcome is Outcome.FAIL
    assert "model_type 'qwen2', here 'llama'" in found.message


def test_shapes_that_depend_on_weights_are_not_compared(folders: Folders, tmp_path: Path):
    """AdaMSS counts clusters of the base's weights: only names are known before the base is loaded, and those are compared."""
    pytest.importorskip("sklearn", reason="AdaMSS needs scikit-learn")
    adamss = AdamssConfig(r=8, num_subspaces=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = save_adapter(folders.base, tmp_path / "adamss", config=adamss)
    base_config = AutoConfig.from_pretrained(folders.base)
    found = examine("one", folder, str(folders.base), base_config, Selection())
    assert found.error is None
    assert [r.message for r in found.results if r.outcome is Outcome.FAIL] == []
    config(target_modules=["q_proj", "v_proj"])(folder)
    found = examine("one", folder, str(folders.base), base_config, Selection())
    assert [r.name for r in found.results if r.outcome is Outcome.FAIL] == ["adapter.coverage"]


def test_edited_rank_is_told_with_both_ranks(folders: Folders, tmp_path: Path):
    """An edited r is told apart from another base: both ranks are named."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    rewrite(folder / "adapter_config.json", r=16)
    assert "have rank 4, its configuration says 16" in ask("shapes", read(folders.base, folder)).message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "PEFT merges it wrongly"),
        ({"modules_to_save": ["lm_head"]}, "the two are torn apart"),
        ({}, "touches neither"),
    ],
)
def test_tied_weights(tmp_path: Path, fields: dict[str, list[str]], says: str):
    """On a base with tied embeddings, an adapter of one of the two is told about, and why."""
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(base, tmp_path / "one", config=lora(**{"target_modules": ["q_proj"], **fields}))
    found = ask("tied", read(base, adapter))
    assert says in found.message
    assert found.outcome is (Outcome.WARN if fields else Outcome.PASS)


def test_tokenizer_of_another_base_fails(folders: Folders, tmp_path: Path):
    """A token with another id than in the base's tokenizer fails, with token and both ids."""
    base = Path(shutil.copytree(folders.base, tmp_path / "base"))
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    (base / "added_tokens.json").write_text('{"<a>": 5, "<b>": 6}')
    (folder / "added_tokens.json").write_text('{"<a>": 6, "<b>": 5}')
    assert "first '<b>': 5, base 6" in ask("tokenizer", read(base, folder)).message
    (folder / "added_tokens.json").write_text('{"<a>": 5, "<b>": 6, "<new>": 7}')
    assert "'<new>', but no embedding was trained" in ask("tokenizer", read(base, folder)).message


@pytest.mark.parametrize("jobs", [1, 2])
def test_unreadable_adapter_takes_no_other_along(folders: Folders, tmp_path: Path, jobs: int):
    """A truncated adapter fails alone, and a copy is called a copy, in this process and in others."""
    broken = Path(shutil.copytree(folders.two, tmp_path / "broken"))
    ADAPTER_FAULTS[0].plant(broken)
    given = {"one": folders.one, "broken": broken, "twin": folders.one}
    config = AutoConfig.from_pretrained(folders.base)
    found = examine_all(given, str(folders.base), config, Selection(), lambda *a: None, jobs=jobs)
    assert list(found) == list(given)
    assert [name for name, one in found.items() if one.error] == ["broken"]
    assert "is damaged" in found["broken"].results[0].message
    last = found["twin"].results[-1]
    assert (last.name, last.outcome) == ("adapter.duplicate", Outcome.WARN)
    assert "that of 'one'" in last.message


def hangs_at_two(name: str, path: str | Path, base: str, selection: Selection) -> Examined:
    """Hang at one adapter."""
    if name == "two":
        time.sleep(60)
    return examine_there(name, path, base, selection)


def test_hanging_adapter_takes_no_other_along(folders: Folders):
    """An adapter whose examination hangs is given up after a time; the others are examined."""
    given = {"one": folders.one, "two": folders.two, "three": folders.one}
    found = dict(in_processes(given, str(folders.base), Selection(), 2, 10, hangs_at_two))
    assert [name for name, one in found.items() if one.error] == ["two"]
    assert "no answer within 10 s" in found["two"].results[0].message


@pytest.mark.parametrize("recorded", ["/home/somebody/models/base-7b", r"C:\models\base-7b", "owner/base-7b"])
def test_a_base_of_another_machine_is_no_fault(folders: Folders, tmp_path: Path, recorded: str):
    """A recorded place that is not here can only be pointed out: the adapter is sound, and is served."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    config(base_model_name_or_path=recorded)(folder)
    only = Selection(only=("adapter.base",))
    found = examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), only).results[0]
    assert found.outcome is Outcome.WARN, found.message
    assert f"It records {recorded!r} as its base" in found.message
