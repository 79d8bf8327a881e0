# SPDX-License-Identifier: BSD-3-Clause
"""Where a graph's base weights lie: in the checkpoint, linked beside the graph, or in a file written for it.

Knows safetensors files; knows no model.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from QEfficient.errors import ArtifactError
from QEfficient.store import is_sampled, link_or_copy, record_file

_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "BOOL": ir.DataType.BOOL,
}
WRITTEN_FILE = "weights.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ABSENT_DIR = "absent"
"""Where a graph without weights says that they lie: there is no such folder, so no runtime can take other bytes for them."""
WEIGHTS_CHOICES = ("linked", "written", "absent")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a safetensors file: where its bytes are.

    Attributes:
        path: The file.
        offset: First byte, from the start of the file; ``None`` if the file is not there.
        length: Bytes; ``None`` if the file is not there.
        dtype: Element type.
        shape: Dimensions; ``None`` if the file is not there.
    """

    path: Path
    offset: int | None
    length: int | None
    dtype: ir.DataType
    shape: tuple[int, ...] | None


def read_refs(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a safetensors file, by name, reading its header only.

    Raises:
        ArtifactError: The file is truncated or not a safetensors file.
    """
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing: the checkpoint's index names it; download the base again "
            "(--without-weights exports a graph that cannot be run)"
        )
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ArtifactError(f"{path} is truncated: its header does not fit its {size} bytes")
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise ArtifactError(f"{path} is not a safetensors file: {e}") from e
    header.pop("__metadata__", None)
    refs = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ArtifactError(
                f"{path} is truncated: tensor {name!r} ends at byte {8 + length + end}, the file at {size}"
            )
        if entry["dtype"] in _DTYPES:
            shape = tuple(entry["shape"])
            refs[name] = TensorRef(path, 8 + length + start, end - start, _DTYPES[entry["dtype"]], shape)
    return refs


class Checkpoint:
    """The safetensors files of a base model's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.refs: dict[str, TensorRef] = {}
        for path in self._files():
            self.refs.update(read_refs(path))
        self._records: dict[Path, dict[str, Any]] = {}

    def record(self, path: Path) -> dict[str, Any]:
        """Return size, modification time and digest of one file; read once."""
        if path not in self._records:
            self._records[path] = record_file(path)
        return self._records[path]

    def known(self, path: Path) -> dict[str, Any] | None:
        """Return the record of the file that ``path`` is a link of; ``None`` if it is none of them."""
        inode = path.stat().st_ino
        return next((r for r in self._records.values() if r["inode"] == inode), None)

    def identity(self) -> str:
        """Return a digest of all weights: equal for equal files, whatever their folder is called.

        Files of 16 GB and more are sampled, and their modification time counts: a copy of such a file is another one.
        """
        hasher = xxhash.xxh3_128()
        for path in self._files():
            record = self.record(path)
            when = record["mtime_ns"] if is_sampled(record["xxh3"]) else ""
            hasher.update(f"{path.name} {record['xxh3']} {when}\n".encode())
        return hasher.hexdigest()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [self.folder / name for name in sorted(names)]
        single = self.folder / "model.safetensors"
        return [single] if single.is_file() else []


class CheckpointIndex(Checkpoint):
    """A checkpoint known by its index alone: which shard holds which tensor, whether the shards are there or not.

    Args:
        folder: Where the index lies.
        dtype: Type of the weights: the index does not say it, the base's configuration does.

    Raises:
        ArtifactError: There is no index, or it is none.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | str) -> None:
        self.folder = Path(folder)
        self._records = {}
        path = self.folder / INDEX_FILE
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: a graph without weights is exported from it")
        try:
            content = json.loads(path.read_text())["weight_map"]
            shards = {str(name): str(shard) for name, shard in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ArtifactError(f"{path} is not an index of safetensors files: {e}") from e
        kind = ir.DataType[str(dtype).removeprefix("torch.").upper().replace("FLOAT32", "FLOAT")]
        self.refs = {n: TensorRef(Path(ABSENT_DIR) / shard, None, None, kind, None) for n, shard in shards.items()}
        self.shards = tuple(sorted(set(shards.values())))

    def identity(self) -> str:
        """Return a digest of the index: it stands for the weights, which nobody has seen."""
        hasher = xxhash.xxh3_128()
        for name, ref in sorted(self.refs.items()):
            hasher.update(f"{name} {ref.path.name} {ref.dtype}\n".encode())
        return f"index-{hasher.hexdigest()}"


def identity_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of tensors in memory: names, types, shapes and bytes."""
    hasher = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        hasher.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        if plain.numel():
            hasher.update(plain.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def holds(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, Iterable[str]]) -> bool:
    """Return whether the files hold exactly these tensors: same shapes, and same values after a cast, if any.

    Args:
        checkpoint: The files.
        tensors: A base's weights by graph name.
        aliases: Names under which the files may hold each of them.
    """
    opened = {path: safe_open(str(path), framework="pt") for path in {ref.path for ref in checkpoint.refs.values()}}
    for name, tensor in tensors.items():
        stored_as = next((a for a in aliases[name] if a in checkpoint.refs), None)
        if stored_as is None:
            return False
        stored = opened[checkpoint.refs[stored_as].path].get_tensor(stored_as)  # type: ignore[no-untyped-call]
        if stored.shape != tensor.shape or not torch.equal(stored.to(tensor.dtype), tensor.cpu()):
            return False
    return True


def link_weights(
    wanted: Mapping[str, Iterable[str]],
    checkpoint: Checkpoint | None,
    memory: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    copy: bool = False,
) -> dict[str, TensorRef]:
    """Put the base's weights beside the graph, and say where each lies.

    Args:
        wanted: Graph name -> names under which the checkpoint may hold it (tied weights have several).
        checkpoint: Files to link; ``None`` if the model came from memory.
        memory: Tensors that no checkpoint holds, by graph name: they are written.
        folder: The graph's folder.
        copy: Copy the files rather than link them.

    Returns:
        For each name of ``wanted`` that was found: its place in a file of ``folder``.
    """
    placed: dict[str, TensorRef] = {}
    linked: dict[Path, Path] = {}
    for name, aliases in wanted.items():
        ref = next((checkpoint.refs[a] for a in aliases if a in checkpoint.refs), None) if checkpoint else None
        if ref is None or name in memory:
            continue
        if ref.shape is None:
            placed[name] = ref
            continue
        if ref.path not in linked:
            linked[ref.path] = folder / f"weights-{len(linked) + 1:05}.safetensors"
            (shutil.copyfile if copy else link_or_copy)(ref.path, linked[ref.path])
        placed[name] = TensorRef(linked[ref.path], ref.offset, ref.length, ref.dtype, ref.shape)
    rest = {n: memory[n].detach().cpu().contiguous() for n in wanted if n not in placed and n in memory}
    if rest:
        save_file(rest, folder / WRITTEN_FILE)
        placed.update(read_refs(folder / WRITTEN_FILE))
    return placed
