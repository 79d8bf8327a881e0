"""Options of fine-tuning: command line, file, validation."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig, parse_args, read_mapping, resolve, write


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, Any]:
    """The options without which nothing can be trained."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    return {"model_name": "base", "train_file": tmp_path / "train.jsonl", "output_dir": tmp_path / "out"}


def test_options_go_over_the_file(needed: dict[str, Any], tmp_path: Path) -> None:
    """A value of the file holds unless the same option is given; kebab case is read, too."""
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model-name: base\ntrain_file: {needed['train_file']}\noutput_dir: {tmp_path}/out\nlr: 1e-2\nseed: 7\n"
    )
    config = parse_args(["--config", str(path), "--seed", "9"], prog="p")
    assert (config.lr, config.seed, config.model_name) == (0.01, 9, "base")


def test_written_options_give_the_same_training(needed: dict[str, Any], tmp_path: Path) -> None:
    """What is saved beside the adapter can be run again."""
    config = resolve("t", **needed, lora_r=4, target_modules=["q_proj,v_proj"])
    write(config, tmp_path / "again.yaml")
    again = resolve("t", config=tmp_path / "again.yaml")
    again.config = None
    assert again == config
    assert again.target_modules == ["q_proj", "v_proj"]


def test_snake_and_kebab_are_the_same_option(needed: dict[str, Any]) -> None:
    """Both spellings of an option are taken from the command line."""
    rest = ["--train_file", str(needed["train_file"]), "--model-name=base", "--output-dir", str(needed["output_dir"])]
    assert parse_args([*rest, "--train-batch-size", "3"], prog="p").train_batch_size == 3
    assert parse_args([*rest, "--train_batch_size", "3"], prog="p").train_batch_size == 3


def test_unknown_option_of_a_file_is_refused_with_a_suggestion(needed: dict[str, Any], tmp_path: Path) -> None:
    """A misspelt key names the file and the key that was meant."""
    path = tmp_path / "c.yaml"
    path.write_text("contex_length: 3\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown option 'contex_length'; did you mean 'context_length'"):
        resolve("t", config=path, **needed)


def test_unknown_option_is_refused_with_a_suggestion() -> None:
    """A misspelt option names the one that was meant."""
    with pytest.raises(ConfigError, match="'--lora-rr'; did you mean '--lora-r'"):
        parse_args(["--lora-rr", "4"], prog="p")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_name": ""}, "model_name is missing"),
        ({"train_file": None}, "train_file is missing"),
        ({"train_file": Path("nowhere.jsonl")}, r"train_file 'nowhere\.jsonl' is not a file"),
        ({"train_file": Path(__file__).parent}, "is not a file: name a file in it, or give it as dataset"),
        ({"train_file": None, "dataset": __file__}, r"test_config\.py' is a file: give it as train_file"),
        ({"train_batch_size": 0}, "train_batch_size must be 1 or more, not 0"),
        ({"context_length": 2}, "context_length must be 8 or more, not 2"),
        ({"lr": -1.0}, r"lr must be above 0, not -1\.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be at least 0 and below 1, not 1\.0"),
        ({"data_format": "csv"}, "data_format must be one of auto, text, .*, not 'csv'"),
        ({"lr": "fast"}, "lr must be float, not 'fast'"),
        ({"use_peft": False, "lora_r": 4}, "lora_r is given, but use_peft is false"),
        ({"peft_method": "ia3", "lora_r": 4}, "lora_r belongs to peft_method 'lora', not to 'ia3'"),
        ({"feedforward_modules": ["x"]}, "feedforward_modules belongs to peft_method 'ia3', not to 'lora'"),
        ({"use_peft": False, "dtype": "bfloat16"}, "dtype bfloat16 would train the base itself in low precision"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused(needed: dict[str, Any], values: dict[str, Any], message: str) -> None:
    """Each mistake that can be seen without a model names the field and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        resolve("t", **{**needed, **values})


def test_validation_on_training_data_is_refused(needed: dict[str, Any]) -> None:
    """The same file for both is a mistake."""
    with pytest.raises(ConfigError, match="val_file and train_file are the same file"):
        resolve("t", **needed, val_file=needed["train_file"])


def test_a_folder_with_content_is_not_overwritten(needed: dict[str, Any]) -> None:
    """Results are replaced only when that is asked for."""
    needed["output_dir"].mkdir()
    (needed["output_dir"] / "x").touch()
    with pytest.raises(ConfigError, match="is not empty: choose another, or give --overwrite"):
        resolve("t", **needed)
    assert resolve("t", **needed, overwrite=True).overwrite


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.toml", "", r"ends in \.yaml, \.yml or \.json"),
        ("c.json", "{", "not valid JSON"),
        ("c.yaml", "a: [", "not valid YAML"),
        ("c.yaml", "- a", "must hold names and values, not list"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A configuration file that cannot be read says why."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_mapping(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A configuration file that is not there is named."""
    with pytest.raises(ConfigError, match=r"c\.yaml: there is no such configuration file"):
        read_mapping(tmp_path / "c.yaml")


def test_misspelt_attribute_fails() -> None:
    """Slots catch what a plain class would accept."""
    with pytest.raises(AttributeError):
        TrainConfig().learning_rat = 1  # type: ignore[attr-defined]


def test_written_file_is_plain_yaml(needed: dict[str, Any], tmp_path: Path) -> None:
    """Paths are written as text."""
    write(resolve("t", **needed), tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["output_dir"] == str(needed["output_dir"])
