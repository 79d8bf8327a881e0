# SPDX-License-Identifier: BSD-3-Clause
"""Folders that are either whole or absent: written aside, verified, moved in.

Knows files and digests; does not know what they mean.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from QEfficient.errors import ArtifactError

RECORD_FILE = "adapter_record.json"
_ASIDE = ".tmp-qefficient-"
_CHUNK_BYTES = 1 << 24
_SAMPLED = "sampled-"
_SAMPLED_FROM_BYTES = 1 << 34  # reading 16 GB takes some ten seconds from memory, a minute from a disk
_SAMPLES, _SAMPLE_BYTES = 4096, 4096


def cache_root() -> Path:
    """Return the folder of exported graphs: ``$QEFF_HOME``, ``$XDG_CACHE_HOME/qeff_models`` or ``~/.cache/qeff_models``."""
    if home := os.environ.get("QEFF_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qeff_models"


def record_adapter(folder: Path) -> None:
    """Write beside an adapter what its files are now, so that a later change of them can be told from another training."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = digest_file(folder / "adapter_model.safetensors")
    content = {"version": 1, "adapter_model.safetensors": tensors, "adapter_config.json": config}
    (folder / RECORD_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def changed_since_record(folder: Path) -> list[str] | None:
    """Return what of an adapter is not as :func:`record_adapter` wrote it down; None without a record of it.

    Where the base lies is no part of the adapter: it may be another place by now.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        tensors, was = record["adapter_model.safetensors"], dict(record["adapter_config.json"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found = [] if digest_file(folder / "adapter_model.safetensors") == tensors else ["adapter_model.safetensors"]
    names = sorted((set(was) | set(config)) - {"base_model_name_or_path", "inference_mode"})
    return found + [f"{n} {was.get(n)!r} -> {config.get(n)!r}" for n in names if was.get(n) != config.get(n)]


def is_local(path: str | Path) -> bool:
    """Return whether ``path`` means a place on this machine, not ``name`` or ``owner/name`` on the Hub."""
    text = str(path)
    if isinstance(path, Path) or text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1:
        return True
    return "/" in text and Path(text).parent.is_dir()


def digest_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file's bytes, in hex; of 16 GB or more, a digest of samples.

    Sampled are the size, the beginning (16 MB) and 4096 blocks over the file.
    A digest of samples says so. It tells two checkpoints apart, but it may not notice a few bytes that changed: who uses it
    takes the modification time for part of it, as :func:`verify_files` does.

    Raises:
        ArtifactError: The file changed while it was read.
    """
    before = path.stat()
    hasher, size = xxhash.xxh3_128(), before.st_size
    with path.open("rb") as f:
        if size < _SAMPLED_FROM_BYTES:
            while chunk := f.read(_CHUNK_BYTES):
                hasher.update(chunk)
        else:
            hasher.update(str(size).encode() + f.read(_CHUNK_BYTES))
            for i in range(_SAMPLES):
                f.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                hasher.update(f.read(_SAMPLE_BYTES))
    after = path.stat()
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise ArtifactError(f"{path} changed while it was read; try again when nothing writes to it.")
    return hasher.hexdigest() if size < _SAMPLED_FROM_BYTES else _SAMPLED + hasher.hexdigest()


def is_sampled(digest: str) -> bool:
    """Return whether a digest is of samples of a file, so that the modification time belongs to it."""
    return digest.startswith(_SAMPLED)


def record_files(folder: Path, *, skip: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Return ``{name: {"bytes", "mtime_ns", "inode", "xxh3"}}`` of the files directly in ``folder``."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in skip)
    return {p.name: record_file(p) for p in files}


def record_file(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return size, modification time and digest of one file.

    Args:
        path: The file.
        known: What this function returned for a file of which ``path`` may be a link: not read again, if it is.
    """
    stat = path.stat()
    seen = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    if known is not None and all(known.get(k) == v for k, v in seen.items()):
        return known
    return seen | {"xxh3": digest_file(path)}


def verify_files(folder: Path, files: dict[str, dict[str, Any]], *, full: bool = False) -> None:
    """Check that ``folder`` still holds what was recorded.

    Args:
        folder: The folder.
        files: What :func:`record_files` returned.
        full: Read every byte. Otherwise only a file whose size or modification time changed is read.

    Raises:
        ArtifactError: A file is missing, truncated or changed.
    """
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; export again.")
        stat = path.stat()
        if stat.st_size != recorded["bytes"]:
            raise ArtifactError(f"{path} has {stat.st_size} bytes, {recorded['bytes']} were written; export again.")
        moved = stat.st_mtime_ns != recorded["mtime_ns"]
        stale = moved and is_sampled(recorded["xxh3"])
        if stale or ((full or moved) and digest_file(path) != recorded["xxh3"]):
            raise ArtifactError(f"{path} changed since it was written; export again.")


@contextmanager
def written_aside(target: Path, *, is_whole: Callable[[Path], bool] = lambda _: True) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block succeeds.

    If there is a whole folder by then, another process's, it stays and ours is dropped: both hold the same. A damaged
    one is replaced. If the block raises, nothing is left. A killed process leaves only a ``.tmp-`` folder, which is never
    read, and which the next call for the same place removes.

    Args:
        target: The folder to make.
        is_whole: Tells whether a folder that stands there already may stay.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_aside(target.parent)
    with _folder_aside(target) as aside:
        aside.chmod(0o755)  # mkdtemp's folders are private; a graph is no secret
        yield aside
        _sync(aside)
        if target.is_dir() and not is_whole(target):
            _discard(target)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.is_dir():
                raise


def remove_left_aside(parent: Path) -> None:
    """Remove what killed processes left in ``parent``; what a living process writes there stays.

    Who writes aside holds a lock on the folder, which the system takes from a process that dies. Where the file system
    knows no locks, nothing is removed.
    """
    for left in parent.glob(f"{_ASIDE}*"):
        with suppress(OSError), _locked(left, alone=True):  # else its owner lives, or it is gone
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, locked as ours; remove it in the end, if it is still there."""
    with ExitStack() as stack:
        while True:
            aside = Path(tempfile.mkdtemp(prefix=f"{_ASIDE}{target.name}-", dir=target.parent))
            with suppress(OSError):  # a file system without locks: nobody removes anything there
                stack.enter_context(_locked(aside, alone=False))
            if aside.is_dir():
                break  # else somebody took it for left behind before it was locked
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        yield aside


@contextmanager
def _locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock on a folder: ``alone`` or not at all, or together with others, waiting for one that is alone.

    Raises:
        OSError: There is no such folder, it is locked, or it cannot be.
    """
    if sys.platform == "win32":
        raise OSError("folders cannot be locked here")
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then move the result to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_aside(path.parent)
    with _folder_aside(path) as folder:
        aside = folder / path.name
        write(aside)
        aside.chmod(0o644)
        os.replace(aside, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Put ``source`` at ``target`` as a hard link, or as a copy where the file system allows no link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _discard(folder: Path) -> None:
    """Take a folder away at once: readers see it or do not, never half of it."""
    with _folder_aside(folder) as dead, suppress(FileNotFoundError):  # somebody else was faster
        os.rename(folder, dead / folder.name)


def _sync(folder: Path) -> None:
    """Flush the files of ``folder`` to disk, so that a crash after the rename finds them whole."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            with path.open("rb") as f:
                os.fsync(f.fileno())
