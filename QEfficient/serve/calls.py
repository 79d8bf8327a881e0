# SPDX-License-Identifier: BSD-3-Clause
"""What the front of a cluster sends to a replica: a request, and what is known of the adapters that it concerns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from QEfficient.serve.config import Key


@dataclass(frozen=True, slots=True)
class Known:
    """An adapter as the front knows it.

    Attributes:
        place: Folder or Hub id; on a cluster a folder that every node sees.
        generation: Grows with each content of the name.
    """

    place: str
    generation: int


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to a replica.

    Attributes:
        adapters: What is known of the adapters that it concerns; ``None``: there is no such adapter.
        whole: There are no others.
        loads: Name and generation that the request brings, if it succeeds.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    key: Key | None = None
    adapters: Mapping[str, Known | None] = field(default_factory=dict)
    whole: bool = False
    loads: tuple[str, int] | None = None
