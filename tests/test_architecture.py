# SPDX-License-Identifier: BSD-3-Clause
"""Imports point down: the picture in docs/architecture.md, enforced."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "QEfficient"
SINGLE = {"contract", "store", "options", "errors"}

# room -> what it may import besides itself (one line for each)
BELOW = {
    "errors": set(),
    "options": {"errors"},
    "contract": {"errors"},
    "store": {"errors"},
    "kernels": {"errors", "store"},
    "export": SINGLE,
    "compile": SINGLE | {"kernels"},
    "runtime": SINGLE | {"kernels"},
    "peft": SINGLE | {"export", "compile", "runtime"},
    "finetune": SINGLE,
    "testing": SINGLE | {"export", "compile", "runtime", "peft"},
    "serve": SINGLE | {"export", "compile", "runtime", "peft", "testing"},
    "cloud": SINGLE | {"finetune", "testing", "serve", "peft", "compile", "runtime"},
}


def rooms_imported_by(path: Path) -> set[str]:
    """Return the rooms that a file imports, lazily or not."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        rooms |= {n.split(".")[1] for n in names if n.startswith("QEfficient.")}
    return rooms


def room_of(path: Path) -> str:
    """Return the room that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """A room imports only itself and the rooms below it."""
    room = room_of(path)
    assert rooms_imported_by(path) <= BELOW[room] | {room}


def test_every_room_is_in_the_picture() -> None:
    """A new room is a decision: it is listed here and in the architecture page."""
    assert {room_of(p) for p in FILES} == set(BELOW)
    page = (SOURCE.parent / "docs" / "architecture.md").read_text()
    assert [room for room in BELOW if f"`{room}`" not in page] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_hot_path_knows_no_torch(path: Path) -> None:
    """Compile, and sessions, run without PyTorch."""
    imported = {n.split(".")[0] for n in _imports(path)}
    if room_of(path) == "compile" or (room_of(path) == "runtime" and path.name != "generate.py"):
        assert not imported & {"torch", "transformers", "peft"}
    if room_of(path) == "export":
        assert "onnxruntime" not in imported


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found
