# SPDX-License-Identifier: BSD-3-Clause
"""Adapters whose tensors are not all in their file as a graph wants them, made ready in a process of its own.

It takes the base in PyTorch: memory that the process gives back, and which the server lives without if there is none. The process can be ended.
"""

import logging
import multiprocessing
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from QEfficient.compile.program import compile_graph
from QEfficient.contract import ADAPTERS_DIR, Manifest
from QEfficient.errors import AdapterMismatchError, AdaptersFullError, ArtifactError, QEffError, UnsupportedError
from QEfficient.peft.adapters import CONFIG_FILE, WEIGHTS_FILE, fit, neutral_tensors, read_exported, write_exported
from QEfficient.peft.unloaded import export_adapters
from QEfficient.serve.logs import log, silence_libraries
from QEfficient.store import digest_file


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter to prepare.

    Attributes:
        base: Folder or Hub id of the base.
        key: Of the adapter's content, as :func:`content_key` returns it.
        name: What it is called in errors.
        folder: Where it lies.
        graphs: Those there are.
        most: How many there may be; with more than one, another kind may take the place of one that is idle.
        compiling: How a new one is compiled, as ``compile_graph`` takes it.
    """

    base: str
    key: str
    name: str
    folder: Path
    graphs: tuple[Path, ...]
    most: int
    compiling: Mapping[str, Any]


def content_digest(folder: Path) -> str:
    """Return the identity of an adapter's tensors and configuration."""
    return digest_file(folder / WEIGHTS_FILE) + digest_file(folder / CONFIG_FILE)


def content_key(digest: str) -> str:
    """Return what a prepared adapter of this content is called beside its graph."""
    return "content-" + "".join(c for c in digest if c.isalnum())


def prepare(wanted: Wanted) -> tuple[Path, Path | None]:
    """Write an adapter, ready to be bound, beside the first graph that takes it, or beside a new one.

    Returns:
        The graph, and of a new one its program.

    Raises:
        QEffError: It cannot be exported, has changed, or needs a graph of its own where there may be only one.
    """
    graph = export_adapters(wanted.base, {wanted.key: wanted.folder})
    adapter = read_exported(graph / ADAPTERS_DIR / f"{wanted.key}.safetensors")
    if content_key(content_digest(wanted.folder)) != wanted.key:
        raise ArtifactError("its files changed while they were read; load it again")
    for known in wanted.graphs:
        try:
            fit(adapter, Manifest.read(known), neutral_tensors(known))
        except AdapterMismatchError:
            continue
        write_exported(adapter, known)
        return known, None
    if wanted.most < 2:
        raise UnsupportedError(
            "it does not fit this server's graph, and --graphs allows no other: raise that (each graph takes the base's weights and a "
            "cache of its own), or merge the adapter and serve it as a base of its own"
        )
    return graph, compile_graph(graph, **wanted.compiling)


class Preparer:
    """Runs :func:`prepare` in another process, one at a time."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._stopped = False

    def __call__(self, wanted: Wanted) -> tuple[Path, Path | None]:
        """Prepare an adapter.

        Raises:
            QEffError: As :func:`prepare`, or the process was ended.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = self._process = context.Process(target=_work, args=(theirs, wanted), daemon=True)
        process.start()
        theirs.close()
        if self._stopped:
            process.terminate()
        try:
            said, answer = ours.recv()
        except EOFError as e:
            process.join()
            if self._stopped:
                raise AdaptersFullError("the server is closing") from e
            raise ArtifactError(
                f"the process that prepared it ended with code {process.exitcode}: is memory short?"
            ) from e
        finally:
            process.join()
            ours.close()
        if said == "failed":
            log("preparing failed", level=logging.ERROR, model=wanted.name, traceback=answer)
            raise ArtifactError("it could not be prepared; the server's log says why")
        if said == "refused":
            raise AdapterMismatchError(answer.replace(wanted.key, wanted.name))
        graph, program = answer
        return graph, program

    def stop(self) -> None:
        """End what is being done, and do nothing any more."""
        self._stopped = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()


def _work(pipe: Any, wanted: Wanted) -> None:
    silence_libraries()
    try:
        pipe.send(("done", prepare(wanted)))
    except QEffError as e:
        pipe.send(("refused", str(e)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
