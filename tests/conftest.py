# SPDX-License-Identifier: BSD-3-Clause
"""What every test shares: no network, a cache of its own, quiet libraries."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep exported graphs of the tests out of the user's cache; kernels are compiled once for all processes of a run."""
    folder, base = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    kernels.mkdir(exist_ok=True)
    (folder / "kernels").symlink_to(kernels)
    before = os.environ.get("QEFF_HOME")
    os.environ["QEFF_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["QEFF_HOME"]
    else:
        os.environ["QEFF_HOME"] = before


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if host not in {"", "127.0.0.1", "::1", "localhost"}:
            raise OSError(f"tests may not connect to {host!r}")
        connect(self, address)

    socket.socket.connect = local_only  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def library() -> Path:
    """Return our kernels' library, made for this machine; skip what needs it where there can be none."""
    from QEfficient.errors import UnsupportedError
    from QEfficient.kernels import library as made

    try:
        return made.library()
    except UnsupportedError as e:
        pytest.skip(f"this machine has no kernels: {e}")
