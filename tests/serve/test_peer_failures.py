# SPDX-License-Identifier: BSD-3-Clause
"""What users of other servers of many adapters complained about, tried here. Each test names the complaint.

Not tried, because it cannot happen here or is tried elsewhere:

- LoRA garbled by CUDA graphs (SGLang #26930, #1921, #12914): there is no CUDA graph; what is recorded here, bindings, is tried below.
- Less throughput with adapters (vLLM #9496, #9452, #10062, #13204, #3316; LoRAX #333, #611, #670; TensorRT-LLM #2441; llama.cpp #27093): a measurement, not a
  test: benchmarks/mixed.py. What made a great rank slow others (vLLM #14435) is padding; that there is none is tried below.
- No memory for one more while all are in use (TensorRT-LLM backend #559), slow and failing downloads (LoRAX #155, #395; aibrix #1886): tests/serve/test_registry.py.
- A restart, or a pause of everybody, for a new adapter (vLLM #4234, #14166, TGI #2177, llama.cpp #7788, #10377, triton backend #641, ollama #7627, OpenLLM #149): every test
  here loads while the engine runs, and tests/runtime/test_engine.py while requests do.
- An API that takes one adapter at construction (llama-cpp-python PR #1817): every test here loads more.
"""

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError
from QEfficient.runtime.mixing import PIECE
from QEfficient.runtime.requests import Request
from QEfficient.serve.registry import Registry
from QEfficient.serve.server import Server
from tests.serve.conftest import Place, tokens
from tests.tiny import save_adapter

LONG = [*range(40, 70)]


def alone(place: Place, folder: Path, prompt: list[int], count: int = 6) -> list[int]:
    """Return what PEFT gives, greedily."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.base), str(folder)).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def test_a_request_in_flight_keeps_its_adapter(server: Server, registry: Registry, place: Place) -> None:
    """VLLM #47724: while others are loaded, replaced and unloaded, a running request gets no other adapter's tokens."""
    wanted = alone(place, place.adapters / "one", [70, 71, 72], 50)
    with registry.acquire("one") as lease:
        request = Request(prompt_ids=[70, 71, 72], adapter=lease.version, max_new_tokens=50)
        streams = [server.engine.submit(request) for _ in range(4)]
        for name in ("three", "four", "five"):
            registry.load("new", place.adapters / name, replace=True)
        registry.load("one", place.adapters / "two", replace=True)
        registry.unregister("new")
        assert [[t.id for t in s] for s in streams] == [wanted] * 4
    assert server.engine.stats().tokens["one"] >= 200  # counted under the name that was asked for


def test_a_name_that_is_loaded_again_meets_no_old_prefix(server: Server, registry: Registry, place: Place) -> None:
    """VLLM #42125: a prompt that is kept for the old version of a name is computed anew for the new one."""
    for _ in range(2):
        with registry.acquire("one") as lease:
            assert tokens(server, lease.version, LONG) == alone(place, place.adapters / "one", LONG)
    reused = server.engine.stats().reused["one"]
    registry.load("one", place.adapters / "two", replace=True)
    with registry.acquire("one") as lease:
        assert tokens(server, lease.version, LONG) == alone(place, place.adapters / "two", LONG)
    assert server.engine.stats().reused["one"] == reused > 0


