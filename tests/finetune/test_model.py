"""Base, tokenizer and adapter of a training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PeftType, PromptTuningConfig

from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.model import (
    apply_peft,
    count_parameters,
    generate_peft_config,
    load_model_and_tokenizer,
    set_pad_token,
)
from tests.finetune.conftest import make_tokenizer
from tests.tiny import make_base


def test_options_become_a_lora_config() -> None:
    """Options of ours are PEFT's fields; what is not given is PEFT's default."""
    config = generate_peft_config(TrainConfig(lora_r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj"]))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (4, 12, True, {"q_proj"})
    assert config.lora_dropout == LoraConfig().lora_dropout
    assert config.task_type == "CAUSAL_LM"


def test_ia3_from_options() -> None:
    """IA3 takes its own options."""
    options = TrainConfig(peft_method="ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    config = generate_peft_config(options)
    assert isinstance(config, IA3Config)
    assert (config.target_modules, config.feedforward_modules) == ({"k_proj", "down_proj"}, {"down_proj"})


def test_fields_that_peft_leaves_empty_are_accepted(tmp_path: Path) -> None:
    """A saved configuration of prompt tuning is read again, although its token_dim is declared as a number."""
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    config = generate_peft_config(TrainConfig(peft_config_file=tmp_path / "adapter_config.json"))
    assert (config.num_virtual_tokens, config.token_dim) == (4, None)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_file_under_options_under_keywords(tmp_path: Path, suffix: str) -> None:
    """The file is read first, options of the training go over it, keywords over both."""
    path = tmp_path / f"peft.{suffix}"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.5}))  # JSON is YAML
    config = generate_peft_config(TrainConfig(peft_config_file=path, lora_alpha=5), lora_dropout=0.25)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 5, 0.25)


@pytest.mark.parametrize("method", ["oft", "vera", "loha", "prompt_tuning", PeftType.BOFT])
def test_any_method_of_peft(method: Any) -> None:
    """Methods come from PEFT's registry, not from a list of ours."""
    fields = {"num_virtual_tokens": 4} if method == "prompt_tuning" else {}
    config = generate_peft_config(TrainConfig(), peft_type=method, **fields)
    assert config.peft_type == PeftType(getattr(method, "value", method).upper())


def test_a_saved_adapter_config_is_read(tmp_path: Path) -> None:
    """What PEFT saved gives the same method again, to be trained anew."""
    saved = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", inference_mode=True)
    saved.save_pretrained(tmp_path)
    config = generate_peft_config(TrainConfig(peft_config_file=tmp_path / "adapter_config.json"))
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj"})
    assert not config.inference_mode


def test_a_config_of_another_peft_is_read_if_it_asks_for_nothing_unknown(tmp_path: Path) -> None:
    """An unknown field that is empty is dropped from what PEFT saved, but not from what a person wrote."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "peft_version": "0.99.0", "r": 3, "from_the_future": None}))
    assert generate_peft_config(TrainConfig(peft_config_file=path)).r == 3
    for content in ({"peft_version": "0.99.0", "from_the_future": True}, {"from_the_future": None}):
        path.write_text(json.dumps({"peft_type": "LORA", **content}))
        with pytest.raises(ConfigError, match="LoraConfig has no field 'from_the_future'"):
            generate_peft_config(TrainConfig(peft_config_file=path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "lorra"}, r"unknown peft_method 'lorra'; did you mean 'lora'.*PEFT knows adalora,"),
        ({"rr": 4}, r"LoraConfig has no field 'rr'"),
        ({"lora_alfa": 4}, "has no field 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"r": "8"}, 'r of LoraConfig must be int, not "8"'),
        ({"r": True}, "r of LoraConfig must be int, not true"),
        ({"lora_dropout": "no"}, 'lora_dropout of LoraConfig must be float, not "no"'),
        ({"bias": "some"}, r"bias of LoraConfig must be Literal\['none', 'all', 'lora_only'\], not \"some\""),
        ({"target_modules": [1]}, r"target_modules of LoraConfig must be .*list\[str\].*, not \[1\]"),
        ({"peft_type": "ia3", "target_modules": ["a"], "feedforward_modules": ["b"]}, "feedforward_modules"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_peft_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """An unknown method, an unknown field and a wrong type name the field and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        generate_peft_config(TrainConfig(), **fields)


