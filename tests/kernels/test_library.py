# SPDX-License-Identifier: BSD-3-Clause
import pytest

from QEfficient.errors import UnsupportedError
from QEfficient.kernels import library as made


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """An empty cache, and functions that forget what they found."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    made.library.cache_clear()
    made.why_not.cache_clear()
    yield tmp_path / "home"
    made.library.cache_clear()
    made.why_not.cache_clear()


@pytest.mark.slow
def test_compiled_once(library, anew, monkeypatch):
    """The second time nothing is compiled; nothing else is left in the cache."""
    path = made.library()
    assert path.is_file()
    assert [p.name for p in path.parent.iterdir()] == [made.FILE]
    made.library.cache_clear()
    monkeypatch.setattr(made, "build", lambda *_: pytest.fail("compiled again"))
    assert made.library() == path


def test_without_a_compiler(library, anew, monkeypatch):
    """No compiler is a reason, and names what was looked for."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert made.why_not() == "they need a C++ compiler, and none of c++, g++, clang++ is there; install one"


def test_a_compiler_that_is_not_there(library, anew, monkeypatch):
    """$CXX is taken at its word."""
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert made.why_not() == "they need a C++ compiler, and $CXX is 'no-such-compiler', which is not there; install one"


def test_a_compiler_that_fails(library, anew, monkeypatch, tmp_path):
    """Its first error is the reason, and nothing is left."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho operators.cpp:1: error: no such thing >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert made.why_not() == f"{compiler} cannot compile them: operators.cpp:1: error: no such thing"
    assert [*(anew / "kernels").iterdir()] == []


def test_what_is_wrong_is_not_kept(library, anew, monkeypatch, tmp_path):
    """A file that is no library fails its check, in a process of its own, and is thrown away."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nfor last; do :; done; echo nonsense > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert made.why_not().startswith("what kernels.so computes on this machine is wrong: ")
    assert [*(anew / "kernels").iterdir()] == []


def test_a_cache_that_cannot_be_written(library, anew):
    """Nothing can be kept: a reason, no traceback."""
    anew.write_text("a file where a folder should be")
    assert made.why_not().startswith("they cannot be kept in ")


def test_another_kind_of_machine(library, anew, monkeypatch):
    """The operators are written for one family of CPUs."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedError, match="written for Linux on x86 CPUs, this is linux on aarch64"):
        made.library()
