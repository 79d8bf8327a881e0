# SPDX-License-Identifier: BSD-3-Clause
"""Folders that are whole or absent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from QEfficient.errors import ArtifactError
from QEfficient.store import is_sampled, record_file, record_files, verify_files, write_file, written_aside


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Nothing is at the target while it is being written, nor after an error."""
    target = tmp_path / "graph"
    with written_aside(target) as aside:
        (aside / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"

    def fail() -> None:
        with written_aside(tmp_path / "other") as aside:
            (aside / "a").write_text("1")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph"]


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    """A folder that somebody else moved in meanwhile stays; ours is dropped without an error."""
    target = tmp_path / "graph"
    with written_aside(target) as ours:
        (ours / "a").write_text("ours")
        with written_aside(target) as theirs:
            (theirs / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph"]


def test_a_damaged_folder_is_replaced(tmp_path: Path) -> None:
    """A folder that is not whole makes way for the new one."""
    target = tmp_path / "graph"
    target.mkdir()
    with written_aside(target, is_whole=lambda folder: (folder / "a").is_file()) as aside:
        (aside / "a").write_text("1")
    assert (target / "a").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph"]


def test_a_killed_writer_leaves_no_target(tmp_path: Path) -> None:
    """What a writer killed with SIGKILL leaves is not taken for whole; the next one removes it, and nobody else's."""
    code = (
        "import sys, time; from pathlib import Path; from QEfficient.store import written_aside\n"
        "with written_aside(Path(sys.argv[1])) as aside:\n"
        "    (aside / 'a').write_text('1'); print('writing', flush=True); time.sleep(60)\n"
    )
    writers = []
    for name in ("killed", "alive"):
        argv = [sys.executable, "-c", code, str(tmp_path / name)]
        writers.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.stdout.close()
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].wait()
    assert not (tmp_path / "killed").exists()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".tmp-mine").mkdir()
    with written_aside(tmp_path / "next"):
        pass
    left = [p.name for p in tmp_path.iterdir()]
    assert not any("killed" in name for name in left)
    assert any("alive" in name for name in left)
    assert ".tmp-mine" in left
    writers[1].kill()
    writers[1].wait()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "is missing"), ("short", "has 3 bytes, 4 were written"), ("other", "changed since")],
)
def test_damage_is_noticed(damage: str, message: str, tmp_path: Path) -> None:
    """A file that is gone, shorter or different is named."""
    file = tmp_path / "a"
    file.write_text("1234")
    recorded = record_files(tmp_path)
    verify_files(tmp_path, recorded, full=True)
    if damage == "missing":
        file.unlink()
    else:
        file.write_text({"short": "123", "other": "1235"}[damage])
    with pytest.raises(ArtifactError, match=message):
        verify_files(tmp_path, recorded)


def test_a_touched_file_is_still_whole(tmp_path: Path) -> None:
    """Another modification time alone is no damage."""
    file = tmp_path / "a"
    file.write_text("1234")
    recorded = record_files(tmp_path)
    os.utime(file, (1, 1))
    verify_files(tmp_path, recorded)


def test_write_file_replaces_at_once(tmp_path: Path) -> None:
    """A failed write leaves the old content and no temporary file."""
    file = tmp_path / "a"
    write_file(file, lambda p: p.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(file, fail)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_large_files_are_sampled(tmp_path: Path) -> None:
    """A file of 16 GB is told apart by its size, samples and time without being read; a touched one counts as changed."""
    path = tmp_path / "large"
    with path.open("wb") as f:
        f.truncate((1 << 34) + 1)
    recorded = record_file(path)
    assert is_sampled(recorded["xxh3"])
    verify_files(tmp_path, {"large": recorded})
    with path.open("r+b") as f:
        f.write(b"other")
    assert record_file(path)["xxh3"] != recorded["xxh3"]
    os.utime(path, ns=(0, recorded["mtime_ns"] + 1))
    with pytest.raises(ArtifactError, match="changed since it was written"):
        verify_files(tmp_path, {"large": recorded})


def test_a_link_is_not_read_again(tmp_path: Path) -> None:
    """What is known of a file holds for its link, and not for another file of that size."""
    first, other = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"123")
    other.write_bytes(b"456")
    known = record_file(first) | {"xxh3": "known"}
    os.link(first, tmp_path / "link")
    assert record_file(tmp_path / "link", known)["xxh3"] == "known"
    assert record_file(other, known)["xxh3"] != "known"
