# SPDX-License-Identifier: BSD-3-Clause
"""Many requests at a time: each gets what it would get alone."""

import threading
import time

import numpy as np
import pytest

from QEfficient.compile.program import compile_graph
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, QueueFullError
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request, Sampling

VOCAB = 97


@pytest.fixture(scope="module", params=["mixed", "grouped"])
def program(tiny, request):
    """Compile for one call with all adapters, and for a call for each adapter."""
    return compile_graph(tiny.graph, mixed=True) if request.param == "mixed" else tiny.program


def make_engine(program, **options):
    """Make a small engine."""
    return Engine(program, **{"slots": 4, "ctx_len": 48, "queue_len": 32, "threads": 1, "chunk_len": 5, **options})


def with_adapters(engine, tiny):
    """Load the tiny adapters into an engine and return it."""
    for name, tensors in tiny.adapters.items():
        engine.load_adapter(name, tensors)
    return engine


def greedy(tiny, prompt, adapter, count):
    """Return the tokens that PyTorch gives this prompt alone."""
    row = np.asarray(prompt)
    for _ in range(count):
        row = np.append(row, int(tiny.logits([row], adapter)[0].argmax()))
    return row[len(prompt) :].tolist()


def ids_of(stream):
    """Wait for all tokens of a stream."""
    return [token.id for token in stream]


def mix(count, seed=0):
    """Return prompts with an adapter and a number of new tokens each."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist(),
            ("base", "one", "two")[i % 3],
            int(rng.integers(1, 16)),
        )
        for i in range(count)
    ]


def test_every_request_gets_what_it_would_get_alone(tiny, program):
    """More requests than slots, three adapters of different rank, any lengths: PyTorch's tokens, and none is dropped."""
    wanted = mix(13)
    with with_adapters(make_engine(program), tiny) as engine:
        streams = [engine.submit(Request(prompt_ids=p, adapter=a, max_new_tokens=n)) for p, a, n in wanted]
        got = [ids_of(s) for s in streams]
    assert got == [greedy(tiny, *one) for one in wanted]
    assert {s.finish_reason for s in streams} == {"length"}
    stats = engine.stats()
    assert (stats.active, stats.waiting, stats.new_tokens) == (0, 0, sum(n for _, _, n in wanted))


def test_only_a_mixed_program_mixes(tiny, program):
    """The manifest says what a program can do; the tiny LoRA can be mixed."""
    assert make_engine(program).mixed == (program != tiny.program)


def test_seeds_do_not_depend_on_neighbours(tiny, program):
    """A seeded request draws the same tokens alone and in company."""
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=7, frequency_penalty=0.5)
    request = Request(prompt_ids=[3, 4, 5], adapter="two", max_new_tokens=20, sampling=sampling)
    with with_adapters(make_engine(program), tiny) as engine:
        alone = ids_of(engine.submit(request))
        others = [engine.submit(Request(prompt_ids=p, adapter=a, max_new_tokens=n)) for p, a, n in mix(6)]
        assert ids_of(engine.submit(request)) == alone
        for other in others:
            other.wait()
    assert len(set(alone)) > 3


def test_a_cancelled_request_frees_its_slot(tiny, program):
    """Cancelling a running request lets the one that waits for its slot run; cancelling a waiting one takes it out."""
    engine = with_adapters(make_engine(program, slots=1), tiny)
    first = engine.submit(Request(prompt_ids=[1], adapter="one", max_new_tokens=47))
    second = engine.submit(Request(prompt_ids=[2, 3], adapter="two", max_new_tokens=5))
    third = engine.submit(Request(prompt_ids=[2, 3], adapter="one", max_new_tokens=5))
    third.cancel()
    first.on_token = lambda token: first.cancel() if token else None
    with engine:
        assert ids_of(second) == greedy(tiny, [2, 3], "two", 5)
    assert len(first.tokens) == 1
    assert engine.stats().new_tokens == 6  # the slot was free before the next step
    assert (first.finish_reason, third.finish_reason, ids_of(third)) == ("cancelled", "cancelled", [])


