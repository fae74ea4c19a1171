"""Batch sizes that a compiled or captured network knows: a smaller last batch is padded to one of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable


class BatchShapes:
    """Row counts that calls have had, by what else decides their shapes (width and height, say)."""

    def __init__(self) -> None:
        self._known: defaultdict[Hashable, list[int]] = defaultdict(list)

    def rows_for(self, key: Hashable, rows: int) -> int:
        """The smallest known number of rows that holds `rows`; `rows` itself where there is none: a new shape."""
        known = self._known[key]
        at = bisect_left(known, rows)
        return known[at] if at < len(known) else rows

    def ran(self, key: Hashable, rows: int) -> None:
        """A call with `rows` rows went well."""
        if rows not in self._known[key]:
            insort(self._known[key], rows)

    def failed(self, key: Hashable, rows: int) -> None:
        """A call with `rows` rows did not: nothing is padded to so many again until they have gone well."""
        self._known[key] = [known for known in self._known[key] if known < rows]
