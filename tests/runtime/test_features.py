# SPDX-License-Identifier: BSD-3-Clause
"""Every generation feature gives PyTorch's tokens from the same seed, or is refused before any work."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

from QEfficient.compile.program import compile_graph
from QEfficient.errors import UnsupportedError
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.generate import SessionModel
from QEfficient.runtime.session import OrtSession
from tests.runtime import test_generate
from tests.runtime.features import ELSEWHERE, EOS, FEATURES, NOT_ABOUT_TOKENS, table

PROMPTS = torch.tensor([[0, 0, 0, 12, 40, 12, 9], [31, 8, 44, 8, 44, 8, 44]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
NEW = 12


@pytest.fixture(scope="module")
def last(tiny):
    """Return the program whose logits are of the last token."""
    return SessionModel(OrtSession(tiny.program, threads=1), chunk_len=4)


@pytest.fixture(scope="module")
def every(tiny, tmp_path_factory):
    """Return a program whose logits are of every token."""
    graph = export_graph(tiny.model, tmp_path_factory.mktemp("all") / "tiny", adapter_name="one", logits="all")
    return SessionModel(OrtSession(compile_graph(graph), threads=1), chunk_len=4)


@pytest.fixture
def reference(tiny):
    """Return PyTorch's own model, without adapter."""
    with tiny.model.disable_adapter():
        yield tiny.model.get_base_model()


def _generate(model, rows, **arguments):
    torch.manual_seed(3)
    given = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": EOS, **arguments}
    return model.generate(PROMPTS[2 - rows :], attention_mask=MASK[2 - rows :], **given).tolist()


@pytest.mark.parametrize("feature", [f for f in FEATURES if not f.refused], ids=lambda f: f.name)
def test_feature(feature, last, every, reference):
    """The tokens are PyTorch's; and the feature does something."""
    model = every if feature.all_logits else last
    rows = feature.rows
    expected = _generate(reference, rows, **feature.arguments)
    assert _generate(model, rows, **feature.arguments) == expected
    if feature.neutral is not None:
        assert _generate(reference, rows, **feature.neutral) != expected


@pytest.mark.parametrize("feature", [f for f in FEATURES if f.refused], ids=lambda f: f.name)
def test_refused(feature, last, every, monkeypatch):
    """What a session cannot do is an error before the graph runs."""
    monkeypatch.setattr(OrtSession, "run", lambda *_: pytest.fail("the graph ran"))
    with pytest.raises((UnsupportedError, ValueError), match=feature.refused):
        _generate(every if feature.all_logits else last, feature.rows, **feature.arguments)


@pytest.mark.parametrize("new", [4, 12, 57])
def test_speculation_takes_fewer_calls(every, reference, monkeypatch, new):
    """Tokens found in the prompt save calls, and the context may be used to its end."""
    calls = []
    run = OrtSession.run
    monkeypatch.setattr(OrtSession, "run", lambda *a: calls.append(a[1].shape) or run(*a))
    arguments = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False}
    got = _generate(every, 1, prompt_lookup_num_tokens=3, **arguments)
    assert got == _generate(reference, 1, **arguments)
    if new > 50:
        assert len(calls) < new


@pytest.mark.parametrize("sample", [False, True])
def test_assistant(every, tiny, reference, sample):
    """A PyTorch model drafts; the tokens are what PyTorch gives with the same assistant."""
    assistant = copy.deepcopy(reference)
    for parameter in assistant.parameters():
        parameter.data += 0.005 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    arguments = {"assistant_model": assistant, "do_sample": sample, "eos_token_id": None}
    assert _generate(every, 1, **arguments) == _generate(reference, 1, **arguments)


def test_speculation_takes_all_logits(last):
    """A graph of last logits says what to do."""
    with pytest.raises(UnsupportedError, match='export it with logits="all"'):
        _generate(last, 1, prompt_lookup_num_tokens=3)


def test_logits_processor_of_ones_own(last, reference):
    """A logits processor that the caller wrote runs."""

    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, -1)

    expected = _generate(reference, 2, logits_processor=[Shift()])
    assert _generate(last, 2, logits_processor=[Shift()]) == expected


def test_table_is_complete():
    """Every field of transformers' configuration has a row, or a reason; and the page has these rows."""
    named = {a for f in FEATURES for a in f.arguments} | {a for n, _ in ELSEWHERE.values() for a in n.split(", ")}
    fields = set(GenerationConfig().to_dict())
    assert sorted(fields - named - NOT_ABOUT_TOKENS) == []
    assert sorted(NOT_ABOUT_TOKENS - fields) == []
    tests = {*dir(test_generate), *globals()}
    assert [t for _, t in ELSEWHERE.values() if t not in tests] == []
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text().splitlines()
    shown = page[page.index("|---|---|---|") + 1 :]
    assert shown[: len(table())] == table()
