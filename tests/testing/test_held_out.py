# SPDX-License-Identifier: BSD-3-Clause
"""What held-out faults taught, and faults of training and combining; adapters of virtual tokens through every stage."""

import shutil
from pathlib import Path

import peft
import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, BartConfig, MambaConfig

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.store import record_adapter
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.checks_pytorch import CHECKS
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.selection import Selection
from QEfficient.testing.workload import make_workload
from tests.testing.conftest import Folders
from tests.testing.planted_adapters import Fault, config
from tests.testing.planted_held_out import HELD_OUT_ADAPTER_FAULTS
from tests.testing.planted_pytorch import MODEL_FAULTS, ModelFault
from tests.testing.planted_second import SECOND_ADAPTER_FAULTS, SECOND_MODEL_FAULTS
from tests.testing.planted_third import THIRD_ADAPTER_FAULTS, THIRD_MODEL_FAULTS, paired_tokenizers
from tests.tiny import VOCAB, lora, save_adapter, save_base

FLAGGED = (Outcome.FAIL, Outcome.WARN)
USES = ("pytorch.weighted", "pytorch.gradients", "pytorch.generate")


@pytest.mark.parametrize(
    "fault",
    [f for f in (*HELD_OUT_ADAPTER_FAULTS, *SECOND_ADAPTER_FAULTS, *THIRD_ADAPTER_FAULTS) if f.checks],
    ids=lambda f: f.name,
)
def test_fault_of_a_folder_is_named(folders: Folders, tmp_path: Path, fault: Fault):
    """Each is flagged by a check that is meant for it."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    base = Path(shutil.copytree(folders.base, tmp_path / "base"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders.base), str(base)))
    fault.plant(folder)
    found = examine("one", folder, str(base), AutoConfig.from_pretrained(base), Selection())
    assert {r.name for r in found.results if r.outcome in FLAGGED} & set(fault.checks)


def test_a_tokenizer_that_makes_the_same_tokens_passes(folders: Folders, tmp_path: Path):
    """What a tokenizer's file says of lengths and padding, and in another order, makes no other tokens."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    base = Path(shutil.copytree(folders.base, tmp_path / "base"))
    config(base_model_name_or_path=str(base))(folder)
    paired_tokenizers()(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_id=0)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert (folder / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    only = Selection(only=("adapter.tokenizer",))
    found = examine("one", folder, str(base), AutoConfig.from_pretrained(base), only).results[0]
    assert found.outcome is Outcome.PASS, found.message


def test_a_number_that_is_none_is_named(folders: Folders, tmp_path: Path):
    """The message names field and value of what PEFT would stumble over."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    config(lora_alpha=[8])(folder)
    found = examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), Selection())
    assert "adapter_config.json says lora_alpha [8], which must be a number; correct it" in found.results[0].message


def test_generate_with_a_damaged_cache_is_named(tmp_path: Path):
    """Tokens that are right by chance do not hide a cache that is wrong: the logits behind them are compared, too."""
    base = save_base(tmp_path / "base", "gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    made = Reference(load_base(base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", save_adapter(base, tmp_path / "one", config=lora(target_modules=targets)))
    check = next(c for c in CHECKS if c.name == "generate")
    assert check.perform(Stage.PYTORCH, made, "one").outcome is Outcome.PASS
    next(f for f in THIRD_MODEL_FAULTS if f.name == "generation forgets the first token").plant(made)
    found = check.perform(Stage.PYTORCH, made, "one")
    assert found.outcome is Outcome.WARN
    assert "the logits behind them differ by" in found.message


NEW = [f for f in SECOND_MODEL_FAULTS if f.name == "deleting does nothing"]


@pytest.mark.parametrize("fault", [*NEW, *(f for f in MODEL_FAULTS if f.checks[0] in USES)], ids=lambda f: f.name)
def test_fault_of_use_is_named(folders: Folders, fault: ModelFault):
    """Faults of generating, training on and combining are flagged by their checks."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    made.attach("two", folders.two)
    fault.plant(made)
    check = next(c for c in CHECKS if f"pytorch.{c.name}" == fault.checks[0])
    assert check.perform(Stage.PYTORCH, made, "one").outcome in FLAGGED


OTHERS = [f for f in (*HELD_OUT_ADAPTER_FAULTS, *SECOND_ADAPTER_FAULTS) if not f.checks]


@pytest.mark.parametrize("fault", OTHERS, ids=lambda f: f.name)
def test_another_adapter_is_told_by_the_record(folders: Folders, tmp_path: Path, fault: Fault):
    """What is as sound as the adapter that was meant is told from it by what training wrote down."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    record_adapter(folder)
    assert _record(folder, folders).outcome is Outcome.PASS
    fault.plant(folder)
    found = _record(folder, folders)
    assert found.outcome is Outcome.FAIL
    assert ("use_rslora False -> True" if "rsLoRA" in fault.name else "adapter_model.safetensors") in found.message


def _record(folder: Path, folders: Folders) -> CheckResult:
    only = Selection(only=("adapter.record",))
    return examine("one", folder, str(folders.base), AutoConfig.from_pretrained(folders.base), only).results[0]


def test_a_moved_base_is_no_change_of_the_adapter(folders: Folders, tmp_path: Path):
    """Where the base lies may change; without a record the check says that there is none."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    assert _record(folder, folders).outcome is Outcome.SKIP
    record_adapter(folder)
    config(base_model_name_or_path="elsewhere/base", inference_mode=False)(folder)
    assert _record(folder, folders).outcome is Outcome.PASS


def test_a_weight_that_the_base_reads_itself(tmp_path: Path):
    """Mamba multiplies by dt_proj's weight itself: PEFT's adapter there counts only when merged, which is no fault of the adapter."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    base = save_base(tmp_path / "base", MambaConfig(**shape, initializer_range=0.15))
    adapter = save_adapter(base, tmp_path / "one", config=lora(target_modules=["in_proj", "x_proj", "dt_proj"]))
    made = Reference(load_base(base), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", adapter)
    check = next(c for c in CHECKS if c.name == "merge")
    found = check.perform(Stage.PYTORCH, made, "one")
    assert found.outcome is Outcome.WARN
    assert "reads the weight of dt_proj itself" in found.message
    assert made.cache("one", made.short) == {}
    made.model.base_model.model.backbone.layers[0].mixer.in_proj.get_delta_weight = lambda name: 1.0
    assert check.perform(Stage.PYTORCH, made, "one").outcome is Outcome.FAIL


def test_settings_of_the_base_are_no_fault(folders: Folders):
    """What the base's own settings forbid or force when it generates is no fault of the adapter, and stays as it is."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    settings = made.model.generation_config
    settings.repetition_penalty, settings.forced_eos_token_id, settings.do_sample = 50.0, 2, True
    check = next(c for c in CHECKS if c.name == "generate")
    assert check.perform(Stage.PYTORCH, made, "one").outcome is Outcome.PASS
    assert made.model.generation_config is settings is made.model.get_base_model().generation_config


def test_a_base_that_takes_no_positions(tmp_path: Path):
    """Bart counts the padding in front of a row, whatever it is given: said of the base, and not held against it."""
    shape = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
    }
    base = save_base(
        tmp_path / "base", BartConfig(**shape, init_std=0.15, max_position_embeddings=256, is_decoder=True)
    )
    made = Reference(load_base(base), make_workload(VOCAB, 256, greedy_tokens=8))
    check = next(c for c in CHECKS if c.name == "padding")
    found = check.perform(Stage.PYTORCH, made, "base")
    assert found.outcome is Outcome.WARN
    assert "takes no position_ids" in found.message


