# SPDX-License-Identifier: BSD-3-Clause
"""Requests that wait: in order within an adapter, adapters in turn. One adapter's crowd does not hold up the others."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each key; the keys take turns. Not safe for threads."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def put(self, key: str, item: T) -> None:
        """Let ``item`` wait behind the others of ``key``."""
        self._waiting.setdefault(key, deque()).append(item)

    def take(self) -> T:
        """Return the next item; its key goes behind the others.

        Raises:
            IndexError: Nothing waits.
        """
        if not self._waiting:
            raise IndexError("nothing waits")
        key, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[key] = items
        return item

    def remove(self, key: str, item: T) -> bool:
        """Take ``item`` out, wherever it stands; return whether it was there."""
        items = self._waiting.get(key)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[key]
        return True
