# SPDX-License-Identifier: BSD-3-Clause
"""OpenAI's own client against the server: everything that it calls, unchanged."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serve.conftest import Place, Running


def said(content: object, **fields: object) -> dict[str, object]:
    """Return a user's message."""
    return {"role": "user", "content": content, **fields}


ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}


def test_models_are_base_and_adapters(served: Running) -> None:
    """The base and both adapters are listed, each adapter with its parent."""
    models = {m.id: m for m in served.client().models.list()}
    assert {"base", "one", "two"} <= set(models)
    assert served.client().models.retrieve("one").id == "one"
    base = served.client().models.retrieve("base")
    assert served.client().models.retrieve(base.root) == base  # a path: what the server was started with
    with pytest.raises(openai.NotFoundError, match="no such model"):
        served.client().models.retrieve("org/nine")


def test_health_without_a_body(served: Running) -> None:
    """Who balances load may ask for the head alone."""
    with urllib.request.urlopen(urllib.request.Request(f"{served.url}/health", method="HEAD")) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_each_adapter_answers_as_pytorch_does(served: Running, place: Place) -> None:
    """Base and both adapters give, token for token, what transformers and PEFT give."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.base)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    seen = set()
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_pretrained(place.base)
        if name != "base":
            model = PeftModel.from_pretrained(model, str(place.adapters / name))
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = served.client().completions.create(model=name, prompt="hello", max_tokens=12, temperature=0)
        assert text.choices[0].text == tokenizer.decode(out, skip_special_tokens=True)
        seen.add(text.choices[0].text)
    assert len(seen) == 3  # the adapters make a difference


def test_streaming_gives_the_same_text(served: Running) -> None:
    """Pieces joined are the whole; usage comes in the last chunk if asked for."""
    client = served.client()
    whole = client.chat.completions.create(model="one", **ASK)
    chunks = list(
        client.chat.completions.create(model="one", stream=True, stream_options={"include_usage": True}, **ASK)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_several_choices(served: Running) -> None:
    """``n`` choices, whole and streamed, come in order and are the same for the same seed."""
    client = served.client()
    options = {"model": "two", "messages": ASK["messages"], "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1.5}
    whole = [c.message.content for c in client.chat.completions.create(**options).choices]
    assert len(set(whole)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == whole


def test_logprobs(served: Running) -> None:
    """Each token comes with its log probability and the likeliest ones; greedy takes the likeliest."""
    client = served.client()
    chat = client.chat.completions.create(model="one", logprobs=True, top_logprobs=3, **ASK)
    content = chat.choices[0].logprobs.content
    assert len(content) == 12
    assert all(t.logprob == t.top_logprobs[0].logprob and len(t.top_logprobs) == 3 for t in content)
    text = client.completions.create(model="one", prompt=["a", "b"], max_tokens=4, logprobs=2, temperature=0)
    assert [len(c.logprobs.tokens) for c in text.choices] == [4, 4]
    assert all(len(top) == 2 for c in text.choices for top in c.logprobs.top_logprobs)
    # Most tokens here are parts of characters: their own bytes are told, not those of a replacement.
    told = bytes(b for t in content for b in t.bytes)
    assert len(told) == 12
    assert told.decode("utf-8", "replace") == chat.choices[0].message.content


def test_stop_strings_over_the_borders_of_tokens(served: Running) -> None:
    """With tokens of one byte every stop string lies over borders; the text ends before it."""
    client = served.client()
    whole = client.completions.create(model="one", prompt="hello", max_tokens=24, temperature=0).choices[0].text
    stop = whole[5:8]
    cut = client.completions.create(model="one", prompt="hello", max_tokens=24, temperature=0, stop=[stop, "never"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model="one", prompt="hello", max_tokens=24, temperature=0, stop=stop, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == cut.choices[0].text


def test_tokens_that_are_told_are_those_of_the_text(served: Running) -> None:
    """Log probabilities of what a stop string cuts off are left out, whole and streamed; offsets are those of the text."""
    client = served.client()
    ask = {"model": "one", "prompt": "hello", "max_tokens": 24, "temperature": 0, "logprobs": 1}
    text = client.completions.create(**ask).choices[0]
    whole, told = text.text, text.logprobs
    assert len(told.tokens) == 24
    assert told.text_offset == sorted(told.text_offset)
    # A token behind an unfinished character, which a random model writes often, is told to begin where that does.
    assert all(t in whole[at : at + 2] for at, t in zip(told.text_offset, told.tokens, strict=True))
    stop = whole[5:8]
    end = whole.index(stop)
    cut = client.completions.create(stop=stop, **ask).choices[0]
    kept = [i for i, at in enumerate(told.text_offset) if at < end]
    assert cut.text == whole[:end]
    assert cut.logprobs.token_logprobs == pytest.approx([told.token_logprobs[i] for i in kept], abs=1e-5)
    assert cut.logprobs.text_offset == [told.text_offset[i] for i in kept]
    pieces = [c.choices[0].logprobs for c in client.completions.create(stop=stop, stream=True, **ask)]
    assert [at for p in pieces if p for at in p.text_offset] == cut.logprobs.text_offset
    assert [t for p in pieces if p for t in p.tokens] == cut.logprobs.tokens


def test_prompts_of_tokens(served: Running) -> None:
    """A prompt may be tokens, and several prompts may come at once."""
    client = served.client()
    out = client.completions.create(model="one", prompt=[[5, 6, 7], [8, 9]], max_tokens=2, temperature=0)
    assert out.usage.prompt_tokens == 5
    assert [c.index for c in out.choices] == [0, 1]


def test_the_only_form_of_answers_is_text(served: Running) -> None:
    """``response_format`` text changes nothing; JSON is refused by name, not answered with something else."""
    client = served.client()
    plain = client.chat.completions.create(model="one", **ASK)
    text = client.chat.completions.create(model="one", response_format={"type": "text"}, **ASK)
    assert text.choices[0].message.content == plain.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"response_format\.type: Input should be 'text'"):
        client.chat.completions.create(model="one", response_format={"type": "json_object"}, **ASK)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "nine"}, openai.NotFoundError, "no adapter 'nine'"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "the context holds 256 tokens"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "tempratur"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"n": 100}, openai.BadRequestError, "at most 16 answers"),
        ({"n": 1000}, openai.BadRequestError, "n: Input should be less than or equal to 128"),
        ({"stop": ["a", ""]}, openai.BadRequestError, "stop.1: String should have at least 1 character"),
        ({"stop": 5}, openai.BadRequestError, "stop: Input should be a valid string, not a number"),
        (
            {"messages": [said(None)]},
            openai.BadRequestError,
            "messages.0.content: Input should be a valid string, not null",
        ),
        (
            {"messages": [said("a"), said(None, tool_calls=[])]},
            openai.BadRequestError,
            "messages.1.tool_calls: this server",
        ),
        (
            {"messages": [said([{"type": "image_url", "image_url": {}}])]},
            openai.BadRequestError,
            "content.0.image_url: this",
        ),
        ({"messages": [said([{"type": "text"}])]}, openai.BadRequestError, "messages.0.content.0.text: Field required"),
        ({"messages": ["hello"]}, openai.BadRequestError, "messages.0: Input should be .* not a string"),
    ],
)
def test_errors(served: Running, change: dict, error: type[Exception], says: str) -> None:
    """A wrong request becomes the client's own exception, with what is wrong."""
    with pytest.raises(error, match=says):
        served.client().chat.completions.create(**{"model": "one", **ASK, **change})


