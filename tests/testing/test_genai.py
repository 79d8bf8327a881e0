# SPDX-License-Identifier: BSD-3-Clause
"""Models that another tool made: onnxruntime-genai's builder, with an adapter baked in."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from QEfficient import testing
from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.testing.report import Outcome, Report
from tests.testing.conftest import Folders
from tests.tiny import VOCAB, lora, save_adapter, save_base

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def built(root: Path, **fields: Any) -> Report:
    """Build a model with the tool's own command and test its graph."""
    pytest.importorskip("onnxruntime_genai", reason="the builder is an optional extra: genai")
    base = save_base(root / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(base)
    adapter = save_adapter(base, root / "one", config=lora(target_modules=_LINEAR, **fields))
    command = ["-m", "onnxruntime_genai.models.builder", "-i", base, "-o", root / "made", "-p", "fp32", "-e", "cpu"]
    command += ["-c", root / "cache", "--extra_options", f"adapter_path={adapter}", "hf_remote=false"]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, timeout=900)
    return testing.run(base, {"one": adapter}, graph=root / "made", graph_format="genai", only=["graph.*"])


@pytest.mark.slow
def test_sound_model_passes(tmp_path: Path):
    """Plain LoRA is baked in rightly, and nothing is said against it."""
    found = built(tmp_path)
    assert {r.outcome for r in found.results} == {Outcome.PASS}, [r.message for r in found.results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "without"), [({"use_dora": True}, "DoRA's magnitude"), ({"lora_bias": True}, "lora_bias")], ids=str
)
def test_wrong_model_is_refused_with_the_reason(tmp_path: Path, fields: dict[str, Any], without: str):
    """The builder leaves these out without an error."""
    found = {r.name: r for r in built(tmp_path, **fields).results}
    assert found["graph.prefill"].outcome is Outcome.FAIL
    assert f"behaves like 'one' without {without}" in found["graph.features"].message


def test_bad_input_is_refused(folders: Folders, tmp_path: Path):
    """What cannot be tested is said at once."""
    one = {"one": folders.one}
    with pytest.raises(ConfigError, match="unknown graph format 'onnx'"):
        testing.run(folders.base, one, graph=tmp_path, graph_format="onnx")
    with pytest.raises(ConfigError, match="needs the graph's folder"):
        testing.run(folders.base, one, graph_format="genai")
    with pytest.raises(ConfigError, match="has one adapter baked in; 2 were given"):
        testing.run(folders.base, {**one, "two": folders.two}, graph=tmp_path, graph_format="genai")
    with pytest.raises(ArtifactError, match=r"holds no decoder of onnxruntime-genai"):
        testing.run(folders.base, one, graph=tmp_path, graph_format="genai", only=["graph.*"])
