"""How fast workers of one pool start and draw, from what the driver hears of them: sooner than commits tell (`rates`), and roughly.

While little is known a rate is the most that it can be, so that work is not overrated.
"""

from __future__ import annotations

from collections import deque

from millijoule.pipeline.running.lease_state import ActiveLease

#: Before anything is known of a worker's speed it counts as this fast, which none is that also encodes and stores: a job so large
#: that it has work for several even then need not wait for the first of them.
MOST_IMAGES_PER_S = 10_000.0
#: A pool is as fast as its last so many shards were.
RECENT_SHARDS = 256
#: From so many shards on, those in hand tell nothing new.
FEW_SHARDS = 8
#: What is heard of a shard sooner says little: its worker may have begun with it before that was known.
MEASURABLE_S = 0.5


class Pace:
    """Of one pool. Its owner tells it of every shard that is made, and anew at each look of those in hand.

    Attributes:
        starts: seconds from request to first image; by whether a node was waited for.
        left: images that each worker at work, by id, still has to draw of the last shard it began.
    """

    def __init__(self) -> None:
        self.starts = {has_waited: deque[float](maxlen=RECENT_SHARDS) for has_waited in (True, False)}
        self.left: dict[str, int] = {}
        self._done, self._step, self._drawn_s = 0, 0, 0.0  # images of shards in hand, the last steps of these
        self._open, self._open_s = 0, 0.0  # the same shards, done or not
        self._shards: deque[tuple[int, float]] = deque(maxlen=RECENT_SHARDS)
        self._until: dict[str, float] = {}  # when a worker's last shard was done

    def made(self, worker_id: str, images: int, began: float, ended: float) -> None:
        """A shard is done. While it was stored its worker drew the next one: each second counts once."""
        self._shards.append((images, ended - max(began, self._until.get(worker_id, began))))
        self._until[worker_id] = ended

    def forget_what_is_in_hand(self) -> None:
        self.left.clear()
        self._done, self._step, self._drawn_s = 0, 0, 0.0
        self._open, self._open_s = 0, 0.0

    def draws(self, entry: ActiveLease, now: float) -> None:
        """A shard is in hand, and as far as was last heard."""
        images = entry.lease.shard.n_images
        self.left[entry.lease.worker_id] = max(0, images - entry.images_done)
        if entry.lease.resumes:  # others had made parts of it
            return
        if entry.images_at >= entry.started + MEASURABLE_S:
            self._done += entry.images_done
            self._step += entry.images_step
            self._drawn_s += entry.images_at - entry.started
        self._open += images
        self._open_s += now - entry.started

    @property
    def images_per_s(self) -> float | None:
        """Of one worker, as if the next shard, or the next step of those in hand, were done by now; None before the first images."""
        rates = []
        if self._shards:
            images, seconds = (sum(column) for column in zip(*self._shards, strict=True))
            rates.append((images + self._shards[-1][0]) / max(seconds, 1e-3))
        if self._done and len(self._shards) < FEW_SHARDS:
            rates.append((self._done + self._step) / max(self._drawn_s, 1e-3))
        return min(rates, default=None)

    @property
    def most_images_per_s(self) -> float | None:
        """Before the first images: what is in hand is not done yet."""
        return min(MOST_IMAGES_PER_S, self._open / self._open_s) if self._open_s > 0 else None