def test_what_is_too_long_is_named(served: Running) -> None:
    """The message of a conversation, or the prompt of a text; without ``max_tokens`` there are as many as fit."""
    client, letters = served.client(), "a" * 250
    with pytest.raises(openai.BadRequestError, match="250 prompt tokens and 16 new ones") as e:
        client.completions.create(model="one", prompt=["a", letters], max_tokens=16)
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="prompt tokens do not fit") as e:
        client.chat.completions.create(model="one", messages=[{"role": "user", "content": letters}])
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "messages")
    for length in (100, 250):
        answer = client.completions.create(model="one", prompt=[5] * length, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == min(16, 256 - length)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", [5, 260]), ("prompt", [[5], [6, 260]]), ("logit_bias", {"260": 1})], ids=str
)
def test_tokens_that_the_base_lacks(served: Running, field: str, value: object) -> None:
    """The field at fault is named as the client calls it."""
    with pytest.raises(openai.BadRequestError, match=f"{field}: token ids must be .* below 260, not 260") as e:
        served.client().completions.create(**{"model": "one", "prompt": "x", field: value})
    assert (e.value.code, e.value.param) == ("invalid_value", field)


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("application/json", "{not json", "the body is not JSON"),
        ("text/plain", '{"model": "one", "prompt": "x"}', "content-type: application/json"),
        ("application/json", '{"%s": 1}' % ("x" * 5000), f"{'x' * 100}: this server does not serve this field"),
        ("application/json", '{"prompt": "x"}', "model: Field required"),
        ("application/json", "[]", "the body must be a JSON object"),
        ("application/json", '{"model": "one", "prompt": []}', "prompt: List should have at least 1 item"),
        (
            "application/json",
            '{"model": "one", "prompt": [5, -1]}',
            "prompt.1: Input should be greater than or equal to 0",
        ),
        (
            "application/json",
            '{"model": "one", "prompt": [5, "a"]}',
            "prompt.0: Input should be a valid string, not a number",
        ),
    ],
)
def test_bodies_that_are_none(served: Running, kind: str, body: str, says: str) -> None:
    """The message says what to do, names no place in the body, and is counted and written down."""
    request = urllib.request.Request(f"{served.url}/v1/completions", body.encode(), {"content-type": kind})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    answer = json.load(refused.value)["error"]
    assert refused.value.code == 400
    assert says in answer["message"]
    assert len(answer["message"]) < 300
    assert any(e["event"] == "refused" and e.get("reason") == answer["message"] for e in served.events())
    with urllib.request.urlopen(f"{served.url}/metrics") as text:
        assert 'qeff_refused_total{status="400"}' in text.read().decode()


