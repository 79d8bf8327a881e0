# SPDX-License-Identifier: BSD-3-Clause
"""The adapter stage over any number of adapters: one after the other, or in processes of their own.

Only what was found is kept, not the tensors. An adapter that cannot be read, crashes its process or takes too long
becomes a failed check of its own; the others go on.
"""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from QEfficient.errors import AdapterMismatchError, ConfigError, QEffError
from QEfficient.peft.adapters import check_name
from QEfficient.peft.loading import read_base_config
from QEfficient.store import digest_file
from QEfficient.testing.adapter_files import read_adapter, refuse_other_shapes
from QEfficient.testing.checks_adapter import CHECKS, SET_CHECKS
from QEfficient.testing.inputs import describe_adapter, trained_tokens
from QEfficient.testing.report import CheckResult, Outcome, Stage, Subject
from QEfficient.testing.selection import Progress, Selection, catalog, perform

Work = Callable[[str, str | Path, str, Selection], "Examined"]
_OURS = {c.name for c in CHECKS} | {c.name for c in SET_CHECKS}


@dataclass(slots=True)
class Examined:
    """What was found about one adapter's files.

    Attributes:
        subject: The adapter as the report shows it.
        results: Of the checks.
        path: Its folder.
        digest: Of its tensors' file; empty if there is none.
        tokens: Whose embeddings it trains by their ids.
        error: Why it cannot be loaded, so that later stages leave it out.
    """

    subject: Subject
    results: list[CheckResult] = field(default_factory=list)
    path: Path = Path()
    digest: str = ""
    tokens: tuple[int, ...] = ()
    error: QEffError | None = None


def examine(name: str, path: str | Path, base: str, base_config: Any, selection: Selection) -> Examined:
    """Read one adapter and ask everything that needs no model run."""
    try:
        files = read_adapter(name, path, base, base_config)
    except QEffError as e:
        return unreadable(name, path, e)
    found = Examined(describe_adapter(name, path, files), path=files.path, tokens=trained_tokens(files.config))
    found.digest = digest_file(files.path / "adapter_model.safetensors")
    added = tuple(c for c in catalog()[Stage.ADAPTER] if c.name not in _OURS)
    found.results = perform(Stage.ADAPTER, (*CHECKS, *added), files, name, selection)
    try:
        refuse_other_shapes(name, files)
    except AdapterMismatchError as e:
        found.error = e
        if not any(r.name == "adapter.shapes" for r in found.results):
            check = next(c for c in CHECKS if c.name == "shapes")
            found.results.append(check.result(Stage.ADAPTER, name, Outcome.FAIL, f"{e}"))
    return found


def examine_all(
    adapters: Mapping[str, str | Path],
    base: str,
    base_config: Any,
    selection: Selection,
    progress: Progress,
    *,
    jobs: int = 1,
    seconds: float = 120.0,
) -> dict[str, Examined]:
    """Examine every adapter.

    Args:
        adapters: Names and folders.
        base: Folder or Hub id of the base.
        base_config: Its configuration.
        selection: Which checks are asked.
        progress: Told what is being done.
        jobs: Processes; 1 stays in this one, where nothing can be stopped.
        seconds: How long a process may take for one adapter.

    Raises:
        ConfigError: There is no adapter, or one has a name that cannot be used.
    """
    if not adapters:
        raise ConfigError("nothing to test: give at least one adapter, as NAME=PATH")
    for name in adapters:
        check_name(name)
    found: dict[str, Examined] = {}
    if jobs > 1 and len(adapters) > 1:
        for name, one in in_processes(adapters, base, selection, min(jobs, len(adapters)), seconds):
            progress("adapter", name)
            found[name] = one
    else:
        for name, path in adapters.items():
            progress("adapter", name)
            found[name] = examine(name, path, base, base_config, selection)
    digests = {name: one.digest for name, one in found.items() if one.digest}
    for name in digests if len(found) > 1 else ():
        found[name].results += perform(Stage.ADAPTER, SET_CHECKS, digests, name, selection)
    return {name: found[name] for name in adapters}


def in_processes(
    adapters: Mapping[str, str | Path],
    base: str,
    selection: Selection,
    jobs: int,
    seconds: float,
    work: Work | None = None,
) -> Iterator[tuple[str, Examined]]:
    """Yield results as they come; what hangs or dies is given up after ``seconds`` without any, and the rest starts anew."""
    work = work or examine_there
    left = dict(adapters)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    while left:
        with context.Pool(jobs, _start_process) as pool:
            pool.apply(_base_of, (base,))  # the libraries are loaded before the clock runs
            waiting = {n: pool.apply_async(work, (n, p, base, selection)) for n, p in left.items()}
            last = time.monotonic()
            while waiting and time.monotonic() - last < seconds:
                ready = [n for n, answer in waiting.items() if answer.ready()]
                for name in ready:
                    last = time.monotonic()
                    yield name, _answer(waiting.pop(name), name, left.pop(name))
                if not ready:
                    time.sleep(0.02)
            pool.terminate()
        for name in list(left)[:jobs]:  # work is handed out in order, so these were being done
            path = left.pop(name)
            why = f"no answer within {seconds:.0f} s: its examination hangs, or its process was killed (memory?)"
            yield name, unreadable(name, path, QEffError(f"adapter {name!r} ({path}): {why}"))


def _answer(answer: Any, name: str, path: str | Path) -> Examined:
    try:
        found: Examined = answer.get()
    except Exception as e:  # noqa: BLE001, RUF100 -- whatever went wrong there, the others go on
        return unreadable(name, path, QEffError(f"adapter {name!r}: {type(e).__name__}: {e}"))
    return found


def _start_process() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def examine_there(name: str, path: str | Path, base: str, selection: Selection) -> Examined:
    """Examine one adapter in a process that has not read the base yet."""
    return examine(name, path, base, _base_of(base), selection)


@lru_cache(maxsize=1)
def _base_of(base: str) -> Any:
    return read_base_config(base)


def unreadable(name: str, path: str | Path, error: QEffError) -> Examined:
    """Return what a report shows of an adapter that could not be looked at."""
    wanted = "shapes" if isinstance(error, AdapterMismatchError) else "files"
    check = next(c for c in CHECKS if c.name == wanted)
    text = str(error)
    result = check.result(Stage.ADAPTER, name, Outcome.FAIL, f"It cannot be tested: {text}")
    return Examined(Subject(name, str(path), "", "cannot be read"), [result], error=error)
