"""From lines of JSON to tokens and labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from QEfficient.errors import ConfigError
from QEfficient.finetune.batches import Collator
from QEfficient.finetune.data import IGNORED, Example, load_examples, tokenize
from QEfficient.finetune.formats import Segment
from tests.finetune.conftest import make_tokenizer


def learned(example: Example, tokenizer: Any) -> str:
    """Return the text of the labels, special tokens included."""
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def given(example: Example, tokenizer: Any) -> str:
    """Return the text whose labels are masked."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return str(tokenizer.decode([token for token, label in pairs if label == IGNORED]))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"text": "abc"}, "<s>", "abc</s>"),
        ({"prompt": "ab", "completion": "c"}, "<s>ab", "c</s>"),
        ({"prompt": "", "completion": "c"}, "<s>", "c</s>"),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
            "2</s>",
        ),
        (
            {"instruction": "Sing.", "output": "la"},
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nSing.\n\n### Response:\n",
            "la</s>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            "<|user|>a\n<|assistant|>\n<|user|>c\n<|assistant|>\n",
            "b</s>d</s>",
        ),
    ],
    ids=["text", "completion", "no-prompt", "alpaca", "alpaca-no-input", "messages"],
)
def test_formats(write_rows: Callable[..., Path], tokenizer: Any, row: Any, prompt: str, answer: str) -> None:
    """Each format is detected; its prompt is masked, its answer and the end of the sequence are learned."""
    (example,) = load_examples(write_rows(row), tokenizer, context_length=512)
    assert given(example, tokenizer) == prompt
    assert learned(example, tokenizer) == answer
    assert not example.cut


def test_end_is_learned_when_padding_is_the_same_token(write_rows: Callable[..., Path]) -> None:
    """With EOS as padding token the real EOS keeps its label, and padding has none."""
    tokenizer = make_tokenizer(pad_token="</s>")
    examples = load_examples(write_rows({"text": "ab"}, {"text": "abcd"}), tokenizer, context_length=32)
    labels = Collator(tokenizer.pad_token_id)([[e] for e in examples])["labels"]
    assert labels[0].tolist()[-4:] == [examples[0].labels[2], tokenizer.eos_token_id, IGNORED, IGNORED]
    assert labels[1].tolist()[-1] == tokenizer.eos_token_id


def test_long_prompt_is_cut_and_the_answer_kept(tokenizer: Any) -> None:
    """Truncation takes the prompt's beginning, not the special token before it and nothing that is learned."""
    segments = [Segment("p" * 50 + "q" * 10, False), Segment("answer", True)]
    example = tokenize(segments, tokenizer, 16)
    assert example.cut
    assert given(example, tokenizer) == "<s>" + "q" * 8
    assert learned(example, tokenizer) == "answer</s>"


def test_long_answer_is_cut_at_its_end(tokenizer: Any) -> None:
    """When the answer is too long as well, a quarter is left to the prompt, and no end is learned."""
    example = tokenize([Segment("p" * 30, False), Segment("a" * 30, True)], tokenizer, 16)
    assert given(example, tokenizer) == "<s>" + "p" * 3
    assert learned(example, tokenizer) == "a" * 12


def test_example_of_exactly_the_context_is_not_cut(tokenizer: Any) -> None:
    """The limit itself is allowed."""
    example = tokenize([Segment("a" * 14, True)], tokenizer, 16)
    assert (len(example.input_ids), example.cut) == (16, False)


def test_collator_pads_on_the_right(tokenizer: Any) -> None:
    """The mask and the labels follow the position of padding."""
    batch = Collator(0)([[Example([1, 5, 2], [IGNORED, 5, 2])], [Example([1, 2], [IGNORED, 2])]])
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 2], [IGNORED, 2, IGNORED]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}', '{"text": '], "data.jsonl:2: not a line of JSON"),
        (['{"text": "a"}', "", "[1]"], "data.jsonl:3: must be an object .*, not list"),
        ([{"text": "a"}, {"prompt": "b"}], r"data.jsonl:2: field 'text' is missing \(format 'text'\)"),
        ([{"text": 3}], "data.jsonl:1: 'text' must be text, not 3"),
        ([{"prompt": "a", "completion": ""}], "data.jsonl:1: 'completion' is empty"),
        ([{"words": "a"}], "data.jsonl:1: fields 'words' are of no known format .*completion: prompt, completion"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "data.jsonl:1: no message has the role 'assistant'"),
        ([{"messages": [{"role": "assistant"}]}], "data.jsonl:1: each of 'messages' needs role and content"),
        ([], "data.jsonl holds no examples"),
    ],
    ids=["json", "no-object", "mixed", "number", "empty", "unknown", "no-reply", "no-content", "nothing"],
)
def test_broken_rows_name_their_line(
    write_rows: Callable[..., Path], tokenizer: Any, rows: list[Any], message: str
) -> None:
    """A broken row is refused with file, line and reason."""
    with pytest.raises(ConfigError, match=message):
        load_examples(write_rows(*rows), tokenizer, context_length=64)


def test_named_format_is_not_guessed(write_rows: Callable[..., Path], tokenizer: Any) -> None:
    """A row with the fields of two formats is read as told."""
    path = write_rows({"text": "whole", "prompt": "a", "completion": "b"})
    (example,) = load_examples(path, tokenizer, context_length=64, data_format="text")
    assert learned(example, tokenizer) == "whole</s>"


def test_messages_need_a_template(write_rows: Callable[..., Path]) -> None:
    """Without a chat template the format cannot be written."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: the tokenizer has no chat template"):
        load_examples(write_rows(row), make_tokenizer(chat_template=None), context_length=64)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, tokenizer: Any) -> None:
    """Bytes of another encoding are refused with their line."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ConfigError, match=r"data\.jsonl:2: not a line of JSON: .*utf-8"):
        load_examples(path, tokenizer, context_length=64)
