# SPDX-License-Identifier: BSD-3-Clause
"""The server on Ray Serve: what the front tells replicas, and all of it on a cluster of two nodes."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from QEfficient.serve.calls import Call
from QEfficient.serve.config import Places
from QEfficient.serve.front import LOAD, UNLOAD, Front
from QEfficient.serve.metrics import merged
from tests.serve.conftest import Place, Running

CLUSTER = """
import sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_what_the_front_knows_travels_with_the_requests(tmp_path: Path) -> None:
    """A request brings what is known of its adapter, a list everything; loads and unloads count once a replica agreed."""
    calls: list[tuple[Call, str]] = []
    status = 200

    async def send(call: Call, name: str) -> AsyncIterator[Any]:
        calls.append((call, name))
        yield {"type": "http.response.start", "status": status, "headers": []}
        yield {"type": "http.response.body", "body": b"ok"}

    async def ask(front: Front, method: str, path: str, body: bytes = b"") -> int:
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        return (await front(Request(scope, receive))).status_code

    async def ask_all() -> list[tuple[str, str]]:
        return []

    async def all_of_it() -> None:
        nonlocal status
        front = Front(send, ask_all, {"one": "/a/one"}, Places((tmp_path,)))
        complete = "/v1/completions"
        await ask(front, "POST", complete, b'{"model": "one"}')
        await ask(front, "POST", complete, b'{"model": "new"}')
        assert [(n, {k: v and v.generation for k, v in c.adapters.items()}) for c, n in calls] == [
            ("one", {"one": 1}),
            ("new", {"new": None}),
        ]
        load = b'{"lora_name": "new", "lora_path": "%s"}' % str(tmp_path / "x").encode()
        status = 422
        assert await ask(front, "POST", LOAD, load) == 422
        status = 200
        assert await ask(front, "POST", LOAD, load) == 200
        assert calls[-1][0].loads == ("new", 3)
        await ask(front, "GET", "/v1/models")
        assert {k: v and v.generation for k, v in calls[-1][0].adapters.items()} == {"one": 1, "new": 3}
        assert calls[-1][0].whole
        await ask(front, "POST", UNLOAD, b'{"lora_name": "one"}')
        await ask(front, "POST", complete, b'{"model": "one"}')
        assert calls[-1][0].adapters == {"one": None}

    asyncio.run(all_of_it())


def test_metrics_of_several_replicas_are_one_text() -> None:
    """Each family stands once, each series has its replica; what has labels keeps them."""
    one = '# HELP a_total A.\n# TYPE a_total counter\na_total{model="x"} 1.0\n# HELP b B.\n# TYPE b gauge\nb 2.0\n'
    families = list(text_string_to_metric_families(merged({"r1": one, "r2": one.replace("2.0", "3.0")})))
    assert [(f.name, f.type) for f in families] == [("a", "counter"), ("b", "gauge")]
    assert [(s.labels, s.value) for s in families[0].samples] == [
        ({"replica": "r1", "model": "x"}, 1.0),
        ({"replica": "r2", "model": "x"}, 1.0),
    ]
    assert [(s.labels["replica"], s.value) for s in families[1].samples] == [("r1", 2.0), ("r2", 3.0)]


def test_without_ray_the_error_says_what_to_install(place: Place, tmp_path: Path) -> None:
    """Ray is an extra: without it the command ends with code 2 and one line."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, "-m", "QEfficient.cloud", "serve", str(place.base), "--engine", "ray"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"},
        timeout=600,
    )
    assert done.returncode == 2
    assert "pip install 'efficient-transformers[serve,ray]'" in done.stderr


@pytest.mark.slow
def test_two_nodes(place: Place, tmp_path: Path) -> None:
    """Two replicas on two nodes answer as one server does; an adapter's requests stay with a replica that has it."""
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    env["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "300"  # on a busy machine Ray's 5 s are not enough
    env["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "300"
    nodes = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=-1, stdout=-1, env=env, text=True)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "QEfficient.cloud", "serve", str(place.base), "--engine", "ray", "--replicas", "2"]
    command += ["--port", "0", "--adapter", f"one={place.adapters / 'one'}", "--threads", "1", "--ctx-len", "128"]
    command += ["--adapter", f"two={place.adapters / 'two'}", "--allow-folder", str(place.adapters)]
    assert nodes.stdout is not None
    command += ["--ray-address", nodes.stdout.readline().strip()]
    running = Running(subprocess.Popen(command, stderr=log.open("w"), env=env, text=True), 0, log)
    try:
        deadline = time.monotonic() + 900
        while '"event": "ready"' not in log.read_text():
            assert running.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert running.listens()
        check_cluster(running, place)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(600) == 0
    finally:
        running.process.kill()
        assert nodes.stdin is not None
        nodes.stdin.close()
        nodes.wait(600)


def check_cluster(running: Running, place: Place) -> None:
    """Ask for everything that concerns more than one replica."""
    client = running.client().with_options(timeout=600)
    seen: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, set[str]] = defaultdict(set)

    def ask(name: str) -> None:
        raw = client.completions.with_raw_response.create(model=name, prompt="hello", max_tokens=8, temperature=0)
        seen[name].add(raw.headers["x-qefficient-replica"])
        texts[name].add(raw.parse().choices[0].text)

    for _ in range(12):
        for name in ("one", "two", "base"):
            ask(name)
    assert all(len(t) == 1 for t in texts.values())
    assert len({*texts["one"], *texts["two"], *texts["base"]}) == 3
    assert len(seen["one"]) == len(seen["two"]) == 1
    pieces = client.completions.create(model="two", prompt="hello", max_tokens=8, temperature=0, stream=True)
    assert {"".join(c.choices[0].text for c in pieces)} == texts["two"]
    place.add("late", seed=9)
    client.post(
        "/load_lora_adapter", body={"lora_name": "late", "lora_path": str(place.adapters / "late")}, cast_to=str
    )
    for _ in range(4):
        ask("late")
        assert "late" in [m.id for m in client.models.list()]
    body = {"lora_name": "late", "lora_path": str(place.adapters / "two"), "load_inplace": True}
    client.post("/load_lora_adapter", body=body, cast_to=str)
    texts["late"].clear()
    for _ in range(4):
        ask("late")
    assert texts["late"] == texts["two"]
    client.post("/unload_lora_adapter", body={"lora_name": "late"}, cast_to=str)
    for _ in range(8):
        with pytest.raises(openai.NotFoundError):
            ask("late")
    with urllib.request.urlopen(f"{running.url}/metrics") as answered:
        text = answered.read().decode()
    assert f'qeff_requests_total{{replica="{next(iter(seen["one"]))}",model="one",status="200"}} 12.0' in text
    assert len(re.findall(r'^qeff_slots{replica="[^"]+"}', text, re.M)) == 2
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="one", prompt="x", temperature=9)