def test_the_queue_is_bounded(tiny, program):
    """What does not fit is refused at once, and nothing of it stays."""
    engine = with_adapters(make_engine(program, slots=1, queue_len=2), tiny)
    request = Request(prompt_ids=[1], max_new_tokens=2)
    streams = [engine.submit(request) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait already, 2 may"):
        engine.submit(request)
    engine.start()
    assert [len(ids_of(s)) for s in streams] == [2, 2, 2]
    engine.close()
    with pytest.raises(QueueFullError, match="closing"):
        engine.submit(request)


def test_one_adapters_crowd_does_not_hold_up_another(tiny, program):
    """Adapters take turns: the only request of one adapter does not wait for all those of the other."""
    engine = with_adapters(make_engine(program, slots=1), tiny)
    order = []
    streams = []
    for name in ["one"] * 6 + ["two"]:
        stream = engine.submit(Request(prompt_ids=[1, 2], adapter=name, max_new_tokens=1))
        stream.on_token = lambda token, name=name: order.append(name) if token else None
        streams.append(stream)
    with engine:
        for stream in streams:
            stream.wait()
    assert order.index("two") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_ids": []},
        {"prompt_ids": [VOCAB]},
        {"prompt_ids": [-1]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 48},
        {"logprobs": -1},
        {"sampling": Sampling(logit_bias={VOCAB: 1.0})},
    ],
    ids=str,
)
def test_wrong_requests_are_refused_before_any_work(tiny, program, fields):
    """The error comes from ``submit``; the engine is as it was."""
    engine = make_engine(program)
    with pytest.raises(ConfigError):
        engine.submit(Request(**{"prompt_ids": [1], "max_new_tokens": 2, **fields}))
    assert engine.stats().requests.total() == 0


def test_an_unknown_adapter_is_refused_not_replaced_by_the_base(tiny, program):
    """With the name that may have been meant."""
    engine = with_adapters(make_engine(program), tiny)
    with pytest.raises(AdapterNotFoundError, match="did you mean 'one'"):
        engine.submit(Request(prompt_ids=[1], adapter="onee", max_new_tokens=2))


def test_a_rejected_adapter_leaves_no_trace(tiny, program):
    """Not even one that would poison its neighbours through the mask: 0 * inf is NaN."""
    engine = make_engine(program)
    before = engine.memory_bytes()
    tensors = dict(tiny.adapters["one"])
    name = next(n for n in tensors if "lora_A" in n)
    with pytest.raises(AdapterMismatchError, match="not finite"):
        engine.load_adapter("bad", tensors | {name: np.full_like(tensors[name], np.inf)})
    with pytest.raises(AdapterMismatchError, match="has no tensor"):
        engine.load_adapter("bad", {n: t for n, t in tensors.items() if n != name})
    assert (engine.adapters, engine.memory_bytes()) == ((), before)


def test_running_requests_keep_the_version_they_began_with(tiny, program):
    """A name that is loaded again, or unloaded, in mid-request: old requests, running or waiting, finish with the old tensors."""
    with with_adapters(make_engine(program, slots=2), tiny) as engine:
        request = Request(prompt_ids=[5, 6, 7], adapter="one", max_new_tokens=30)
        old = [engine.submit(request) for _ in range(4)]
        next(old[0])
        engine.load_adapter("one", tiny.adapters["two"])
        new = engine.submit(request)
        engine.unload_adapter("one")
        with pytest.raises(AdapterNotFoundError):
            engine.submit(request)
        expected = greedy(tiny, [5, 6, 7], "one", 30)
        assert [[t.id for t in s.tokens] for s in old if s.wait()] == [expected] * 4
        assert ids_of(new) == greedy(tiny, [5, 6, 7], "two", 30) != expected
        engine.unload_adapter("two")
    assert engine.memory_bytes()["adapters"] == make_engine(program).memory_bytes()["adapters"]


