# SPDX-License-Identifier: BSD-3-Clause
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.runtime.generate import SessionModel

PAD = 0


@pytest.fixture
def model(session):
    """Return a session that generates, with prefill chunks shorter than the prompts."""
    return SessionModel(session, chunk_len=4)


@pytest.fixture
def reference(tiny):
    """Return PyTorch's own model, without adapter."""
    with tiny.model.disable_adapter():
        yield tiny.model.get_base_model()


def _prompts(*lengths, side="left", seed=0):
    """Return padded ids and mask of random prompts without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        part = slice(max(lengths) - n, None) if side == "left" else slice(0, n)
        ids[row, part] = torch.randint(1, 97, (n,), generator=generator)
        mask[row, part] = 1
    return ids, mask


def _both(model, reference, *args, **kwargs):
    """Generate with both from the same seed."""
    torch.manual_seed(7)
    expected = reference.generate(*args, **kwargs)
    torch.manual_seed(7)
    return model.generate(*args, **kwargs), expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_beams": 2, "early_stopping": True},
        {"generation_config": GenerationConfig(do_sample=True, min_p=0.01, max_new_tokens=9, pad_token_id=PAD)},
    ],
    ids=["greedy", "penalties", "sample", "several", "beams", "beam-sample", "config"],
)
@pytest.mark.parametrize("lengths", [(9,), (9, 2, 11, 5)], ids=["one-row", "four-rows"])
def test_same_tokens_as_pytorch(model, reference, lengths, arguments):
    """Every way of choosing tokens gives PyTorch's tokens from the same seed, for rows of different lengths."""
    ids, mask = _prompts(*lengths)
    if "generation_config" not in arguments:
        arguments = {**arguments, "max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": [5, 6, 7]}
    got, expected = _both(model, reference, ids, attention_mask=mask, **arguments)
    assert got.tolist() == expected.tolist()


