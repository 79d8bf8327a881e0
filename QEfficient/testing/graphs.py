# SPDX-License-Identifier: BSD-3-Clause
"""Graphs and programs to be tested: exported here or found in a folder, opened with their adapters."""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from QEfficient.compile.program import compile_graph
from QEfficient.contract import ADAPTERS_DIR, Manifest
from QEfficient.errors import AdapterMismatchError, ArtifactError
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors, read_exported
from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM
from QEfficient.runtime.session import OrtSession
from QEfficient.store import verify_files
from QEfficient.testing.candidate import Candidate, Tensors
from QEfficient.testing.loading import Loading
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Stage


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph folder and the adapters that run on it, each as its inputs."""

    folder: Path
    fitted: dict[str, Tensors]


def export_graphs(reference: Reference, names: Sequence[str], out: Path | None = None) -> list[Graph]:
    """Export one graph for each structure of adapter; adapters that fit the same graph share it."""
    graphs: list[Graph] = []
    left = list(names)
    while left:
        reference.model.set_adapter(left[0])
        model = QEffAutoPeftModelForCausalLM(reference.model)
        folder = Path(model.export(out)).parent
        fitted = {left[0]: _fit(reference, left[0], folder)}
        for name in left[1:]:
            try:
                fitted[name] = _fit(reference, name, folder)
            except AdapterMismatchError:
                continue
        graphs.append(Graph(folder, fitted))
        left = [n for n in left if n not in fitted]
    return graphs


def find_graph(reference: Reference, names: Sequence[str], folder: Path) -> Graph:
    """Take a graph that has been exported before.

    Raises:
        ArtifactError: The folder holds no graph.
        AdapterMismatchError: An adapter does not fit it.
    """
    if not folder.is_dir():
        raise ArtifactError(f"graph folder {str(folder)!r} does not exist")
    return Graph(folder, {name: _fit(reference, name, folder) for name in names})


@contextmanager
def opened(stage: Stage, graph: Graph, reference: Reference, precision: str = "fp32") -> Iterator[Candidate]:
    """Yield the graph, or the program compiled from it, ready to run.

    A folder that is not as it was written is opened all the same, so that the checks can say what that does to the
    answers; what is compiled from it goes to a temporary folder.
    """
    with ExitStack() as stack:
        folder, mixed = graph.folder, None
        if stage is Stage.PROGRAM:
            folder = _compile(folder, stack, precision)
            mixed = functools.partial(_compile, graph.folder, stack, precision, mixed=True)
        if missing := [n for n in Manifest.read(folder).files if not (folder / n).exists()]:
            raise ArtifactError(f"{folder} is not whole: {', '.join(missing)} is missing; export again")
        exported, broken = _exported(graph)
        with Loading() as loading:
            session = OrtSession(folder, verify=False)
            for name, tensors in graph.fitted.items():
                session.load_adapter(name, exported.get(name, tensors))
        names = tuple(graph.fitted)
        yield Candidate(
            stage,
            folder,
            session,
            reference,
            exported,
            graph.fitted,
            names,
            broken,
            loading,
            compile_mixed=mixed,
        )


def _compile(folder: Path, stack: ExitStack, precision: str, *, mixed: bool = False) -> Path:
    try:
        verify_files(folder, Manifest.read(folder).files, full=True)
    except ArtifactError:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qefficient-")))
        return compile_graph(folder, precision=precision, mixed=mixed, out=out, verify=False)
    return compile_graph(folder, precision=precision, mixed=mixed)


def _fit(reference: Reference, name: str, folder: Path) -> Tensors:
    adapter = Adapter.from_model(reference.model, name)
    return fit(adapter, Manifest.read(folder), neutral_tensors(folder))


def _exported(graph: Graph) -> tuple[dict[str, Tensors], dict[str, str]]:
    """Return the adapters that lie in the graph folder, and why others that lie there cannot be used."""
    found: dict[str, Tensors] = {}
    broken: dict[str, str] = {}
    for name in graph.fitted:
        path = graph.folder / ADAPTERS_DIR / f"{name}.safetensors"
        if not path.is_file():
            continue
        try:
            found[name] = fit(read_exported(path), Manifest.read(graph.folder), neutral_tensors(graph.folder))
        except (ArtifactError, AdapterMismatchError, TypeError) as e:
            broken[name] = str(e)
    return found, broken
