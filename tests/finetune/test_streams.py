"""Rows that stay on disk are the rows that reading all gives."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from QEfficient.cloud.finetune import main
from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig, resolve
from QEfficient.finetune.data import StreamedExamples, load_examples
from QEfficient.finetune.sets import load_sets
from QEfficient.finetune.sources import read_dataset
from QEfficient.finetune.streams import FileRows

ROWS = [{"prompt": "é" * i, "completion": 'b, "c"\nd'} for i in range(1, 6)]


@pytest.fixture
def data(tmp_path: Path, write_rows: Callable[..., Path]) -> dict[str, Path]:
    """The same rows as JSONL and CSV, with a byte-order mark, empty lines and line breaks in quotes."""
    lines = write_rows("\ufeff" + json.dumps(ROWS[0]), "", *ROWS[1:], "")
    table = tmp_path / "data.csv"
    quoted = "".join('{},"{}"\n'.format(r["prompt"], r["completion"].replace('"', '""')) for r in ROWS)
    table.write_text(f"prompt,completion\n\n{quoted}", encoding="utf-8-sig")
    return {"jsonl": lines, "csv": table}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_files_are_read_by_offset(data: dict[str, Path], kind: str, tokenizer: Any) -> None:
    """In any order, and more than once; broken rows are found beforehand."""
    streamed = StreamedExamples(FileRows(data[kind]), kind, tokenizer, context_length=64)
    whole = load_examples(data[kind], tokenizer, context_length=64)
    assert list(streamed) == whole
    assert [streamed[i] for i in (3, 0, -1)] == [whole[i] for i in (3, 0, -1)]
    with pytest.raises(IndexError, match="there is no example 5, there are 5"):
        streamed[5]


def test_broken_rows_are_found_beforehand(write_rows: Callable[..., Path], tokenizer: Any) -> None:
    """The error names file and line, as without streaming."""
    broken = write_rows({"text": "a"}, {"text": 3}, name="broken.jsonl")
    with pytest.raises(ConfigError, match=r"broken\.jsonl:2: 'text' must be text, not 3"):
        StreamedExamples(FileRows(broken), "broken", tokenizer, context_length=64)


def test_parquet_and_datasets_are_mapped(data: dict[str, Path], tmp_path: Path, tokenizer: Any) -> None:
    """A Parquet file, a folder saved by the library and one laid out as on the Hub give the same examples."""
    datasets = pytest.importorskip("datasets", reason="an optional library")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    whole = load_examples(data["jsonl"], tokenizer, context_length=512)
    for given in (
        {"train_file": tmp_path / "data.parquet"},
        {"dataset": str(tmp_path / "saved")},
        {"dataset": str(tmp_path / "hub")},
    ):
        for streaming in (False, True):
            config = TrainConfig(model_name="x", streaming=streaming, **given)
            assert list(load_sets(config, tokenizer).train) == whole, given


def test_folder_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    """Splits and configurations are the library's business; what is missing or broken is named."""
    pytest.importorskip("datasets", reason="an optional library")
    folder = tmp_path / "hub"
    for config in ("main", "other"):
        (folder / config).mkdir(parents=True)
        (folder / config / "train.jsonl").write_text(json.dumps({"text": config}) + "\n")
    parts = "".join(f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in ("main", "other"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    assert [row for _, row in read_dataset(str(folder), "train", "other")] == [{"text": "other"}]
    with pytest.raises(ConfigError, match="Config name is missing"):
        list(read_dataset(str(folder), "train"))
    with pytest.raises(ConfigError, match="Unknown split"):
        list(read_dataset(str(folder), "dev", "main"))
    (folder / "main" / "train.jsonl").write_text(json.dumps({"text": "changed"}) + "\n")
    assert [row for _, row in read_dataset(str(folder), "train", "main")] == [{"text": "changed"}]
    (folder / "main" / "train.jsonl").write_text('{"text": ')
    with pytest.raises(ConfigError, match="hub' cannot be loaded"):
        list(read_dataset(str(folder), "train", "main"))


def test_preprocessing_of_streamed_rows(data: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    """Rows for which it returns None take no number."""
    (tmp_path / "mine.py").write_text(
        "def odd(row):\n    n = len(row['prompt'])\n    return {'text': 'x' * n} if n % 2 else None\n"
    )
    for streaming in (False, True):
        config = TrainConfig(train_file=data["csv"], preprocess=f"{tmp_path / 'mine.py'}:odd", streaming=streaming)
        found = load_sets(config, tokenizer).train
        assert [tokenizer.decode(e.input_ids) for e in found] == ["<s>x</s>", "<s>xxx</s>", "<s>xxxxx</s>"]


def test_validation_is_watched_for(data: dict[str, Path], write_rows: Callable[..., Path], tokenizer: Any) -> None:
    """Validation rows that are streamed for training, too, are left out."""
    new = {"prompt": "new", "completion": "row"}
    val = write_rows(ROWS[2], new, name="val.jsonl")
    config = TrainConfig(train_file=data["csv"], val_file=val, streaming=True)
    sets = load_sets(config, tokenizer)
    assert [tokenizer.decode(e.input_ids) for e in sets.val] == ["<s>newrow</s>"]
    assert sets.notes == ["1 validation examples are training data, too: left out"]
    with pytest.raises(ConfigError, match="all 1 validation examples"):
        load_sets(TrainConfig(train_file=val, val_file=write_rows(new, name="v.jsonl"), streaming=True), tokenizer)


def test_streaming_trains_the_same(data: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    """The adapter is equal bit for bit to that of rows in memory."""
    for streaming in (False, True):
        out = tmp_path / str(streaming)
        main(model_name=str(base_folder), train_file=data["csv"], output_dir=out, streaming=streaming, lr=1e-2)
    files = [(tmp_path / s / "adapter_model.safetensors").read_bytes() for s in ("False", "True")]
    assert files[0] == files[1]


def test_what_streaming_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Path]) -> None:
    """What needs all rows at once is refused; a missing library is named."""
    with pytest.raises(ConfigError, match="streaming keeps no lengths and no rows: leave packing"):
        resolve("test", model_name="x", train_file=data["csv"], streaming=True, packing=True)
    with pytest.raises(ConfigError, match="dataset_config is given without a dataset"):
        resolve("test", model_name="x", train_file=data["csv"], dataset_config="main")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs datasets, which is not installed"):
        load_sets(TrainConfig(train_file=tmp_path / "x.parquet", streaming=True), None)
