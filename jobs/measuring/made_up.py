"""Commits of shards that nobody drew, as workers with five counters would have written them."""

from __future__ import annotations

from collections.abc import Sequence

from millijoule.jobs.measuring.stand_ins import DRAM_WATTS, GPU_WATTS, PACKAGE_WATTS, PACKAGES, board_uuid
from millijoule.workers.schemas import Commit, CounterRead, ImageRow, PowerTrace, Segment, carried_rows

SECOND_NS = 1_000_000_000
#: Time on the monotonic clock at which every made-up job begins.
BEGIN_S = 1_000_000


def made_up_commit(
    shard_id: int,
    number: int,
    start_s: int,
    lengths_s: tuple[int, int],
    *,
    nodes: int = 1,
    fingerprint: str = "f" * 64,
    rows_path: str = "rows",
    images: int = 1,
    rows: Sequence[ImageRow] | None = None,
    power: Sequence[PowerTrace] = (),
) -> Commit:
    """The commit of a shard that worker `number` began at `start_s`: a stretch of idle, then the shard.

    Args:
        lengths_s: of the two.
        nodes: worker `number` is on node `number % nodes`.
        rows: are carried by the commit; None: it has none.
    """
    node, gpu, name = number % nodes, board_uuid(number), f"w0001-{number:04d}"
    watts = {f"gpu:{gpu}": GPU_WATTS}
    for kind, drawn in (("cpu", PACKAGE_WATTS), ("dram", DRAM_WATTS)):
        watts |= {f"{kind}:package-{i}": drawn for i in range(PACKAGES)}

    def read(at_s: int) -> CounterRead:
        # no two workers of a node read at the same nanosecond, and what they read follows from when
        t = (BEGIN_S + at_s) * SECOND_NS + number * 1_000_000
        energy = {d: 10**9 + w * t // 1_000_000 for d, w in watts.items()}
        boot = f"{node:08d}-1111-4222-8333-444444444444"
        return CounterRead(boot, t, t + 10**18, 150_000, energy, 10 * at_s, 0)

    idle_s, shard_s = lengths_s
    opened, begun, closed = (read(start_s + s) for s in (0, idle_s, idle_s + shard_s))
    attempt = f"e000001-{shard_id:08d}"
    segments = (
        Segment(name, "idle", opened, begun),
        Segment(name, "shard", begun, closed, shard_id, attempt),
    )
    return Commit(
        *(shard_id, attempt, 1, name, f"node-{node}", f"host-{node}", gpu, fingerprint, "0" * 64, ()),
        *(rows_path, images, 0, {}, begun.t_wall_ns, closed.t_wall_ns, None, tuple(watts), 300),
        *("nvml-counter+rapl", segments, tuple(power)),
        rows=None if rows is None else carried_rows(rows),
    )
