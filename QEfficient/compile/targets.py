# SPDX-License-Identifier: BSD-3-Clause
"""What a program can be compiled for. A target is one class; it says what identifies its programs, and makes them."""

import hashlib
import importlib.metadata
import platform
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from QEfficient.compile.adapters import DropAdapterOutputs, FoldAdapterScaling, FoldAdapterTranspose, lowered_specs
from QEfficient.compile.attention import FuseCacheAttention
from QEfficient.compile.heads import FoldHeadSplits
from QEfficient.compile.norms import FuseRmsNorm, FuseSkipNorm
from QEfficient.compile.rotary import RotaryIntoAttention
from QEfficient.compile.values import CONTRIB
from QEfficient.contract import MODEL_FILE, ONE_ROW_CHUNKS, Manifest
from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.options import suggest


class Pass(Protocol):
    """One rewrite of a graph."""

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite ``model`` where the pass matches; return it, and whether it changed."""


class Target(Protocol):
    """A runtime and the machine under it."""

    name: str
    precisions: tuple[str, ...]

    def identity(self) -> dict[str, str]:
        """Return versions and machine: a program made under another identity is not used."""

    def lower(self, graph: Path, manifest: Manifest, precision: str, folder: Path) -> Manifest:
        """Write the program of the graph folder ``graph`` into ``folder``, except for files that it shares with the graph.

        Returns:
            The manifest of the program; the caller fills in files and options of its own.
        """


class OnnxRuntime:
    """ONNX Runtime on this machine's CPU."""

    name = "onnxruntime"
    precisions: tuple[str, ...] = ("fp32",)

    def identity(self) -> dict[str, str]:
        """Return the version of ONNX Runtime and the CPU's instruction set."""
        return {"onnxruntime": importlib.metadata.version("onnxruntime"), "cpu": instruction_set()}

    def passes(self, manifest: Manifest) -> tuple[Pass, ...]:
        """Return the rewrites in their order."""
        names = [spec.name for spec in manifest.adapter]
        return (
            DropAdapterOutputs(),
            FoldAdapterTranspose(names),
            FoldAdapterScaling(names),
            FuseCacheAttention(),
            RotaryIntoAttention(manifest.max_positions),
            FoldHeadSplits(),
            FuseRmsNorm(),
            FuseSkipNorm(),
        )

    def lower(self, graph: Path, manifest: Manifest, precision: str, folder: Path) -> Manifest:
        """Apply the passes; large weights stay where they are, external to the model file."""
        model = ir.load(graph / MODEL_FILE)
        for rewrite in self.passes(manifest):
            model, _ = rewrite.apply(model)
        ir.save(model, folder / MODEL_FILE)
        one_row_chunks = any(n.op_type == "GroupQueryAttention" and n.domain == CONTRIB for n in model.graph)
        return replace(
            manifest,
            adapter=lowered_specs(model, manifest.adapter),
            options={**manifest.options, ONE_ROW_CHUNKS: one_row_chunks},
        )


TARGETS: dict[str, Target] = {t.name: t for t in (OnnxRuntime(),)}


def find_target(name: str, precision: str) -> Target:
    """Return the target called ``name`` if it offers ``precision``.

    Raises:
        ConfigError: There is no such target.
        UnsupportedError: The target does not offer the precision.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}{suggest(name, TARGETS)} (known: {', '.join(TARGETS)})")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise UnsupportedError(
            f"target {name!r} has no precision {precision!r}{suggest(precision, target.precisions)} "
            f"(it has: {', '.join(target.precisions)})"
        )
    return target


def instruction_set() -> str:
    """Return the machine's architecture and a digest of what its CPU can do."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line.split(":", 1)[1] for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(' '.join(sorted(flags.split())).encode()).hexdigest()[:12]}"
