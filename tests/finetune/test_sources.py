"""Where rows come from, what is held out, what is shown."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example, held_out, load_examples, rendered
from QEfficient.finetune.sets import load_sets
from QEfficient.finetune.sources import load_function, read_csv, read_dataset, read_file

ROWS = [{"prompt": "é" * i, "completion": 'b, "c"\n'} for i in range(1, 5)]


def read(path: Path) -> list[Any]:
    """Return the rows of a file without their places."""
    return [row for _, row in read_file(path)]


def test_csv_holds_the_same_rows(tmp_path: Path) -> None:
    """Quotes, commas, line breaks and a byte-order mark are CSV's business."""
    path = tmp_path / "data.csv"
    path.write_text(
        "prompt,completion\n" + "".join(f'{r["prompt"]},"b, ""c""\n"\n' for r in ROWS), encoding="utf-8-sig"
    )
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\na\nb,c\n", r"data\.csv:3: must have 1 fields"),
        (b"prompt,completion\na\n", r"data\.csv:2: must have 2 fields"),
        (b"text\n\xe9\n", r"data\.csv:\d: not CSV in UTF-8"),
        (b'text\n"a\n', r"data\.csv:\d: not CSV"),
    ],
    ids=["more", "fewer", "encoding", "quote"],
)
def test_broken_csv_names_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    """A broken row is refused with file, line and reason."""
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_csv(path))


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    """Parquet is read row by row; a damaged file is named."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"data\.parquet: not a Parquet file"):
        read(path)


def test_dataset_folder(tmp_path: Path) -> None:
    """A folder that the datasets library saved is read by split; an unknown split names those that are there."""
    datasets = pytest.importorskip("datasets")
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "set")
    assert [row for _, row in read_dataset(str(tmp_path / "set"), "test")] == ROWS[:1]
    with pytest.raises(ConfigError, match="has no split 'dev': it has train, test"):
        list(read_dataset(str(tmp_path / "set"), "dev"))
    with pytest.raises(ConfigError, match=r"dataset '\./nowhere' cannot be loaded"):
        list(read_dataset("./nowhere", "train"))


def test_folder_of_one_table_has_one_split(tmp_path: Path) -> None:
    """The default split is the one that is there; another, or a configuration, is not silently it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "named")
    for name in ("set", "named"):
        assert [row for _, row in read_dataset(str(tmp_path / name), "train")] == ROWS
    assert [row for _, row in read_dataset(str(tmp_path / "named"), "test")] == ROWS
    for name, there in (("set", "train"), ("named", "test")):
        with pytest.raises(ConfigError, match=f"{name}' has no split 'validation': it has {there}"):
            list(read_dataset(str(tmp_path / name), "validation"))
    with pytest.raises(ConfigError, match="was saved without configurations: leave dataset_config out"):
        list(read_dataset(str(tmp_path / "set"), "train", "main"))


