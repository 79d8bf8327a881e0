# SPDX-License-Identifier: BSD-3-Clause
"""One server: engine, registry, tokenizer and what an operator decided, put together; requests in, answers out.

Knows OpenAI's requests; does not know HTTP.
"""

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from QEfficient.contract import BASE
from QEfficient.errors import AdaptersFullError
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request, Sampling, first_unknown
from QEfficient.serve.completions import Answer
from QEfficient.serve.config import Key, Keys, Limits, Places
from QEfficient.serve.entries import Lease
from QEfficient.serve.failures import Refusal
from QEfficient.serve.lanes import Lanes
from QEfficient.serve.logs import log
from QEfficient.serve.metrics import Metrics
from QEfficient.serve.registry import Registry
from QEfficient.serve.schemas import ChatRequest, CompletionRequest
from QEfficient.serve.text import Prompts


@dataclass(slots=True)
class Job:
    """Everything that one request of a client needs while it runs.

    Attributes:
        model: The adapter as the client calls it.
        answers: One for each choice.
        prompt_tokens: Of all prompts.
    """

    model: str
    answers: list[Answer]
    prompt_tokens: int
    lease: Lease

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(a.new_tokens for a in self.answers)

    def close(self) -> None:
        """End what still runs."""
        for answer in self.answers:
            answer.close()
        self.lease.release()