def test_adapters_come_and_go_under_load(tiny, program):
    """Two threads load and unload while requests run: every token is right, nothing is left over."""
    stop = threading.Event()

    def churn(engine, name):
        while not stop.is_set():
            engine.load_adapter(name, tiny.adapters["two"])
            stream = engine.submit(Request(prompt_ids=[9], adapter=name, max_new_tokens=3))
            engine.unload_adapter(name)
            stream.wait()
            assert [t.id for t in stream.tokens] == expected

    expected = greedy(tiny, [9], "two", 3)
    wanted = mix(24, seed=3)
    with with_adapters(make_engine(program), tiny) as engine:
        threads = [threading.Thread(target=churn, args=(engine, f"new{i}")) for i in range(2)]
        for thread in threads:
            thread.start()
        streams = [engine.submit(Request(prompt_ids=p, adapter=a, max_new_tokens=n)) for p, a, n in wanted]
        got = [ids_of(s) for s in streams]
        stop.set()
        for thread in threads:
            thread.join()
        assert engine.adapters == ("one", "two")
    assert got == [greedy(tiny, *one) for one in wanted]
    assert engine.stats().finished["length"] == engine.stats().requests.total()


def test_stop_logprobs_and_bias(tiny, program):
    """An end token ends the request and is delivered; log probabilities are those of the model; a bias decides."""
    expected = greedy(tiny, [4, 5], "one", 6)
    with with_adapters(make_engine(program), tiny) as engine:
        end = Request(prompt_ids=[4, 5], adapter="one", max_new_tokens=6, eos_ids=frozenset(expected[2:3]), logprobs=3)
        stream = engine.submit(end)
        tokens = list(stream)
        biased = ids_of(
            engine.submit(Request(prompt_ids=[4], max_new_tokens=3, sampling=Sampling(logit_bias={11: 100.0})))
        )
    assert stream.finish_reason == "stop"
    assert [t.id for t in tokens] == expected[: expected.index(expected[2]) + 1]
    logits = tiny.logits([np.array([4, 5])], "one")[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    assert tokens[0].logprob == pytest.approx(logprobs[tokens[0].id], abs=1e-5)
    assert [i for i, _ in tokens[0].top_logprobs] == np.argsort(-logprobs)[:3].tolist()
    assert biased == [11, 11, 11]


def test_closing_cancels_what_does_not_finish_in_time(tiny, program):
    """No stream is left unanswered, running or waiting; nor does one that nobody reads hold up the others."""
    engine = with_adapters(make_engine(program, slots=1, queue_len=600), tiny)
    request = Request(prompt_ids=[1], adapter="one", max_new_tokens=47)
    streams = [engine.submit(request) for _ in range(600)]  # more than any machine answers before the next line
    engine.start()
    begin = time.monotonic()
    engine.close(0)
    assert time.monotonic() - begin < 60
    assert all(s.finish_reason in {"cancelled", "length"} for s in streams)
    assert streams[-1].finish_reason == "cancelled"


def test_a_listener_that_fails_ends_its_own_request_only(tiny, program):
    """Its error is at its stream; neighbours in the batch and later requests are as ever."""

    def gone(token):
        raise OSError("gone")

    engine = with_adapters(make_engine(program), tiny)
    bad = engine.submit(Request(prompt_ids=[1], max_new_tokens=40))
    bad.on_token = gone
    request = Request(prompt_ids=[2, 3], adapter="two", max_new_tokens=5)
    with engine:
        streams = [engine.submit(request), engine.submit(request)]
        assert [ids_of(s) for s in streams] == [greedy(tiny, [2, 3], "two", 5)] * 2
        assert bad.wait(60)
    assert (bad.finish_reason, str(bad.error)) == ("error", "gone")


def test_a_shared_prefix_is_computed_once_for_each_adapter(tiny, program):
    """Prompts that begin alike take what the first of their adapter left: PyTorch's tokens, and the counts of what was computed."""
    system = list(range(3, 23))
    prompts = [[*system, n, n + 1] for n in (40, 50, 60)]
    with with_adapters(make_engine(program), tiny) as engine:
        for adapter in ("one", "two", "base"):
            before = engine.stats()
            for prompt in prompts:
                stream = engine.submit(Request(prompt_ids=prompt, adapter=adapter, max_new_tokens=6))
                assert ids_of(stream) == greedy(tiny, prompt, adapter, 6)
            now = engine.stats()
            assert now.reused[adapter] == 2 * 20
            assert now.prompt_tokens - before.prompt_tokens == 22 + 2 + 2
        # Loaded anew, the name has another version: nothing of the old one is taken.
        engine.load_adapter("one", tiny.adapters["two"])
        stream = engine.submit(Request(prompt_ids=prompts[0], adapter="one", max_new_tokens=6))
        assert ids_of(stream) == greedy(tiny, prompts[0], "two", 6)
        assert engine.stats().reused["one"] == 2 * 20


def test_prefixes_are_bounded_and_can_be_left_out(tiny, program):
    """Kept prefixes stay below their bound, unloading an adapter drops its own, and 0 bytes keep none."""
    prompts = np.random.default_rng(5).integers(0, VOCAB, (8, 16)).tolist()
    with with_adapters(make_engine(program), tiny) as engine:
        ids_of(engine.submit(Request(prompt_ids=prompts[0], adapter="one", max_new_tokens=1)))
        one = engine.stats().prefix_bytes
        assert one > 0
        engine.unload_adapter("one")
        assert engine.stats().prefix_bytes == 0
    with make_engine(program, prefix_bytes=3 * one) as engine:
        for prompt in prompts:
            ids_of(engine.submit(Request(prompt_ids=prompt, max_new_tokens=1)))
        assert engine.stats().prefix_bytes == 3 * one
    with make_engine(program, prefix_bytes=0) as engine:
        for prompt in (prompts[0], prompts[0]):
            ids_of(engine.submit(Request(prompt_ids=prompt, max_new_tokens=1)))
        assert engine.stats().prompt_tokens == 32


def test_a_long_prompt_does_not_stall_decoding(tiny, program):
    """While a prompt of 40 tokens is taken in 8 chunks, the row that decodes gets a token after each."""
    engine, order = with_adapters(make_engine(program), tiny), []
    streams = []
    for name, prompt, count in (("one", [1], 20), ("two", list(range(40)), 2)):
        streams.append(engine.submit(Request(prompt_ids=prompt, adapter=name, max_new_tokens=count)))
        streams[-1].on_token = lambda token, name=name: order.append(name) if token else None
    with engine:
        assert all(s.wait() for s in streams)
    assert order.index("two") == 2 + 7  # two tokens of the first turn, and one for each chunk but the last


def test_what_is_checked_is_the_version_that_runs(tiny, program, monkeypatch) -> None:
    """An adapter that is replaced just then by one with more virtual tokens: the request that would not fit any more is refused."""

    def with_virtual_tokens(count):
        states = {s.name: np.zeros((s.shape[1], count, s.shape[3]), s.dtype) for s in engine.manifest.states}
        return {name: np.zeros_like(tensor) for name, tensor in tiny.adapters["one"].items()} | states

    engine = make_engine(program)
    engine.load_adapter("soft", with_virtual_tokens(2))
    hold = engine.residents.hold

    def hold_too_late(name):
        engine.load_adapter("soft", with_virtual_tokens(40))
        return hold(name)

    request = Request(prompt_ids=[5] * 10, adapter="soft", max_new_tokens=5)
    engine.submit(request).cancel()
    monkeypatch.setattr(engine.residents, "hold", hold_too_late)
    for submit in (engine.submit, lambda one: engine.submit_all([one])):
        with pytest.raises(ConfigError, match="40 virtual tokens"):
            submit(request)
    assert engine.residents.find("soft").uses == 0
    engine.close()
