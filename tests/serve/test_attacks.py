# SPDX-License-Identifier: BSD-3-Clause
"""What an attacker sends: refused with a reason, without work, and the next client is served."""

import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.conftest import Place, Running


@pytest.fixture(autouse=True)
def still_serves(served: Running) -> Iterator[None]:
    """After each attack, an honest request is answered."""
    yield
    answer = served.client().completions.create(model="one", prompt="hello", max_tokens=2)
    assert answer.usage.completion_tokens in {1, 2}


def refused(served: Running, name: str, path: str | Path) -> str:
    """Load an adapter, expect a refusal, and return what it says."""
    with pytest.raises(openai.APIStatusError) as e:
        served.client().post("/load_lora_adapter", body={"lora_name": name, "lora_path": str(path)}, cast_to=str)
    assert 400 <= e.value.status_code < 500
    assert name not in [m.id for m in served.client().models.list()]
    return str(e.value)


@pytest.mark.parametrize("name", ["../one", "..", "a/b", "a\\b", "a\0b", "a b", "%2e%2e", "base/one", "-" * 300])
def test_names_that_leave_their_place(served: Running, place: Place, name: str) -> None:
    """A name is no path."""
    refused(served, name, place.adapters / "one")
    with pytest.raises(openai.APIStatusError) as e:
        served.client().completions.create(model=name, prompt="x")
    assert e.value.status_code in {400, 404}


def test_no_adapter_takes_the_place_of_the_base(served: Running, place: Place) -> None:
    """``base`` stays the base."""
    body = {"lora_name": "base", "lora_path": str(place.adapters / "one"), "load_inplace": True}
    with pytest.raises(openai.BadRequestError, match="another name"):
        served.client().post("/load_lora_adapter", body=body, cast_to=str)


def test_folders_that_are_not_allowed(served: Running, place: Place, tmp_path: Path) -> None:
    """Neither dots nor links lead out of the allowed folder; the answer does not tell what is there."""
    shutil.copytree(place.adapters / "one", tmp_path / "secret")
    link = place.adapters / "link"
    link.symlink_to(tmp_path / "secret")
    said = {
        refused(served, "out", path)
        for path in (tmp_path / "secret", place.adapters / ".." / "base", link, "/nowhere", "~/x", "owner/name")
    }
    link.unlink()
    assert len(said) == 1
    assert "outside" in said.pop()


def test_an_adapter_that_is_a_pickle(served: Running, place: Place, tmp_path: Path) -> None:
    """A pickle is not loaded, and its code does not run."""
    folder = place.adapters / "pickled"
    shutil.copytree(place.adapters / "one", folder)
    (folder / "adapter_model.safetensors").unlink()
    proof = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (proof,))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in refused(served, "pickled", folder)
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["length", "shape", "offsets"])
def test_a_header_that_claims_terabytes(served: Running, place: Place, kind: str) -> None:
    """A safetensors header is held against the file before anything is allocated."""
    folder = place.adapters / f"huge-{kind}"
    shutil.copytree(place.adapters / "one", folder)
    big = 1 << 42
    entry = {"dtype": "F32", "shape": [big // 4], "data_offsets": [0, big if kind == "offsets" else 16]}
    header = json.dumps({"x": entry}).encode()
    length = big if kind == "length" else len(header)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", length) + header + b"\0" * 16)
    assert "damaged or not a safetensors file" in refused(served, f"huge-{kind}", folder)


def test_a_file_that_is_no_safetensors(served: Running, place: Place) -> None:
    """Nor is text."""
    folder = place.adapters / "text"
    shutil.copytree(place.adapters / "one", folder)
    (folder / "adapter_model.safetensors").write_text("hello" * 100)
    assert "damaged" in refused(served, "text", folder)


def test_values_that_are_not_finite(served: Running, place: Place) -> None:
    """NaN would spread through a batch: such an adapter is refused by the checks."""
    from safetensors.numpy import load_file, save_file

    folder = place.adapters / "nan"
    shutil.copytree(place.adapters / "one", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "NaN" in refused(served, "nan", folder)


def test_a_prompt_of_100_megabytes(served: Running) -> None:
    """It is refused by its announced length, and by its true one where none is announced."""
    with served.connect() as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 104857600\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 413")
    with served.connect() as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        answer = b""
        try:
            for _ in range(100):
                s.sendall(chunk)
        except OSError:
            pass  # it closed the connection: good
        try:
            answer = s.recv(100)
        except OSError:
            return
        assert answer.startswith(b"HTTP/1.1 413")


def test_10000_header_lines(served: Running) -> None:
    """They are refused before they are all taken in."""
    with served.connect() as s:
        lines = b"".join(b"x-%d: y\r\n" % i for i in range(10_000))
        try:
            s.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
            assert s.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        except ConnectionError:
            pass  # closed at once: refused too


@pytest.mark.slow
def test_clients_that_are_slow(start: Callable[..., Running]) -> None:
    """Headers and bodies that do not come are given up after the time allowed; others are served meanwhile."""
    running = start("--receive-seconds", "2")
    slow = [running.connect() for _ in range(50)]
    for i, s in enumerate(slow):
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"
            if i % 2
            else b"GET /health HTTP/1.1\r\nho"
        )
    begun = time.monotonic()
    assert running.client().completions.create(model="one", prompt="x", max_tokens=1).choices
    for i, s in enumerate(slow):
        said = s.recv(100)
        assert said.startswith(b"HTTP/1.1 408") if i % 2 else said == b""
        s.close()
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": 1}', b"\xff\xfe", b'{"model":"one","prompt":' + b"[" * 50_000, b'{"model":"one","prompt":"\\ud800"}'],
    ids=["empty", "cut", "list", "null", "number", "bytes", "deep", "surrogate"],
)  # fmt: skip
def test_malformed_bodies(served: Running, body: bytes) -> None:
    """Whatever is sent, it is the sender's fault, and said in OpenAI's form."""
    with served.connect() as s:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        s.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while part := s.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 4")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


@pytest.mark.slow
def test_what_schemathesis_makes_of_the_schema(served: Running) -> None:
    """No request that it derives from our OpenAPI description, valid or not, gets a 5xx."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    seen = []
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                response = case.call()
                seen.append(response.status_code)
                assert response.status_code < 500, (case.method, case.path, response.text)

            ask()
    assert len(seen) > 60
