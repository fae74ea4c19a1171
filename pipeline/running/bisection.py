"""Finding the plan rows that kill workers, by halving. Pure state; the coordinator turns ranges into leases."""

from __future__ import annotations


class Bisection:
    """Searches `n_rows` rows, some of which kill the worker that touches them.

    `next_range` names the half-open range to try next (one at a time), `report` says whether a worker survived it.
    With p poison rows among n it takes at most about 2 p log2(n) probes. Every row not in `poison` at the end was
    in a range that survived.
    """

    def __init__(self, n_rows: int) -> None:
        self.poison: list[int] = []
        self._stack = _halves(0, n_rows)  # ranges still to try, top last

    @property
    def done(self) -> bool:
        return not self._stack

    def next_range(self) -> tuple[int, int]:
        """The range to try now; raises IndexError when the search is done."""
        return self._stack[-1]

    def report(self, tried: tuple[int, int], survived: bool) -> None:
        """Take in the outcome for the range `next_range` gave."""
        start, stop = self._stack.pop()
        assert (start, stop) == tried, "a probe is reported once, in order"
        if not survived and stop - start > 1:
            self._stack += _halves(start, stop)
        elif not survived:
            self.poison.append(start)


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    middle = (start + stop) // 2
    return [r for r in ((middle, stop), (start, middle)) if r[0] < r[1]]
