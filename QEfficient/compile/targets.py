# SPDX-License-Identifier: BSD-3-Clause
"""What a program can be compiled for. A target is one class; it says what identifies its programs, and makes them."""

import functools
import importlib.metadata
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from QEfficient.compile.adapters import DropAdapterOutputs, FoldAdapterScaling, FoldAdapterTranspose, lowered_specs
from QEfficient.compile.attention import FuseCacheAttention, OwnAttention, attends
from QEfficient.compile.blocks import BITS
from QEfficient.compile.gates import OwnGates
from QEfficient.compile.halves import RoundWeights
from QEfficient.compile.heads import FoldHeadSplits
from QEfficient.compile.join import JoinAttentionProjections
from QEfficient.compile.mixed import GatherAdapterPieces
from QEfficient.compile.norms import FuseRmsNorm, FuseSkipNorm, OwnNorms
from QEfficient.compile.products import AdaptersIntoProducts, OwnFloatProducts, OwnProducts
from QEfficient.compile.quantize import Precision, QuantizeWeights
from QEfficient.compile.rotary import RotaryIntoAttention
from QEfficient.compile.transposes import FuseWeightTranspose
from QEfficient.compile.weightfile import files_of, holds_halves, store_weights
from QEfficient.contract import KERNELS, MIXED, MODEL_FILE, ONE_ROW_CHUNKS, PRECISIONS, Manifest
from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.kernels.cpu import instruction_set
from QEfficient.kernels.library import sources, why_not
from QEfficient.options import suggest

LOGGER = logging.getLogger("qefficient.compile")

_SMALL_BYTES = 1 << 20


