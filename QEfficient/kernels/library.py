# SPDX-License-Identifier: BSD-3-Clause
"""The library of operators, made on the machine that uses it.

It is compiled once, for the CPU that is there, checked against NumPy in a process of its own, and kept in the cache folder. Programs name the
sources that they were compiled for; they hold no machine code, so a program that somebody sends runs nothing of theirs.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from QEfficient.errors import UnsupportedError
from QEfficient.kernels.cpu import instruction_set
from QEfficient.store import cache_root, written_aside

DOMAIN = "QEfficient"
"""The operators' domain."""

FILE = "kernels.so"
COMPILERS = ("c++", "g++", "clang++")
SOURCES = (
    "attention.h",
    "floats.h",
    "gates.h",
    "lanes.h",
    "norms.h",
    "operators.cpp",
    "ort_abi.h",
    "products.h",
    "registers.h",
    "updates.h",
)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
_MOST_SECONDS = 300
HERE = Path(__file__).parent


@functools.cache
def sources() -> str:
    """Return a digest of the operators' sources: programs that use them are tied to it."""
    hasher = hashlib.sha256()
    for name in SOURCES:
        hasher.update((HERE / name).read_bytes())
    return hasher.hexdigest()[:12]


@functools.cache
def why_not() -> str:
    """Return why this machine cannot have the library; empty if it has it."""
    try:
        library()
    except UnsupportedError as e:
        return str(e)
    return ""


@functools.cache
def library() -> Path:
    """Return the library for this machine, compiled and checked if that has not been done.

    Raises:
        UnsupportedError: The CPU is none of those that the operators are written for, there is no compiler, or what it made is wrong.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"} or sys.platform != "linux":
        raise UnsupportedError(
            f"they are written for Linux on x86 CPUs, this is {sys.platform} on {platform.machine()}"
        )
    compiler = find_compiler()
    versions = [importlib.metadata.version("onnxruntime"), instruction_set(), *compiler, *FLAGS]
    key = hashlib.sha256("\n".join([sources(), *versions]).encode()).hexdigest()[:16]
    folder = cache_root() / "kernels" / key
    if not (folder / FILE).is_file():
        try:
            with written_aside(folder, is_whole=lambda made: (made / FILE).is_file()) as aside:
                build(compiler, aside / FILE)
                check(aside / FILE)
        except OSError as e:
            raise UnsupportedError(f"they cannot be kept in {folder.parent}: {e}") from e
    return folder / FILE


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, or the first that is installed.

    Raises:
        UnsupportedError: There is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    wanted = f"$CXX is {chosen[0]!r}, which is not there" if chosen else f"none of {', '.join(COMPILERS)} is there"
    raise UnsupportedError(f"they need a C++ compiler, and {wanted}; install one")


def build(compiler: Sequence[str], path: Path) -> None:
    """Compile the library to ``path``.

    Raises:
        UnsupportedError: The compiler failed; the message has its first error.
    """
    command = [*compiler, *FLAGS, str(HERE / "operators.cpp"), "-o", str(path)]
    said = _run(command, "the compiler")
    if said is not None:
        first = next((line for line in said.splitlines() if "error" in line), said.strip() or "without a message")
        raise UnsupportedError(f"{compiler[0]} cannot compile them: {first.replace(f'{HERE}{os.sep}', '')}")


def check(path: Path) -> None:
    """Let the operators of a library compute, in a process of their own, and compare them with NumPy.

    Raises:
        UnsupportedError: Something is wrong, or the process died.
    """
    said = _run([sys.executable, "-m", "QEfficient.kernels.check", str(path)], "their check")
    if said is not None:
        last = (said.strip().splitlines() or ["the process died"])[-1]
        raise UnsupportedError(f"what {path.name} computes on this machine is wrong: {last}")


def _run(command: Sequence[str], what: str) -> str | None:
    """Run a command; return what it said if it failed, else None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{what} took more than {_MOST_SECONDS} s") from None
    return f"{done.stdout}{done.stderr}" if done.returncode else None