@pytest.mark.parametrize("layout", ["files", "folders", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_with_a_split_to_validate_on(tmp_path: Path, tokenizer: Any, layout: str, streaming: bool) -> None:
    """Parquet files beside each other or in folders, or a saved ``DatasetDict``."""
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS[:3]), "validation": datasets.Dataset.from_list(ROWS[3:])}
    if layout == "saved":
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    for name, part in parts.items():
        path = {"files": f"{name}-00000-of-00001.parquet", "folders": f"{name}/a.parquet", "saved": "x"}[layout]
        if layout != "saved":
            (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(tmp_path / "set" / path)
    config = TrainConfig(dataset=str(tmp_path / "set"), val_dataset_split="validation", streaming=streaming)
    sets = load_sets(config, tokenizer)
    assert [tokenizer.decode(e.input_ids).count("é") for e in (*sets.train, *sets.val)] == [1, 2, 3, 4]
    assert len(sets.val) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_parquet_is_one_line(
    tmp_path: Path, tokenizer: Any, streaming: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Garbage, half a file, a damaged page, no rows, missing columns, bytes: named, and nothing is printed beside the error."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    path = tmp_path / "data.PARQUET"

    def read_columns(columns: dict[str, Any]) -> None:
        parquet.write_table(pyarrow.table(columns), path)
        load_sets(TrainConfig(train_file=path, streaming=streaming), tokenizer)

    read_columns({"text": ["a", "b"]})
    whole = path.read_bytes()
    for content in (b"", b"garbage" * 9, whole[: len(whole) // 2], whole[:4] + b"\xff" * 40 + whole[44:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.PARQUET"):
            load_sets(TrainConfig(train_file=path, streaming=streaming), tokenizer)
    for columns, message in (
        ({"text": pyarrow.array([], pyarrow.string())}, "holds no examples"),
        ({"question": ["a"], "answer": ["b"]}, "row 1: fields 'question', 'answer' are of no known format"),
        ({"prompt": ["a", None], "completion": ["b", "c"]}, "row 2: 'prompt' must be text, not null"),
        ({"text": [b"\xff"]}, "row 1: 'text' must be text, not "),
    ):
        with pytest.raises(ConfigError, match=message):
            read_columns(columns)
    assert capfd.readouterr().err == ""


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow a Parquet file says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"reading \.parquet files needs pyarrow.*pip install pyarrow"):
        list(read_file(tmp_path / "data.parquet"))


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    """The kinds that can be read are named."""
    with pytest.raises(ConfigError, match=r"data\.xml: data ends in \.csv, \.parquet, \.jsonl"):
        read_file(tmp_path / "data.xml")


@pytest.fixture
def config(base_folder: Path, write_rows: Callable[..., Path]) -> TrainConfig:
    """Twelve examples, two of them twice."""
    rows = [{"text": "ab" * i} for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2)]
    return TrainConfig(model_name=str(base_folder), train_file=write_rows(*rows))


def test_preprocessing_function(config: TrainConfig, tokenizer: Any, tmp_path: Path) -> None:
    """A function of the user makes rows; those for which it returns None are left out."""
    (tmp_path / "mine.py").write_text(
        "def short(row):\n    return {'text': row['text'].upper()} if len(row['text']) < 7 else None\n"
        "def broken(row):\n    return row.nothing\ndef wrong(row):\n    return 3\n"
    )
    config.preprocess = f"{tmp_path / 'mine.py'}:short"
    assert [tokenizer.decode(e.input_ids) for e in load_sets(config, tokenizer).train[:2]] == [
        "<s>AB</s>",
        "<s>ABAB</s>",
    ]
    config.preprocess = f"{tmp_path / 'mine.py'}:broken"
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: .*mine\.py:broken raised AttributeError: .*'nothing'"):
        load_sets(config, tokenizer)
    config.preprocess = f"{tmp_path / 'mine.py'}:wrong"
    with pytest.raises(ConfigError, match="returned int, not a row"):
        load_sets(config, tokenizer)
    for spec, message in (
        ("mine.py", r"must be file\.py:function, not 'mine\.py'"),
        ("nowhere.py:f", r"there is no file 'nowhere\.py'"),
        (f"{tmp_path / 'mine.py'}:other", "has no function 'other'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_function(spec)


def test_validation_share_is_never_training_data(config: TrainConfig, tokenizer: Any) -> None:
    """Equal examples stay on one side; the same seed holds out the same."""
    config.val_share = 0.3
    sets = load_sets(config, tokenizer)
    train, val = ({tuple(e.input_ids) for e in part} for part in (sets.train, sets.val))
    assert not train & val
    assert len(train) == 7
    assert len(val) == 3
    assert load_sets(config, tokenizer).val == sets.val
    with pytest.raises(ConfigError, match="leaves none to train on"):
        held_out([Example([1], [1])], 0.5, 0)


def test_validation_file_with_training_data(
    config: TrainConfig, tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    """What is trained on is left out of the validation, and that is said."""
    config.val_file = write_rows({"text": "ab"}, {"text": "new"}, name="val.jsonl")
    sets = load_sets(config, tokenizer)
    assert [tokenizer.decode(e.input_ids) for e in sets.val] == ["<s>new</s>"]
    assert sets.notes == ["1 validation examples are training data, too: left out"]
    config.val_file = write_rows({"text": "ab"}, name="val.jsonl")
    with pytest.raises(ConfigError, match="all 1 validation examples are training data, too"):
        load_sets(config, tokenizer)


def test_rendered_example_marks_what_is_learned(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    """The prompt is outside the marks, the answer and its end are inside; long parts are shortened."""
    path = write_rows({"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "a" * 99, "completion": "b"})
    short, long = load_examples(path, tokenizer, context_length=512)
    assert rendered(short, tokenizer) == "<s>2 + 2 = ⟦4</s>⟧"
    assert rendered(long, tokenizer, width=10) == "<s>aa … aaaaa⟦b</s>⟧"