def test_loads_unloads_and_requests_at_once(server: Server, registry: Registry, place: Place) -> None:
    """Dynamo PR #5184, #10347, #11520, #13068: whatever the order, an answer is right or an error; nothing is left over."""
    right, wrong = set(), []
    for name in ("one", "two"):
        with registry.acquire(name) as lease:
            right.add(tuple(tokens(server, lease.version)))

    def load(folder: str, replace: bool) -> None:
        for _ in range(15):
            try:
                registry.load("shared", place.adapters / folder, replace=replace, seconds=600)
            except ConfigError as e:
                wrong.extend([e] if "already is" not in str(e) else [])

    def unload() -> None:
        for _ in range(30):
            try:
                registry.unregister("shared")
            except AdapterNotFoundError:
                time.sleep(0.001)

    def ask() -> None:
        for _ in range(30):
            try:
                with registry.acquire("shared", seconds=600) as lease:
                    got = tuple(tokens(server, lease.version))
                    wrong.extend([got] if got not in right else [])
            except AdapterNotFoundError:
                time.sleep(0.001)

    work = [(load, "one", True), (load, "two", True), (load, "one", False), (unload,), (unload,), (ask,), (ask,)]
    threads = [threading.Thread(target=w[0], args=w[1:]) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if "shared" in registry.names:
        registry.unregister("shared")
    assert set(server.engine.adapters) == {"one", "two"}
    assert len(registry.residents) == 2


@pytest.fixture
def ranks(place: Place, registry: Registry) -> dict[str, Path]:
    """Write adapters of ranks that other servers do not take, or not together."""
    folders = {f"r{r}": place.add(f"r{r}", seed=r, r=r, lora_alpha=r) for r in (1, 7, 64, 320)}
    for name, folder in folders.items():
        registry.load(name, folder)
    return folders


def test_ranks_of_any_size_side_by_side(
    server: Server, registry: Registry, place: Place, ranks: dict[str, Path]
) -> None:
    """SGLang PR #28091, #7808, vLLM #2847, PR #10623, unsloth #2097: ranks 1, 7, 64, 320, the greatest loaded last, in one batch as alone."""
    request = [Request(prompt_ids=[9, 8, 7], adapter=name, max_new_tokens=6) for name in (*ranks, *ranks)]
    streams = server.engine.submit_all(request)
    got = [[t.id for t in s] for s in streams]
    assert got == [alone(place, folder, [9, 8, 7]) for folder in ranks.values()] * 2


def test_no_rank_is_padded_to_another(server: Server, registry: Registry, ranks: dict[str, Path]) -> None:
    """VLLM #14435: a batch multiplies one piece of each adapter in it; the 320 of one that is resident but idle costs nothing."""
    batch = [Request(prompt_ids=[9, 8, 7], adapter=name, max_new_tokens=20) for name in ("r1", "r7")]
    for stream in server.engine.submit_all(batch):
        assert stream.wait(600)
    pieces = server.engine._session._mixture.tensors
    assert {(t.shape[0], min(t.shape[2:])) for t in pieces.values()} == {(2, PIECE)}


def test_many_reloads_leave_nothing(server: Server, registry: Registry, place: Place) -> None:
    """SGLang PR #31525, #29874, vLLM #29049, trl PR #2730: no slot, no stale weight and no memory stays behind (of the process: benchmarks/load.py)."""
    folders = [place.add(f"big{i}", seed=20 + i, r=64) for i in range(2)]
    wanted = [alone(place, folder, [70, 71, 72]) for folder in folders]
    before = server.engine.memory_bytes()
    for i in range(20):
        registry.load("reloaded", folders[i % 2], replace=True)
        with registry.acquire("reloaded") as lease:
            assert tokens(server, lease.version) == wanted[i % 2]
            size = lease.resident.bytes
    assert registry.residents.bytes == size
    registry.unregister("reloaded")
    assert server.engine.memory_bytes() == before
    assert server.engine.stats().active == 0


KINDS = {
    "lm_head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(
    "kind", ["lm_head", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "lm_head")]
)
def test_what_cannot_be_served_is_refused_when_it_is_loaded(
    server: Server, registry: Registry, place: Place, kind: str
) -> None:
    """VLLM #9280, #6983, LoRAX #163: not at the first request, not by leaving a part out; or it is served as PEFT does."""
    folder = save_adapter(place.base, place.adapters / kind, scale=0.3, config=KINDS[kind])
    with suppress(AdapterMismatchError):
        registry.load(kind, folder)
    if kind in registry.names:
        with registry.acquire(kind) as lease:
            request = Request(prompt_ids=[70, 71, 72], adapter=lease.version, max_new_tokens=6)
            stream = server.lanes.engine_of(lease.resident).submit(request)
            assert [t.id for t in stream] == alone(place, folder, [70, 71, 72])
    else:
        with pytest.raises(AdapterMismatchError, match="--graphs"):
            registry.load(kind, folder)
    with registry.acquire("one") as lease:
        assert tokens(server, lease.version) == alone(place, place.adapters / "one", [70, 71, 72])