def test_wrong_field_of_a_file_names_the_file(tmp_path: Path) -> None:
    """A mistake in a file is searched there."""
    path = tmp_path / "peft.yaml"
    path.write_text("peft_type: LORA\nrank: 4\n")
    with pytest.raises(ConfigError, match=r"peft\.yaml: LoraConfig has no field 'rank'"):
        generate_peft_config(TrainConfig(peft_config_file=path))


def test_base_from_a_folder(base_folder: Path) -> None:
    """A local folder is a base; keywords reach from_pretrained."""
    config = TrainConfig(model_name=str(base_folder))
    model, tokenizer = load_model_and_tokenizer(config, None, attn_implementation="eager")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == "eager"
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer.pad_token == "<pad>"


def test_base_of_another_type(base_folder: Path) -> None:
    """The option dtype is the type of the weights."""
    model, _ = load_model_and_tokenizer(TrainConfig(model_name=str(base_folder), dtype="bfloat16"), None)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_broken_bases_are_refused(base_folder: Path, tmp_path: Path) -> None:
    """A missing folder, an empty one, a file and a damaged checkpoint are each named in one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "cut").mkdir()
    for path in base_folder.iterdir():
        content = path.read_bytes()
        (tmp_path / "cut" / path.name).write_bytes(content[:2000] if path.suffix == ".safetensors" else content)
    for name, message in {
        "./nowhere": r"model_name: there is no folder '\./nowhere'",
        str(tmp_path / "empty"): r"holds no model: it has no config\.json",
        str(tmp_path / "file"): "is a file; name the folder",
        str(tmp_path / "cut"): "no causal language model can be loaded from",
        "someone/unknown-model": "no tokenizer can be loaded from 'someone/unknown-model'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_model_and_tokenizer(TrainConfig(model_name=name), None)


def test_tokenizer_of_a_larger_base_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Tokens for which the base has no embedding would fail in the middle of the training."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    config = TrainConfig(model_name=str(base_folder), tokenizer_name=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has 260 tokens, but .* embeds only 259"):
        load_model_and_tokenizer(config, None)


def test_padding_token_is_a_dedicated_one_if_there_is_one() -> None:
    """A padding token that the vocabulary has is preferred to EOS; nothing is added."""
    tokenizer = make_tokenizer(pad_token=None)
    set_pad_token(tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<pad>", 259)


def test_tokenizer_without_eos_is_refused() -> None:
    """A model that never saw an end cannot learn to stop."""
    with pytest.raises(ConfigError, match="has no eos_token"):
        set_pad_token(make_tokenizer(eos_token=None))


def test_adapter_is_the_same_for_the_same_seed() -> None:
    """Initial values come from the option seed and leave the global generator alone."""

    def weights(seed: int) -> torch.Tensor:
        model = apply_peft(make_base(), TrainConfig(seed=seed, lora_r=2, target_modules=["q_proj"]))
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))
    base, before = make_base(), torch.random.get_rng_state()
    apply_peft(base, TrainConfig(lora_r=2, target_modules=["q_proj"]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_peft_the_model_is_returned_as_it_is() -> None:
    """use_peft=False trains the base itself."""
    model = make_base()
    assert apply_peft(model, TrainConfig(use_peft=False)) is model
    trained, total = count_parameters(model)
    assert trained == total == sum(p.numel() for p in model.parameters())


def test_parameters_are_counted() -> None:
    """LoRA of rank 2 on the query projections of two layers has 2·2·(64 + 64) parameters."""
    model = apply_peft(make_base(), TrainConfig(lora_r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    assert count_parameters(model)[0] == 512


def test_modules_that_the_base_lacks_are_refused() -> None:
    """PEFT's complaint becomes a ConfigError that names the base."""
    with pytest.raises(ConfigError, match=r"LORA does not fit LlamaForCausalLM: Target modules .*nothing"):
        apply_peft(make_base(), TrainConfig(target_modules=["nothing"]))
