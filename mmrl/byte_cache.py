"""Values bounded in bytes: those of the iteration in hand stay until it ends, of older ones the least used leave."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

log = logging.getLogger(__name__)

_OVERHEAD = 512  # bytes of key, entry and array object, about


class ByteCache:
    """Values with their sizes. A value larger than its bound is not kept.

    An iteration goes through its values again and again in one order, so that a cache that lets the least recently
    used go first would find none of them as soon as they do not all fit. From the first `begin_iteration` on, what an
    iteration puts or gets therefore stays until the next one begins; values beyond `iteration_limit`, and those of
    earlier iterations, share `limit` bytes, in which the least recently used goes first. Without iterations that is
    all there is.

    The sizes are the caller's word: an array that is a view of a larger one would keep all of it.

    Args:
        limit: most bytes of values that no iteration holds.
        iteration_limit: most bytes of the values of one iteration, beside these; default 8 times `limit`.
        name: of the values, in the warning that an iteration has more of them than fit.
    """

    def __init__(self, limit: int, iteration_limit: int | None = None, *, name: str = "values") -> None:
        self.limit, self.used, self.held = limit, 0, 0
        self.iteration_limit = 8 * limit if iteration_limit is None else iteration_limit
        self._name, self._in_iteration, self._warned = name, False, False
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._held: dict[Hashable, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._entries) + len(self._held)

    def begin_iteration(self) -> None:
        """Let go of what the last iteration held, down to `limit`, and hold what is used from now on."""
        held, self._held, self.held = self._held, {}, 0
        self._in_iteration = True
        for key, (value, size) in held.items():
            self._keep(key, value, size)

    def get(self, key: Hashable) -> Any:
        """The value, from now on the youngest, or None."""
        if key in self._held:
            return self._held[key][0]
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._has_room(entry[1]):
            self._forget(key)
            self._hold(key, *entry)
        else:
            self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep `value`, of `size` bytes, in the place of what the key had."""
        self._forget(key)
        size += _OVERHEAD
        if self._has_room(size):
            self._hold(key, value, size)
        else:
            self._warn()
            self._keep(key, value, size)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._held.clear()
        self.used = self.held = 0

    def _has_room(self, size: int) -> bool:
        return self._in_iteration and self.held + size <= self.iteration_limit

    def _hold(self, key: Hashable, value: Any, size: int) -> None:
        self._held[key] = (value, size)
        self.held += size

    def _keep(self, key: Hashable, value: Any, size: int) -> None:
        if size > self.limit:
            return
        while self.used + size > self.limit:
            self.used -= self._entries.popitem(last=False)[1][1]
        self._entries[key] = (value, size)
        self.used += size

    def _forget(self, key: Hashable) -> None:
        self.used -= self._entries.pop(key, (None, 0))[1]
        self.held -= self._held.pop(key, (None, 0))[1]

    def _warn(self) -> None:
        """Say once that an iteration makes some of its values in every pass."""
        if self._in_iteration and not self._warned:
            self._warned = True
            log.warning(
                "the %s of an iteration take more than %.1f GiB in this process; the rest are made anew every time. "
                "Smaller pictures, fewer prompts an iteration or more processes would fit",
                self._name, self.iteration_limit / 2**30,
            )  # fmt: skip