def test_the_asynchronous_client(served: Running) -> None:
    """Many requests at a time over one client, each with its own adapter, give what each gives alone."""
    alone = {
        m: served.client().chat.completions.create(model=m, **ASK).choices[0].message.content
        for m in ("base", "one", "two")
    }

    async def ask_all() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=120) as client:

            async def ask(model: str) -> tuple[str, str]:
                answer = await client.chat.completions.create(model=model, **ASK)
                return model, answer.choices[0].message.content

            return await asyncio.gather(*(ask(m) for m in list(alone) * 8))

    assert all(text == alone[model] for model, text in asyncio.run(ask_all()))


def test_a_client_that_goes_away_frees_its_slot(served: Running) -> None:
    """A stream closed by its client is cancelled: the slots become free long before it would have ended."""
    client = served.client()
    for _ in range(4):
        stream = client.completions.create(
            model="one", prompt="x", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 60
    while client.get("/adapters", cast_to=dict)["engine"]["active"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_characters_of_several_bytes(served: Running) -> None:
    """Streamed pieces never hold half a character, whole and streamed are the same text."""
    client = served.client()
    options = {"model": "base", "prompt": "€uro ü 漢字", "max_tokens": 60, "temperature": 2.0, "seed": 3}
    whole = client.completions.create(**options).choices[0].text
    pieces = [c.choices[0].text for c in client.completions.create(stream=True, **options)]
    assert "".join(pieces) == whole


def test_metrics_by_adapter(served: Running) -> None:
    """Prometheus finds tokens and latencies of each adapter, what was copied from prefixes, and queue, slots, loads and evictions."""
    for _ in range(2):
        served.client().completions.create(model="two", prompt="a system prompt of some length", max_tokens=3)
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['qeff_new_tokens_total{model="two"}']) >= 6
    assert float(values['qeff_first_token_seconds_count{model="two"}']) >= 2
    assert float(values['qeff_requests_total{model="two",status="200"}']) >= 2
    assert float(values['qeff_prefix_tokens_total{model="two"}']) >= 29
    for name in (
        "qeff_slots",
        "qeff_slots_active",
        "qeff_queue_waiting",
        "qeff_prefix_bytes",
        "qeff_adapters_resident",
    ):
        assert name in values
    for name in ("hits", "misses", "loads", "evictions", "refusals"):
        assert f"qeff_adapter_{name}_total" in values


@pytest.mark.slow
def test_keys_and_their_limits(start, tmp_path) -> None:
    """A missing or wrong key is refused; a key has its models, its pace and no rights that it was not given."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "- {name: root, key: root-secret, admin: true}\n"
        "- {name: small, key: small-secret, models: [one], requests_per_minute: 3}\n"
    )
    running = start("--api-keys", str(keys))
    for wrong in ("nonsense", "root-secre", "root-secretx"):
        with pytest.raises(openai.AuthenticationError):
            running.client(wrong).models.list()
    with running.connect() as s:
        s.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 401")
    small = running.client("small-secret")
    assert [m.id for m in small.models.list()] == ["one"]
    with pytest.raises(openai.NotFoundError):
        small.chat.completions.create(model="two", **ASK)
    with pytest.raises(openai.PermissionDeniedError):
        small.post("/unload_lora_adapter", body={"lora_name": "one"}, cast_to=str)
    with pytest.raises(openai.PermissionDeniedError, match="may not see the metrics"):
        small.get(f"{running.url}/metrics", cast_to=str)
    assert "qeff_slots" in running.client("root-secret").get(f"{running.url}/metrics", cast_to=str)
    for _ in range(2):
        small.chat.completions.create(model="one", **ASK)
    with pytest.raises(openai.RateLimitError) as refused:
        small.chat.completions.create(model="one", **ASK)
    assert int(refused.value.response.headers["retry-after"]) <= 60
    running.client("root-secret").post("/unload_lora_adapter", body={"lora_name": "two"}, cast_to=str)
    log = running.log.read_text()
    assert "secret" not in log
    assert "hello" not in log


@pytest.mark.slow
def test_shutdown_finishes_what_runs(start) -> None:
    """After SIGTERM running streams end whole, new requests and health checks get 503, and the process ends with code 0."""
    running = start("--grace-seconds", "60", "--slots", "1")
    client = running.client()
    client.completions.create(model="one", prompt="warm", max_tokens=1)
    stream = client.completions.create(
        model="one", prompt="x", max_tokens=250, n=16, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )
    iterator = iter(stream)
    next(iterator)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(running.stop)
        while "draining" not in [e["event"] for e in running.events()]:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            running.client().completions.create(model="one", prompt="x", max_tokens=1)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{running.url}/health")
        chunks = list(iterator)
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"] * 16
        assert stopped.result() == 0
    assert "closed" in [e["event"] for e in running.events()]


@pytest.mark.slow
def test_shutdown_returns_what_is_not_finished_in_time(start) -> None:
    """When the time to finish is over, streams and whole answers end with what there is, and say so; the process ends with code 0."""
    running = start("--grace-seconds", "1", "--slots", "1")
    client = running.client()
    client.completions.create(model="one", prompt="warm", max_tokens=1)
    ask = {"model": "one", "prompt": "x", "max_tokens": 240, "n": 16, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(2) as pool:
        stream = iter(client.completions.create(stream=True, **ask))
        next(stream)
        whole = pool.submit(client.completions.create, **ask)
        time.sleep(0.2)  # for it to arrive
        stopped = pool.submit(running.stop)
        ends = [c.choices[0].finish_reason for c in stream if c.choices[0].finish_reason]
        assert len(ends) == 16
        assert ends[-1] == "abort"
        answer = whole.result()
        assert "abort" in {c.finish_reason for c in answer.choices}
        assert answer.usage.completion_tokens < 16 * 240
        assert stopped.result() == 0
