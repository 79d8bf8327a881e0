"""What people read after a training."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example, tokenize
from QEfficient.finetune.formats import Segment
from QEfficient.finetune.summary import averaged, card, curve, lines, page
from tests.finetune.test_train import run

LOG = [{"step": i, "loss": 5.0 - i * 0.1} for i in range(1, 31)] + [{"step": 30, "eval_loss": 2.5}]
METRICS = {
    "train_loss": 3.45,
    "perplexity_before": 1234.5,
    "perplexity": 12.2,
    "train_steps": 30.0,
    "train_seconds": 61.0,
    "train_tokens_per_second": 2345.0,
    "trained_parameters": 1000.0,
    "parameters": 50000.0,
    "peak_memory_bytes": 3.0 * 2**30,
}


def test_curve_is_a_picture() -> None:
    """The SVG is well-formed, has a point for each step and a dot for each validation."""
    root = ElementTree.fromstring(curve(LOG))
    line = root.find("{*}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 30
    assert points == sorted(points)  # the loss falls: y grows downwards
    assert len(root.findall("{*}circle")) == 1
    assert ElementTree.fromstring(curve([])).attrib["role"] == "img"


def test_many_steps_are_averaged() -> None:
    """Means of neighbours, each step in one of them."""
    assert averaged([1, 2, 3, 4, 5], 2) == [1.5, 4]
    assert averaged([1, 2], 5) == [1, 2]
    assert len(averaged(list(range(1000)), 200)) == 200


def test_terminal_lines() -> None:
    """The loss as bars, then perplexity, parameters, time, memory."""
    text = "\n".join(lines(METRICS, LOG))
    assert text.startswith("loss 4.900 █")
    assert "perplexity: 1.23e+03 before, 12.2 after" in text
    assert "trained parameters: 1,000 of 50,000 (2.00%)" in text
    assert "61 s, 2,345 tokens/s" in text
    assert "peak memory: 3,072 MiB" in text
    assert lines(METRICS, [])[0] == "training loss: 3.450"


def test_page_escapes_names() -> None:
    """Names of files are text, not HTML."""
    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.append(tag)

    Tags().feed(page(TrainConfig(model_name="<script>", output_dir=Path("a<b")), METRICS, curve(LOG)))
    assert "script" not in found
    assert {"svg", "table", "pre"} <= set(found)


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Four prompts and answers."""
    return [tokenize([Segment("p" * i, False), Segment("ab", True)], tokenizer, 64) for i in range(1, 5)]


def test_model_card_of_a_training(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """The card is the Hub's: front matter, results, use; no path of this machine is in it or in the page."""
    run(base_folder, tmp_path / "mine", examples, train_file=tmp_path / "secret" / "rows.jsonl")
    text = (tmp_path / "mine" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == base_folder.name
    assert front["library_name"] == "peft"
    assert "LORA adapter" in text
    assert "trained on `rows.jsonl`" in text
    assert "| perplexity |" in text
    for name in ("README.md", "training.html"):
        assert str(tmp_path) not in (tmp_path / "mine" / name).read_text()
    assert json.loads((tmp_path / "mine" / "train_log.json").read_text())[0]["step"] == 1


def test_model_card_of_a_hub_base() -> None:
    """A base on the Hub is linked; a full fine-tuning is no adapter."""
    text = card(TrainConfig(model_name="some/base", output_dir=Path("out"), use_peft=False), METRICS, "full")
    assert yaml.safe_load(text.split("---")[1]) == {"base_model": "some/base", "pipeline_tag": "text-generation"}
    assert "PeftModel" not in text
