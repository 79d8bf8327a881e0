# SPDX-License-Identifier: BSD-3-Clause
"""Libraries with a fault in them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from QEfficient.kernels import library as made


@pytest.fixture
def built(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that builds the sources with some texts replaced, each of which is there once, in a hurry."""

    def build(*changes: tuple[str, str, str]) -> Path:
        folder = tmp_path / "sources"
        folder.mkdir()
        for source in made.SOURCES:
            text = (made.HERE / source).read_text()
            for name, old, new in changes:
                assert source != name or text.count(old) == 1
                text = text.replace(old, new) if source == name else text
            (folder / source).write_text(text)
        monkeypatch.setattr(made, "HERE", folder)
        monkeypatch.setattr(made, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in made.FLAGS))
        made.build(made.find_compiler(), tmp_path / made.FILE)
        return tmp_path / made.FILE

    return build
