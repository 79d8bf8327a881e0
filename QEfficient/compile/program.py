# SPDX-License-Identifier: BSD-3-Clause
"""Programs: compiled graphs, kept beside the graph and made once.

A program folder keeps the contract of a graph folder. It lies at ``qpc-<hash>/program``; ``qpc-<hash>/qconfig.json`` records
what it was compiled with.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from QEfficient.compile.blocks import BITS, BLOCK_SIZES
from QEfficient.compile.quantize import Precision
from QEfficient.compile.targets import Target, find_target
from QEfficient.contract import MANIFEST_FILE, MODEL_FILE, Manifest
from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.store import link_or_copy, record_file, record_files, verify_files, written_aside

PROGRAM_DIR = "program"
CONFIG_FILE = "qconfig.json"
FORMAT_VERSION = 11
"""Raised when the passes change what they make of the same graph."""


def compile_graph(
    graph: Path,
    *,
    target: str = "onnxruntime",
    precision: str = "fp32",
    block_size: int | None = None,
    symmetric: bool = True,
    keep: Sequence[str] = (),
    batch_size: int | None = None,
    prefill_seq_len: int = 128,
    ctx_len: int | None = None,
    mixed: bool = False,
    out: Path | None = None,
    verify: bool = True,
) -> Path:
    """Compile a graph folder to a program folder; return at once if that has been done before.

    Args:
        graph: A graph folder, as ``export`` writes it.
        target: Name of a target.
        precision: How the base's weights are held: ``"fp32"`` (as the checkpoint holds them), rounded to ``"bf16"``, or in blocks of
            integers, ``"int8"`` or ``"int4"``.
        block_size: Weights that share a scale: smaller blocks are more exact and slower. ``None``: see
            :func:`default_block_size`.
        symmetric: Blocks have no zero point.
        keep: Patterns (``"lm_head*"``) of weight names that stay one step higher: int8 in an int4 program, fp32 in an int8 one.
        batch_size: Rows that sessions will use, recorded for them; ``None``: any.
        prefill_seq_len: Most tokens of a prompt in one call.
        ctx_len: Longest context that sessions may use; ``None``: the base's own.
        mixed: Let rows of one call run with different adapters, where the adapter's tensors can carry that (LoRA's can); costs a
            few small operators for each module. For an engine; it groups rows by adapter otherwise.
        out: Folder that ``qpc-<hash>`` is put into; default: ``graph``.
        verify: Check the graph's files against its manifest first. Otherwise they are compiled as they are, whatever the
            manifest says; their own digests identify the program then.

    Returns:
        ``<out>/qpc-<hash>/program``.

    Raises:
        ConfigError: An unknown target or block size, blocks for a precision without them, a size that is not positive or longer
            than the base's longest context, or ``graph`` is a program.
        UnsupportedError: The target does not offer the precision.
        ArtifactError: The graph folder is not whole.
    """
    graph = Path(graph)
    chosen = find_target(target, precision)
    manifest = Manifest.read(graph)
    manifest.require_weights(graph)
    _check_sizes(manifest, batch_size=batch_size, prefill_seq_len=prefill_seq_len, ctx_len=ctx_len)
    if manifest.is_program:
        raise ConfigError(f"{graph} is a program, compiled already; give the graph that it was made of")
    if precision not in BITS and (block_size is not None or not symmetric):
        raise ConfigError(
            f"precision {precision} has no blocks: leave out their size and zero points, or choose int8 or int4"
        )
    block_size = default_block_size(precision, manifest.base) if block_size is None else block_size
    weights = _weights(precision, block_size, symmetric, keep)
    options = {
        "target": target,
        "precision": precision,
        **({"block_size": block_size, "symmetric": symmetric, "keep": list(keep)} if precision in BITS else {}),
        "batch_size": batch_size,
        "prefill_seq_len": prefill_seq_len,
        "ctx_len": ctx_len,
        **({"serve_mixed": True} if mixed else {}),
    }
    if verify:
        verify_files(graph, manifest.files)
    else:
        manifest = replace(manifest, files={name: record_file(graph / name) for name in manifest.files})
    content = manifest.hash if verify else {name: f["xxh3"] for name, f in manifest.files.items()}
    versions = chosen.identity(weights, graph)
    identity = {"format": FORMAT_VERSION, "graph": content, **options, **versions}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = (Path(out) if out is not None else graph) / f"qpc-{digest}"
    if not _is_whole(folder / PROGRAM_DIR):
        with written_aside(folder, is_whole=lambda made: _is_whole(made / PROGRAM_DIR)) as aside:
            _write(graph, manifest, chosen, weights, options, versions, digest, aside)
    return folder / PROGRAM_DIR


def _write(
    graph: Path,
    manifest: Manifest,
    target: Target,
    precision: Precision,
    options: dict[str, Any],
    versions: dict[str, str],
    digest: str,
    aside: Path,
) -> None:
    program = aside / PROGRAM_DIR
    program.mkdir()
    lowered = target.lower(
        graph, manifest, precision, program, ctx_len=options["ctx_len"], mixed=bool(options.get("serve_mixed"))
    )
    files = record_files(program)
    for name, recorded in lowered.files.items():
        if name in {MODEL_FILE, MANIFEST_FILE} or (program / name).exists():
            continue
        link_or_copy(graph / name, program / name)
        files[name] = {**recorded, "mtime_ns": (program / name).stat().st_mtime_ns}
    lowered = replace(
        lowered,
        hash=digest,
        files=files,
        versions={**manifest.versions, **versions},
        options={**lowered.options, **options, "graph": manifest.hash},
    )
    lowered.write(program)
    config = {**lowered.options, "hash": digest, "versions": lowered.versions}
    (aside / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _weights(precision: str, block_size: int, symmetric: bool, keep: Sequence[str]) -> Precision:
    if block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise ConfigError(f"block_size must be one of {known}, not {block_size}")
    if keep and precision not in BITS:
        raise ConfigError(f"keep {', '.join(map(repr, keep))}: precision {precision} has nothing to keep from")
    return Precision(precision, block_size, symmetric, tuple(keep))


def default_block_size(precision: str, base: Mapping[str, Any]) -> int:
    """Return how many weights share a scale unless somebody chooses: 32 at 4 bits; at 8 bits up to 128, where nothing is lost by it.

    At 8 bits it is the largest size that fills the rows of the embedding, which would stay float32 otherwise
    (``docs/performance.md`` has the measurements). ``base`` is the manifest's.
    """
    hidden = base.get("config", {}).get("hidden_size")
    fitting = [size for size in (128, 64) if precision == "int8" and isinstance(hidden, int) and hidden % size == 0]
    return fitting[0] if fitting else 32


def _is_whole(program: Path) -> bool:
    """Whether a program is there; one that has been damaged is an error, not a reason to use another."""
    if not (program / MANIFEST_FILE).is_file():
        return False
    try:
        verify_files(program, Manifest.read(program).files)
    except ArtifactError as e:
        raise ArtifactError(f"{e} Remove {program.parent} to compile again.") from e
    return True


def _check_sizes(manifest: Manifest, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, not {size}")
    ctx_len = sizes["ctx_len"]
    if ctx_len is not None and manifest.max_positions and ctx_len > manifest.max_positions:
        raise ConfigError(f"ctx_len is {ctx_len}, but the base's longest context is {manifest.max_positions}")
