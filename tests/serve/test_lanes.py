# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of every kind from one server: what does not fit the first graph gets one of its own, and answers as PyTorch does."""

import asyncio
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import IA3Config, PeftModel, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from QEfficient.errors import AdapterMismatchError, AdaptersFullError
from QEfficient.runtime.requests import Request
from QEfficient.serve.failures import Refusal
from QEfficient.serve.schemas import CompletionRequest
from QEfficient.serve.server import Server
from QEfficient.serve.start import build
from tests.serve.conftest import Here, Place, Running
from tests.tiny import lora, save_adapter

PROMPT = (70, 71, 72, 73)
COUNT = 12
OTHERS = {
    "dora": lora(use_dora=True),
    "head": lora(modules_to_save=["lm_head"]),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def expected(base: Path, adapter: Path) -> list[int]:
    """Return PyTorch's greedy answer."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    ids = torch.tensor([PROMPT])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
    return [int(i) for i in out[0, len(PROMPT) :]]


def answers(server: Server, names: list[str]) -> dict[str, list[int]]:
    """Return what adapters answer that run at the same time."""
    leases = [server.registry.acquire(name, seconds=600) for name in names]
    streams = []
    for lease in leases:
        request = Request(
            prompt_ids=PROMPT, adapter=lease.version, max_new_tokens=COUNT, eos_ids=frozenset(server.eos_ids)
        )
        streams.append(server.lanes.engine_of(lease.resident).submit(request))
    assert all(s.wait(600) for s in streams)
    for lease in leases:
        lease.release()
    return {name: [t.id for t in stream.tokens] for name, stream in zip(names, streams, strict=True)}


@pytest.fixture(scope="module")
def kinds(place: Place) -> dict[str, Path]:
    """Write adapters of many kinds."""
    made = {n: save_adapter(place.base, place.adapters / n, seed=9, scale=0.3, config=c) for n, c in OTHERS.items()}
    return {"one": place.adapters / "one", **made}


@pytest.fixture
def make(place: Place) -> Iterator[Callable[..., Server]]:
    """Return what makes a server that prepares in this process."""
    made: list[Server] = []

    def begin(adapters: dict[str, Path], **options: Any) -> Server:
        made.append(build(str(place.base), adapters, slots=4, ctx_len=64, threads=1, **options))
        made[-1].lanes.preparer = Here()
        return made[-1]

    yield begin
    for server in made:
        server.close()


def test_lora_dora_and_virtual_tokens_from_one_server(make: Callable[..., Server], place: Place, kinds: Any) -> None:
    """DoRA gets a graph of its own, virtual tokens run on LoRA's; what comes second of a kind needs no other graph."""
    names = ["one", "dora", "prefix"]
    server = make({n: kinds[n] for n in names})
    right = {n: expected(place.base, kinds[n]) for n in names}
    assert len(server.lanes) == 1
    assert answers(server, names) == right
    assert len(server.lanes) == 2
    place_of = {e.name: e.resident.home for e in server.registry.entries() if e.resident}
    assert place_of["one"] is place_of["prefix"] is server.engine.residents
    assert place_of["dora"] is not place_of["one"]
    server.registry.load("late", kinds["dora"], replace=False)
    assert answers(server, ["late", "one"]) == {"late": right["dora"], "one": right["one"]}
    # An adapter may be replaced by one of another kind; nothing of the old one stays.
    server.registry.load("late", kinds["one"], replace=True)
    assert answers(server, ["late", "dora"]) == {"late": right["one"], "dora": right["dora"]}
    assert [len(lane.engine.residents) for lane in server.lanes] == [3, 1]
    assert server.lanes.stats().slots == 8
    told = server.metrics.text().decode()
    assert told.count("qeff_graphs 2.0") == 1
    cache = 2 * 2 * 4 * 2 * 64 * 16 * 4  # graphs, keys and values, slots, heads, positions, head size, bytes
    assert told.count(f"qeff_cache_bytes {cache}.0") == 1
    found = float(told.partition("\nqeff_weights_bytes ")[2].partition("\n")[0])
    weights = sum(p.stat().st_size for lane in server.lanes for p in lane.engine._session.folder.iterdir())
    assert 0.9 * weights < found <= weights


def test_virtual_tokens_count(make: Callable[..., Server], kinds: Any) -> None:
    """Whoever asks for no number of tokens gets as many as fit behind them; what does not fit is told with them."""
    server = make({"prefix": kinds["prefix"]})

    async def ask(**fields: Any) -> int:
        body = CompletionRequest(model="prefix", prompt=[70] * 50, ignore_eos=True, **fields)
        job = await server.complete(body, None)
        async for _ in job.answers[0].pieces():
            pass
        job.close()
        return job.new_tokens

    assert asyncio.run(ask()) == 64 - 50 - 3
    with pytest.raises(Refusal, match="64 tokens: 3 virtual tokens of the adapter, 50 prompt tokens and 12 new"):
        asyncio.run(ask(max_tokens=12))


def test_as_many_graphs_as_may_be(make: Callable[..., Server], kinds: Any) -> None:
    """One graph more than allowed is refused with what to do, and the others go on."""
    server = make({n: kinds[n] for n in ("one", "dora")}, graphs=1)
    with pytest.raises(AdapterMismatchError, match="--graphs"):
        server.registry.acquire("dora", seconds=600)
    assert len(answers(server, ["one"])["one"]) > 0


def test_a_graph_goes_with_its_last_adapter(make: Callable[..., Server], place: Place, kinds: Any) -> None:
    """Not before the last request has ended; then weights and cache are free, and another kind may come in its place."""
    server = make({n: kinds[n] for n in ("one", "dora", "ia3")})
    assert answers(server, ["dora"])["dora"] == expected(place.base, kinds["dora"])
    engine = list(server.lanes)[1].engine
    there = [weakref.ref(o) for o in (engine, engine._session)]
    lease, before = server.registry.acquire("dora"), server.lanes.stats()
    request = Request(prompt_ids=PROMPT, adapter=lease.version, max_new_tokens=40)
    stream = engine.submit(request)
    server.registry.unregister("dora")
    lease.release()
    assert stream.wait(600)
    assert len(stream.tokens) == 40
    del engine, lease, stream
    wait_for(lambda: len(server.lanes) == 1)
    wait_for(lambda: not any(o() for o in there))
    after = server.lanes.stats()
    assert (after.slots, after.active, after.waiting) == (4, 0, 0)
    assert after.new_tokens == before.new_tokens + 40
    assert after.decode_seconds > before.decode_seconds
    # What comes back later answers as before.
    server.registry.register("dora", kinds["dora"])
    assert answers(server, ["dora", "one"])["dora"] == expected(place.base, kinds["dora"])


def test_an_idle_graph_makes_room_for_another_kind(make: Callable[..., Server], place: Place, kinds: Any) -> None:
    """The one whose adapters were idle for longest goes, and comes back when it is asked for; what is in use stays."""
    server = make({n: kinds[n] for n in ("one", "dora", "ia3", "head")}, graphs=3)
    right = {n: expected(place.base, kinds[n]) for n in ("one", "dora", "ia3", "head")}
    used = server.registry.acquire("dora", seconds=600)
    assert answers(server, ["ia3"])["ia3"] == right["ia3"]
    assert answers(server, ["head"])["head"] == right["head"]  # in the place of IA3, which was used later but not now
    assert (len(server.lanes), server.lanes.memory()["evictions"], used.resident.gone) == (3, 1, False)
    server.lanes.seconds = 0.2
    other = server.registry.acquire("head")
    with pytest.raises(AdaptersFullError, match="3 graphs"):
        server.registry.acquire("ia3", seconds=600)
    for lease in (used, other, server.registry.acquire("dora")):
        lease.release()
    server.lanes.seconds = 60
    assert answers(server, ["ia3", "one", "dora"]) == {n: right[n] for n in ("ia3", "one", "dora")}
    assert (server.lanes.memory()["evictions"], used.resident.gone) == (2, False)  # DoRA was taken after the head
    state = {e.name: str(e.state) for e in server.registry.entries()}
    assert state == {"one": "resident", "dora": "resident", "ia3": "resident", "head": "registered"}


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("start", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_adapters_for_which_peft_changes_the_base(
    make: Callable[..., Server], place: Place, kinds: Any, start: str
) -> None:
    """They have a base of their own: PyTorch's answers, and the base and LoRA keep theirs; one of another rank does not fit theirs."""
    made = {
        f"{start}{rank}": save_adapter(
            place.base,
            place.adapters / f"{start}{rank}",
            seed=9,
            scale=0.3,
            config=lora(r=rank, init_lora_weights=start),
        )
        for rank in (4, 2)
    }
    first, second = made
    server = make({"one": kinds["one"], **made})
    plain = answers(server, ["one", "base"])
    assert answers(server, ["one", first, "base"]) == {**plain, first: expected(place.base, made[first])}
    assert plain["one"] == expected(place.base, kinds["one"])
    assert len(server.lanes) == 2
    assert answers(server, ["one", "base"]) == plain
    # The second takes the place of the first.
    assert answers(server, [second, "one"]) == {second: expected(place.base, made[second]), "one": plain["one"]}


@pytest.mark.slow
def test_every_kind_over_http(start: Callable[..., Running], place: Place, kinds: dict[str, Path]) -> None:
    """A real server, which prepares in another process, answers for all of them as PyTorch does."""
    options = [f"--adapter={n}={p}" for n, p in kinds.items() if n != "one"]
    client = start("--graphs", "4", *options).client().with_options(timeout=600, max_retries=5)
    tokenizer = AutoTokenizer.from_pretrained(place.base)
    for name, path in kinds.items():
        prompt = list(PROMPT)
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=COUNT, temperature=0)
        want = tokenizer.decode(expected(place.base, path), skip_special_tokens=True)
        assert answer.choices[0].text == want, name
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