def test_replicated_layers_stay_out_of_the_next_adapter(folders: Folders, tmp_path: Path):
    """Reading an adapter that replicates layers does not make the base deeper for the next one."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    config(layer_replication=[[0, 2], [0, 2]])(folder)
    base = AutoConfig.from_pretrained(folders.base)
    examine("one", folder, str(folders.base), base, Selection())
    assert base.num_hidden_layers == 2


VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "tasks": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoder": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}
SLOW = [pytest.param(name, style, marks=pytest.mark.slow) for name in VIRTUAL for style in ("gpt2", "llama")]


@pytest.mark.parametrize(("name", "style"), [("prompt", "qwen3"), *SLOW])
def test_virtual_tokens_pass_every_stage(tmp_path: Path, name: str, style: str):
    """Two adapters of virtual tokens run through every stage; the layers that are compared hold their entries, too."""
    base = save_base(tmp_path / "base", style)
    adapters = {f"{name}{i}": save_adapter(base, tmp_path / f"{i}", seed=i, config=VIRTUAL[name]()) for i in (1, 2)}
    only = ["adapter.*", "pytorch.*", "graph.*"] if style == "qwen3" else []
    found = testing.run(base, adapters, only=only, greedy_tokens=8)
    assert found.verdict is Outcome.PASS, [f"{r.name}: {r.message}" for r in found.with_outcome(Outcome.FAIL)]
    layers = [r for r in found.results if r.name == "graph.layers" and r.subject in adapters]
    assert [len(r.series[0].y) for r in layers] == [4, 4]
