"""What a worker on a real Ray cluster has when storms strike: its device and its counter as in `support.chaos.inside`.

`sitecustomize` of `support/fake_boards` calls this in every process that has stand-in boards and MILLIJOULE_TEST_CHAOS.
"""

from __future__ import annotations

import os
from pathlib import Path

from support.chaos import inside

from millijoule.workers import actor

#: For less and more than the product's own time until a counter that stands is taken for broken (5 s), and for long.
COUNTER_SECONDS = (0.5, 3.0, 8.0, 30.0)


def install(folder: Path) -> None:
    """This process has what is armed in `folder`, and says there which worker it is."""
    inside.COUNTER_SECONDS = COUNTER_SECONDS
    ground = inside.Ground(folder)
    inside.install_device(ground, hangs_in_its_first_call=False)
    inside.install_counter(ground)
    init = actor.ShardWorker.__init__

    def named(self, worker_id, *arguments, **more):
        (folder / "names" / str(os.getpid())).write_text(worker_id)
        init(self, worker_id, *arguments, **more)

    actor.ShardWorker.__init__ = named  # type: ignore[method-assign]


def names(folder: Path) -> dict[int, str]:
    """Of the workers and readers there were, by pid."""
    return {int(path.name): path.read_text() for path in (folder / "names").iterdir()}