class Pass(Protocol):
    """One rewrite of a graph."""

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite ``model`` where the pass matches; return it, and whether it changed."""


class Target(Protocol):
    """A runtime and the machine under it."""

    name: str
    precisions: tuple[str, ...]

    def identity(self, precision: Precision, graph: Path) -> dict[str, str]:
        """Return versions and machine: a program made under another identity is not used.

        Args:
            precision: How the program holds the base's weights.
            graph: The graph's folder.
        """

    def lower(
        self,
        graph: Path,
        manifest: Manifest,
        precision: Precision,
        folder: Path,
        *,
        ctx_len: int | None = None,
        mixed: bool = False,
    ) -> Manifest:
        """Write the program of the graph folder ``graph`` into ``folder``, except for files that it shares with the graph.

        With ``mixed``, rows of one call may run with different adapters, where the adapter's tensors can carry that.

        Returns:
            The manifest of the program, with the files that are shared; the caller adds files and options of its own.
        """


class OnnxRuntime:
    """ONNX Runtime on this machine's CPU, with kernels of our own for weights in blocks and in 16-bit floats.

    Args:
        name: The target's name.
        own_kernels: Use them where the machine can have them; otherwise ONNX Runtime's alone.
    """

    def __init__(self, name: str = "onnxruntime", *, own_kernels: bool = True) -> None:
        self.name = name
        self._own_kernels = own_kernels
        self.precisions = tuple(p for p in PRECISIONS if own_kernels or p != "bf16")

    def identity(self, precision: Precision, graph: Path) -> dict[str, str]:
        """Return the version of ONNX Runtime, the CPU's instruction set, and the sources of the kernels that are used.

        Raises:
            UnsupportedError: The precision is ``bf16``, and this machine has none of our kernels.
        """
        if precision.name == "bf16" and (reason := why_not()):
            raise UnsupportedError(
                f"precision bf16 runs on kernels made for this CPU only: {reason}; or choose fp32 or int8"
            )
        versions = {"onnxruntime": importlib.metadata.version("onnxruntime"), "cpu": instruction_set()}
        return {**versions, KERNELS: sources()} if self._has_kernels(precision, graph) else versions

    def _has_kernels(self, precision: Precision, graph: Path) -> bool:
        return (
            self._own_kernels and (precision.name in {*BITS, "bf16"} or holds_halves(graph)) and not _why_no_kernels()
        )

    def passes(self, manifest: Manifest, *, positions: int) -> tuple[Pass, ...]:
        """Return the rewrites that change no result, in their order; ``positions`` is the longest context, 0 if unknown."""
        names = [spec.name for spec in manifest.adapter]
        return (
            DropAdapterOutputs(),
            FoldAdapterTranspose(names),
            FoldAdapterScaling(names),
            FuseCacheAttention(),
            RotaryIntoAttention(positions),
            FoldHeadSplits(),
            FuseRmsNorm(),
            FuseSkipNorm(),
        )

    def lower(
        self,
        graph: Path,
        manifest: Manifest,
        precision: Precision,
        folder: Path,
        *,
        ctx_len: int | None = None,
        mixed: bool = False,
    ) -> Manifest:
        """Apply the passes; weights that stay as they are stay where they are, others go into a file of the program's own."""
        model = ir.load(graph / MODEL_FILE)
        before = files_of(model)
        for rewrite in self.passes(manifest, positions=ctx_len or manifest.max_positions):
            model, _ = rewrite.apply(model)
        rounded = RoundWeights() if precision.name == "bf16" else QuantizeWeights(precision)
        model, changed = rounded.apply(model)
        model, _ = JoinAttentionProjections([spec.name for spec in manifest.adapter]).apply(model)
        specs = lowered_specs(model, manifest.adapter)
        tensors = [s.joined or s.name for s in specs if s.bound]
        own = self._has_kernels(precision, graph)
        if own:
            model, in_blocks = OwnProducts().apply(model)
            model, of_floats = OwnFloatProducts().apply(model)
            own = in_blocks or of_floats
        if own:  # otherwise there is nothing that the library is needed for
            model, _ = AdaptersIntoProducts(tensors).apply(model)
            model, _ = OwnAttention().apply(model)
            model, _ = OwnGates().apply(model)
            model, _ = OwnNorms().apply(model)
            specs = lowered_specs(model, manifest.adapter)
        pieces = GatherAdapterPieces(tensors)
        if mixed:
            model, _ = pieces.apply(model)
        model, _ = FuseWeightTranspose().apply(model)  # of what is not quantised
        # Without the large weights, the graph's own file is not worth keeping for the rest.
        store_weights(model, folder, move_below_bytes=_SMALL_BYTES if changed else 0)
        ir.save(model, folder / MODEL_FILE)
        unused = before - files_of(model)
        options: dict[str, Any] = {
            **manifest.options,
            ONE_ROW_CHUNKS: attends(model),
            **({MIXED: pieces.kinds} if pieces.kinds else {}),
            **({KERNELS: sources()} if own else {}),
        }
        if changed:
            options["quantized"] = rounded.errors
        return replace(
            manifest,
            adapter=specs,
            files={name: recorded for name, recorded in manifest.files.items() if name not in unused},
            options=options,
        )


@functools.cache
def _why_no_kernels() -> str:
    """Return why this machine has none of our kernels, saying so once; empty if it has them."""
    reason = why_not()
    if reason:
        LOGGER.warning("products run on ONNX Runtime's kernels, not on those made for this CPU: %s", reason)
    return reason


TARGETS: dict[str, Target] = {t.name: t for t in (OnnxRuntime(), OnnxRuntime("onnxruntime-plain", own_kernels=False))}


def find_target(name: str, precision: str) -> Target:
    """Return the target called ``name`` if it offers ``precision``.

    Raises:
        ConfigError: There is no such target.
        UnsupportedError: The target does not offer the precision.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}{suggest(name, TARGETS)} (known: {', '.join(TARGETS)})")
    target = TARGETS[name]
    if precision == "bf16" and precision not in target.precisions:
        raise UnsupportedError(
            f"target {name!r} has no precision 'bf16': ONNX Runtime has no bfloat16 matrix product for CPUs. "
            "A bfloat16 checkpoint runs as fp32: its weights stay as they are, only sums are made in float32. For more speed use int8."
        )
    if precision not in target.precisions:
        raise UnsupportedError(
            f"target {name!r} has no precision {precision!r}{suggest(precision, target.precisions)} "
            f"(it has: {', '.join(target.precisions)})"
        )
    return target