@dataclass(slots=True)
class Server:
    """What the routes call.

    Args:
        lanes: The engines, started.
        registry: Their adapters.
        prompts: The base's tokenizer.
        base: What clients call the base, besides ``"base"``.
        eos_ids: Tokens that end an answer.
        ctx_len: Longest context.
    """

    lanes: Lanes
    registry: Registry
    prompts: Prompts
    base: str
    eos_ids: frozenset[int]
    ctx_len: int
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    places: Places = field(default_factory=Places)
    log_prompts: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    metrics: Metrics = field(init=False)
    _workers: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        """Connect the metrics."""
        self.metrics = Metrics(self._snapshot)
        self.registry.on_load = self._loaded
        self._workers = ThreadPoolExecutor(64, "waits-for-adapter")

    # -- what there is

    @property
    def engine(self) -> Engine:
        """The engine that serves the base."""
        return self.lanes.first.engine

    def models(self, key: Key | None) -> list[tuple[str, str | None]]:
        """Return the names that a client may ask for, and the base each stands on."""
        refused = {v.name for v in self.registry.entries() if v.refused}
        names = [(BASE, None), *((n, BASE) for n in self.registry.names if n not in refused)]
        return [(n, p) for n, p in names if _allowed(key, n)]

    def name_of(self, model: str, key: Key | None) -> str:
        """Return the adapter that ``model`` means.

        Raises:
            Refusal: This key may not use it. One that does not exist is found out later.
        """
        name = BASE if model == self.base else model
        if not _allowed(key, name):
            raise Refusal(404, f"no model {model!r}, or not for this key", code="model_not_found", param="model")
        return name

    # -- requests

    async def chat(self, body: ChatRequest, key: Key | None) -> Job:
        """Start the answers to a conversation.

        Raises:
            QEffError: Why they cannot be started.
        """
        messages = [m.plain() for m in body.messages]
        ids = await self._in_thread(self.prompts.of_chat, messages)
        wanted = body.max_completion_tokens or body.max_tokens
        count = (body.top_logprobs or 0) if body.logprobs else None
        return await self._start(body, [ids], wanted, count, key)

    async def complete(self, body: CompletionRequest, key: Key | None) -> Job:
        """Start the answers to texts.

        Raises:
            QEffError: Why they cannot be started.
        """
        prompts = [
            list(p) if isinstance(p, list) else await self._in_thread(self.prompts.of_text, p) for p in body.prompts()
        ]
        return await self._start(body, prompts, body.max_tokens, body.logprobs, key)

    async def _start(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        wanted: int | None,
        logprobs: int | None,
        key: Key | None,
    ) -> Job:
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down", retry_seconds=5)
        name, count = self.name_of(body.model, key), body.n or 1
        if len(prompts) * count > self.limits.choices:
            raise Refusal(400, f"at most {self.limits.choices} answers a request (n times prompts)", param="n")
        param, unasked = ("messages", self.limits.new_tokens) if isinstance(body, ChatRequest) else ("prompt", 16)
        longest = max(map(len, prompts))
        if not all(prompts):
            raise Refusal(400, "the prompt has no tokens", code="empty_prompt", param=param)
        self._need_room(longest, wanted, param)  # before an adapter is loaded for nothing
        self._need_known(chain.from_iterable(prompts), param)
        self._need_known(map(int, body.logit_bias or ()), "logit_bias")
        lease = await self._lease(name)
        seed = body.seed if body.seed is not None else random.getrandbits(48)
        job = Job(name, [], sum(map(len, prompts)), lease)
        engine = self.lanes.engine_of(lease.resident)
        try:
            virtual = lease.resident.virtual_tokens
            self._need_room(longest, wanted, param, virtual)
            for ids in prompts:
                for i in range(count):
                    request = Request(
                        prompt_ids=ids,
                        adapter=lease.version,
                        max_new_tokens=wanted
                        or min(self.ctx_len - virtual - len(ids), self.limits.new_tokens, unasked),
                        eos_ids=frozenset() if body.ignore_eos else self.eos_ids,
                        sampling=_sampling(body, seed + i),
                        logprobs=logprobs,
                    )
                    job.answers.append(Answer(engine, request, self.prompts.tokenizer, body.stops()))
        except BaseException:
            job.close()
            raise
        self.jobs[id(job)] = job
        return job

    def finish(self, job: Job, *, status: int, key: Key | None, started: float, request_id: str) -> None:
        """End a job, count it and write it down."""
        job.close()
        self.jobs.pop(id(job), None)
        seconds = time.perf_counter() - started
        metrics, model = self.metrics, job.model
        metrics.requests.labels(model, str(status)).inc()
        metrics.prompt_tokens.labels(model).inc(job.prompt_tokens)
        metrics.new_tokens.labels(model).inc(job.new_tokens)
        metrics.duration.labels(model).observe(seconds)
        for answer in job.answers:
            if answer.timing.first is not None:
                metrics.first_token.labels(model).observe(answer.timing.first)
            for gap in answer.timing.gaps:
                metrics.between_tokens.labels(model).observe(gap)
        log(
            "request",
            id=request_id,
            model=model,
            adapter_version=job.lease.version,
            key=key.name if key else None,
            status=status,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.new_tokens,
            seconds=round(seconds, 4),
        )

    def abort_all(self) -> None:
        """End every running answer; clients get what there is."""
        for job in list(self.jobs.values()):
            for answer in job.answers:
                answer.close()

    def close(self) -> None:
        """Stop for good."""
        self.abort_all()
        self.lanes.stop()
        self.registry.close()
        self.lanes.close(timeout=5.0)
        self._workers.shutdown(wait=False, cancel_futures=True)

    # -- adapters

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Check, load and know an adapter.

        Raises:
            QEffError: Why it is refused.
        """
        place = self.places.check(path)
        await self._in_thread(
            partial(self.registry.load, name, place, replace=replace, seconds=self.limits.load_seconds)
        )
        log("adapter loaded", model=name)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        self.registry.unregister(name)
        log("adapter unloaded", model=name)

    # -- inside

    async def _lease(self, name: str) -> Lease:
        asked = self.registry.ask(name)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(asked), self.limits.load_seconds)
        except BaseException as e:
            if not asked.cancel() and not asked.exception():
                asked.result().release()
            if isinstance(e, TimeoutError):
                seconds = self.limits.load_seconds
                raise AdaptersFullError(f"adapter {name!r} could not be loaded within {seconds:g} s") from e
            raise

    def _need_room(self, prompt: int, wanted: int | None, param: str, virtual: int = 0) -> None:
        """Refuse what is longer than it may be; without a number of new tokens, there must be room for one."""
        if virtual + prompt + (wanted or 1) > self.ctx_len:
            asked = f" and {wanted} new ones" if wanted is not None else ""
            more = f"{virtual} virtual tokens of the adapter, " if virtual else ""
            message = f"the context holds {self.ctx_len} tokens: {more}{prompt} prompt tokens{asked} do not fit"
            raise Refusal(400, message, code="context_length_exceeded", param=param)
        if wanted is not None and wanted > self.limits.new_tokens:
            raise Refusal(400, f"at most {self.limits.new_tokens} new tokens a request", param="max_tokens")

    def _need_known(self, ids: Iterable[int], param: str) -> None:
        """Refuse tokens that the base does not have."""
        count = self.engine.manifest.vocab_size
        if (unknown := first_unknown(ids, count)) is not None:
            message = f"{param}: token ids must be at least 0 and below {count}, not {unknown}"
            raise Refusal(400, message, code="invalid_value", param=param)

    async def _in_thread(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)

    def _loaded(self, name: str, seconds: float) -> None:
        self.metrics.adapter_load.observe(seconds)
        log("adapter resident", model=name, seconds=round(seconds, 4))

    def _snapshot(self) -> dict[str, tuple[str, float | Mapping[str, float]]]:
        stats, counts, memory = self.lanes.stats(), self.registry.counts, self.lanes.memory()
        return {
            "qeff_graphs": ("Graphs, each with an engine.", len(self.lanes)),
            "qeff_weights_bytes": ("What the base's weights take, in all graphs.", memory["weights"] or 0),
            "qeff_cache_bytes": (
                "What the slots' caches take, in all graphs, when they are full.",
                memory["cache"] or 0,
            ),
            "qeff_slots": ("Requests that can run at a time.", stats.slots),
            "qeff_slots_active": ("Requests that run.", stats.active),
            "qeff_queue_waiting": ("Requests that wait for a slot.", stats.waiting),
            "qeff_prefill_seconds_total": ("Time spent on prompts.", stats.prefill_seconds),
            "qeff_decode_seconds_total": ("Time spent on new tokens.", stats.decode_seconds),
            "qeff_prefix_tokens_total": ("Prompt tokens that were copied from a kept prefix.", stats.reused),
            "qeff_prefix_bytes": ("What kept prefixes of prompts take.", stats.prefix_bytes),
            "qeff_adapters_registered": ("Adapters that are known.", len(self.registry.names)),
            "qeff_adapters_resident": ("Adapters in memory.", memory["adapters"] or 0),
            "qeff_adapters_resident_bytes": ("What they take.", memory["bytes"] or 0),
            "qeff_adapters_max_bytes": ("What they may take.", memory["limit"] or 0),
            "qeff_adapter_hits_total": ("Requests whose adapter was in memory.", counts.hits),
            "qeff_adapter_misses_total": ("Requests that waited for one.", counts.misses),
            "qeff_adapter_loads_total": ("Adapters loaded.", counts.loads),
            "qeff_adapter_evictions_total": ("Adapters evicted.", memory["evictions"] or 0),
            "qeff_adapter_refusals_total": ("Adapters refused.", counts.refusals),
        }


def _allowed(key: Key | None, name: str) -> bool:
    return key is None or not key.models or name in key.models


def _sampling(body: ChatRequest | CompletionRequest, seed: int) -> Sampling:
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=seed % (1 << 63),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(k): v for k, v in (body.logit_bias or {}).items()},
    )
