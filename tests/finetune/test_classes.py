"""Sequence classification: from labels in a file to an adapter with a head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from QEfficient.cloud.finetune import main
from QEfficient.errors import ConfigError
from QEfficient.finetune.classes import class_names, to_class_examples
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example
from QEfficient.finetune.evaluation import classify
from QEfficient.finetune.sets import load_classes, load_sets
from QEfficient.finetune.sources import read_dataset

WORDS = {"good": "aaab", "bad": "xxyz", "so so": "mnmn"}


@pytest.fixture
def options(base_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Texts of three classes, of different lengths, that are easy to tell apart."""
    rows = [{"text": (text * 4)[: 6 + i % 7], "label": name} for i in range(20) for name, text in WORDS.items()]
    data, check = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check.write_text("".join(json.dumps({"text": t[1:] * 5, "label": n}) + "\n" for n, t in WORDS.items()))
    return {
        "model_name": str(base_folder),
        "train_file": data,
        "val_file": check,
        "task_mode": "seq_classification",
        "output_dir": tmp_path / "out",
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "lr": 1e-2,
        "lora_r": 4,
    }


def test_classifier_is_trained(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """It tells the classes apart afterwards; the adapter holds the head and loads as users load it."""
    metrics = main(**options)
    assert metrics["accuracy"] == metrics["f1"] == 1
    assert metrics["accuracy_before"] < 1
    printed = capsys.readouterr().out
    assert "3 classes: bad, good, so so" in printed
    assert "→ ⟦good⟧" in printed
    out = options["output_dir"]
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert json.loads((out / "classes.json").read_text()) == ["bad", "good", "so so"]
    assert "num_labels=3" in (out / "README.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(options["model_name"], num_labels=3)
    model = PeftModel.from_pretrained(base, str(out)).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    for i, name in enumerate(sorted(WORDS)):
        logits = model(**tokenizer(WORDS[name] * 3, return_tensors="pt")).logits
        assert logits.shape == (1, 3)
        assert logits.argmax() == i


def test_loss_does_not_depend_on_batches(options: dict[str, Any], tmp_path: Path) -> None:
    """Padding, accumulation and the filled-up last step of an epoch change no loss."""
    curves = []
    for batch, accumulation in ((8, 1), (2, 4)):
        out = tmp_path / str(batch)
        given = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "output_dir": out}
        main(**{**options, **given, "num_epochs": 1})
        curves.append([e["loss"] for e in json.loads((out / "train_log.json").read_text()) if "loss" in e])
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_measures_of_a_known_result() -> None:
    """Accuracy and F1 are those of the textbook."""

    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids[:, 0], 2).float()})

    # (said, true): two of three of class 0 right, one of two of class 1
    said = [(0, 0), (0, 0), (1, 0), (1, 1), (0, 1)]
    found = classify(Fixed(), [Example([s], [t]) for s, t in said], 0, 2, 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx((2 * 2 / (3 + 3) + 2 * 1 / (2 + 2)) / 2)


def test_labels_that_are_numbers_keep_their_order() -> None:
    """Class 10 comes after class 2, and words are sorted."""
    assert class_names([("f:1", {"text": "a", "label": n}) for n in (10, 2, 2)], "f") == ["2", "10"]
    assert class_names([("f:1", {"text": "a", "label": n}) for n in ("b", "a")], "f") == ["a", "b"]


def test_classes_of_a_dataset_have_its_names(tmp_path: Path, tokenizer: Any) -> None:
    """Where it holds numbers and their names, in what a function of the user is given, too; other tasks get the numbers."""
    datasets = pytest.importorskip("datasets", reason="an optional library")
    kinds = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad", "never"])}
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, 1]}, datasets.Features(kinds))
    table.save_to_disk(tmp_path / "set")
    (tmp_path / "mine.py").write_text("def text(row):\n    return {'text': row['sentence'], 'label': row['label']}\n")
    given = {"dataset": str(tmp_path / "set"), "preprocess": f"{tmp_path / 'mine.py'}:text"}
    config = TrainConfig(**given, task_mode="seq_classification")
    classes = load_classes(config)
    assert classes == ["glad", "sad"]
    assert [e.labels for e in load_sets(config, tokenizer, classes).train] == [[0], [1], [0]]
    assert [row["label"] for _, row in read_dataset(given["dataset"], "train")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"f:1: a row for seq_classification has the fields 'text' and 'label', not 'text'"),
        ({"text": "a", "label": 0.5}, "f:1: 'label' must be a word or a whole number, not 0.5"),
        ({"text": "", "label": "a"}, "f:1: 'text' must be text"),
        ({"text": "a", "label": "c"}, "f:1: label 'c' is not among those of the training data: a, b"),
    ],
)
def test_broken_rows_name_their_line(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    """What a classifier cannot learn from is refused."""
    with pytest.raises(ConfigError, match=message):
        to_class_examples([("f:1", row)], "f", tokenizer, context_length=8, classes=["a", "b"])


def test_one_class_is_refused() -> None:
    """There would be nothing to tell apart."""
    with pytest.raises(ConfigError, match=r"f holds 1 class\(es\): at least two are needed"):
        class_names([("f:1", {"text": "a", "label": 1})], "f")


def test_contradictions_are_refused(options: dict[str, Any]) -> None:
    """Packing would give several texts one label."""
    with pytest.raises(ConfigError, match="task_mode 'seq_classification' is trained on text and label: leave packing"):
        main(**options, packing=True)