def test_scores_and_logits(model, reference):
    """With ``return_dict_in_generate`` scores and logits come back as PyTorch's do."""
    ids, mask = _prompts(6, 3)
    got, expected = _both(
        model,
        reference,
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        # Sums in another order: about 1e-6 of logits near 5.
        np.testing.assert_allclose(torch.stack(got[name]), torch.stack(expected[name]), rtol=0, atol=2e-5)


def test_padding_on_the_right(model):
    """Rows padded on the right continue as the same rows padded on the left do."""
    lengths = (9, 2, 11, 5)
    left, left_mask = _prompts(*lengths)
    right, right_mask = _prompts(*lengths, side="right")
    arguments = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(left, attention_mask=left_mask, **arguments)[:, 11:]
    assert model.generate(right, attention_mask=right_mask, **arguments)[:, 11:].tolist() == expected.tolist()


def test_missing_attention_mask(model, reference):
    """Without a mask, padding tokens are found as transformers finds them."""
    ids, _ = _prompts(7, 3)
    got, expected = _both(model, reference, ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("chunk_len", [1, 5, 64])
def test_chunk_length_does_not_matter(session, reference, chunk_len):
    """A prompt longer than the prefill chunk gives the same tokens, however it is cut."""
    ids, mask = _prompts(30, 13)
    model = SessionModel(session, chunk_len=chunk_len)
    got, expected = _both(
        model, reference, ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD
    )
    assert got.tolist() == expected.tolist()
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD, prefill_chunk_size=3
    )
    assert got.tolist() == expected.tolist()


def test_end_of_sequence(model, reference):
    """A row that has ended is filled up with padding, and generation stops when all have."""
    ids, mask = _prompts(5, 8)
    first = reference.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    ends = [int(first[0, 8 + 2]), int(first[1, 8 + 5])]
    got, expected = _both(
        model,
        reference,
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=ends,
    )
    assert got.tolist() == expected.tolist()
    assert got.shape[1] < 8 + 20


class _StopAfter(StoppingCriteria):
    """Stop at a number of tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        """Say the same for all rows."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class _Collect:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        """Keep the tokens."""
        self.tokens += value.flatten().tolist()

    def end(self):
        """Note the end."""
        self.ended = True


def test_streamer_and_stopping_criteria(model):
    """A streamer sees the prompt and then each token as it comes; a stopping criterion ends it."""
    ids, _ = _prompts(6)
    streamer = _Collect()
    criteria = StoppingCriteriaList([_StopAfter(10)])
    got = model.generate(ids, streamer=streamer, stopping_criteria=criteria, max_new_tokens=30, do_sample=False)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended
    assert got.shape == (1, 10)


def test_stop_strings(model, reference):
    """Generation ends at a string, found through the tokenizer."""
    # transformers learns from "abcdef" how the tokenizer puts tokens together.
    words = {f"w{i}": i for i in range(96)} | {"abcdef": 96}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
    ids, _ = _prompts(6)
    free = reference.generate(ids, max_new_tokens=12, do_sample=False)
    stop = f"w{int(free[0, 6 + 3])}"
    got, expected = _both(
        model, reference, ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    assert got.tolist() == expected.tolist()
    assert got.shape[1] < 6 + 12


def test_generate_with_adapters(tiny, model):
    """Each adapter generates PyTorch's tokens, also after others and the base have run."""
    ids, mask = _prompts(9, 4)
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    for name, tensors in tiny.adapters.items():
        model.session.load_adapter(name, tensors)
    results = {}
    for name in ("one", "two", "one"):
        model.session.set_adapter(name)
        tiny.model.set_adapter(name)
        results[name] = model.generate(ids, **arguments).tolist()
        assert results[name] == tiny.model.generate(input_ids=ids, **arguments).tolist()
    model.session.set_adapter("base")
    with tiny.model.disable_adapter():
        assert model.generate(ids, **arguments).tolist() == tiny.model.generate(input_ids=ids, **arguments).tolist()
    assert results["one"] != results["two"]


def test_without_cache_flag(model, reference):
    """``use_cache=False`` changes nothing but time in PyTorch, and nothing at all here."""
    ids, mask = _prompts(5, 3)
    got, expected = _both(
        model, reference, ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD, use_cache=False
    )
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 60}, ConfigError, "need 67 positions, the longest context is 64"),
        ({"max_new_tokens": 4, "attention_mask": torch.tensor([[1] * 8, [0] * 8])}, ConfigError, "prompt 1 is empty"),
        (
            {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2},
            UnsupportedError,
            "assisted generation checks several tokens",
        ),
        ({"max_new_tokens": 4, "output_attentions": True}, UnsupportedError, "output_attentions is not available"),
        ({"max_new_tokns": 4}, ValueError, "max_new_tokns"),
        ({"max_new_tokens": 4, "num_beams": 2, "streamer": _Collect()}, ValueError, "streamer"),
    ],
    ids=["overflow", "empty", "mode", "attentions", "typo", "beams-streamed"],
)
def test_wrong_arguments_fail_before_any_work(model, monkeypatch, arguments, error, message):
    """A wrong argument is an error before the graph runs."""
    ids, mask = _prompts(8, 6)
    monkeypatch.setattr(type(model.session), "run", lambda *_: pytest.fail("the graph ran"))
    with pytest.raises(error, match=message):
        model.generate(ids, **{"attention_mask": mask, "pad_token_id": PAD, "do_sample": False, **arguments})


def test_no_token_at_all(model):
    """A prompt without a token is an error that says so."""
    with pytest.raises(ConfigError, match="the prompt is empty: generation needs at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3, do_sample=False)


def test_padding_needs_no_context(model):
    """What counts against the context is tokens, not padding."""
    ids, mask = _prompts(30, 20)
    wide = torch.cat([torch.full((2, 40), PAD), ids], 1), torch.cat([torch.zeros(2, 40, dtype=torch.long), mask], 1)
    arguments = {"max_new_tokens": 35, "do_sample": False, "pad_token_id": PAD}
    got = model.generate(wide[0], attention_mask=wide[1], **arguments)
    assert got[:, 40:].tolist() == model.generate(ids, attention_mask=mask, **arguments).tolist()


def test_threads_wait_for_each_other(model):
    """Generations that several threads ask for at once come out as they do one after the other."""
    prompts = [_prompts(n, seed=n)[0] for n in (3, 9, 5, 12)]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = [model.generate(p, **arguments).tolist() for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: model.generate(p, **arguments).tolist(), prompts)) == expected


def test_pytorch_keeps_its_threads(model, monkeypatch):
    """PyTorch runs on one thread during generation, and has its threads back afterwards, also after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        monkeypatch.setattr(model, "forward", lambda **_: seen.append(torch.get_num_threads()) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(_prompts(4)[0], max_new_tokens=2)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
