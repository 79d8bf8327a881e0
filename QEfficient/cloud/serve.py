# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient serve``: a base and its adapters behind OpenAI's HTTP API."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.test import parse_adapters
from QEfficient.contract import PRECISIONS
from QEfficient.errors import ConfigError
from QEfficient.options import option, parse


@dataclass(slots=True, kw_only=True)
class Options:
    """Serve a base and any number of its adapters over HTTP, as OpenAI's API has it; 'model' chooses the adapter.

    An adapter is checked as 'qefficient test' does, and loaded, when it is first asked for; one that fails is refused and
    the others go on. GET / shows a page to try them.
    """

    base: str = option(help="Folder or Hub id of the base model.", positional=True)
    adapter: list[str] = option([], "An adapter and its name; may be repeated.", metavar="NAME=PATH")
    host: str = option("127.0.0.1", "Address to listen on; others than this machine's own need --api-keys.")
    port: int = option(8000, "Port to listen on; 0: one that is free, which the log names.")
    slots: int = option(8, "Requests that run at a time.")
    queue_len: int = option(64, "Requests that wait besides; more are refused with status 503.")
    ctx_len: int = option(1024, "Longest context, prompt and answer.")
    graphs: int = option(
        2,
        "Most graphs; an adapter that does not fit the first (DoRA, IA3, …) gets one, with weights and cache of its own.",
    )
    precision: str = option("fp32", "How the base's weights are held.", choices=PRECISIONS)
    threads: int = option(0, "Threads; 0: one for each physical core that the process may use.")
    large_pages: bool = option(
        False,
        "Weights on large pages of memory, where the system has them: loading takes longer, tokens may be faster.",
    )
    adapter_memory_mb: int = option(1024, "Most memory of resident adapters.")
    prefix_memory_mb: int = option(256, "Most memory of what prompts leave for others that begin alike; 0: nothing.")
    api_keys: Path | None = option(
        None, "YAML list of keys (see docs/serve.md). Default: no key needed.", metavar="FILE"
    )
    allow_folder: list[str] = option([], "Adapters may be loaded from here over HTTP; may be repeated.", metavar="DIR")
    allow_hub: bool = option(False, "Adapters may be loaded from the Hugging Face Hub over HTTP.")
    chat_template: Path | None = option(None, "Jinja file that replaces the tokenizer's template.", metavar="FILE")
    max_body_mb: int = option(4, "Longest request body.")
    max_new_tokens: int = option(4096, "Most tokens of one answer.")
    receive_seconds: int = option(30, "How long a client may take to send headers, and again a body.")
    grace_seconds: int = option(30, "How long a shutdown waits for running requests.")
    log_prompts: bool = option(False, "Write prompts into the log.")
    engine: str = option("local", "local: in this process; ray: replicas on Ray Serve.", choices=["local", "ray"])
    replicas: int = option(2, "Engines, with --engine ray.")
    ray_address: str = option("", "Ray cluster to deploy on; default: one on this machine.", metavar="ADDRESS")


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, prog="qefficient serve")
    adapters = parse_adapters(options.adapter)
    positive = (
        "slots",
        "queue_len",
        "ctx_len",
        "graphs",
        "adapter_memory_mb",
        "max_body_mb",
        "max_new_tokens",
        "receive_seconds",
        "replicas",
    )
    least = dict.fromkeys(positive, 1) | dict.fromkeys(("port", "threads", "prefix_memory_mb", "grace_seconds"), 0)
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {value}, not {getattr(options, name)}")
    for folder in options.allow_folder:
        if not Path(folder).is_dir():
            raise ConfigError(f"--allow-folder {folder} is no folder; make it, or leave it out")
    try:
        from QEfficient.serve import start
    except ModuleNotFoundError as e:
        raise ConfigError(f"serving needs {e.name}: pip install 'efficient-transformers[serve]'") from e
    from QEfficient.serve.config import Keys, Limits, Places
    from QEfficient.serve.loading import check_given
    from QEfficient.serve.logs import configure

    check_given(adapters)
    configure()
    settings: dict[str, Any] = {
        "slots": options.slots,
        "ctx_len": options.ctx_len,
        "queue_len": options.queue_len,
        "graphs": options.graphs,
        "precision": options.precision,
        "threads": options.threads or None,
        "large_pages": options.large_pages,
        "adapter_bytes": options.adapter_memory_mb << 20,
        "prefix_bytes": options.prefix_memory_mb << 20,
        "chat_template": _read(options.chat_template),
        "keys": Keys.read(options.api_keys) if options.api_keys is not None else Keys(),
        "places": Places(tuple(Path(f) for f in options.allow_folder), options.allow_hub),
        "limits": Limits(
            body_bytes=options.max_body_mb << 20,
            new_tokens=options.max_new_tokens,
            receive_seconds=float(options.receive_seconds),
            grace_seconds=float(options.grace_seconds),
        ),
        "log_prompts": options.log_prompts,
    }
    start.need_keys(settings["keys"], options.host)
    address = start.bind(options.host, options.port)
    if options.engine == "ray":
        from QEfficient.serve.cluster import application, serve_cluster

        port = address.getsockname()[1]  # not 0, whatever was asked for
        address.close()  # Ray's own process takes it
        app = application(options.base, adapters, settings, replicas=options.replicas)
        serve_cluster(app, host=options.host, port=port, address=options.ray_address or None)
        return 0
    start.serve(start.build(options.base, adapters, **settings), address)
    return 0


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e


if __name__ == "__main__":
    sys.exit(run("serve"))
