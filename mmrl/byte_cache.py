"""Least recently used first out, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

_OVERHEAD = 512  # bytes of key, entry and array object, about


class ByteCache:
    """Values with their sizes; what was not used for longest leaves when the sum would exceed `limit` bytes.

    A value larger than the limit is not kept. The sizes are the caller's word: an array that is a view of a larger
    one would keep all of it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """The value, from now on the youngest, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep `value`, of `size` bytes, in the place of what the key had."""
        old = self._entries.pop(key, None)
        self.used -= old[1] if old else 0
        size += _OVERHEAD
        if size > self.limit:
            return
        while self.used + size > self.limit:
            self.used -= self._entries.popitem(last=False)[1][1]
        self._entries[key] = (value, size)
        self.used += size

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.used = 0
