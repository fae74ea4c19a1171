"""A worker of a run's first shard that is stopped (SIGSTOP) on its way: `python -m support.stopped_zombie OUTPUT EPOCH PLACE`.

PLACE is `before-asking`, when its files are stored and it has not asked yet whether a later run has begun, or `before-creating`, when
it has, and has not created its commit. Prints, as JSON, the outcome, what its counter ran, and the shard. Its last words are written.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from support.counted_images import Counter, Spending
from support.local_job import runner

from millijoule.pipeline.energy.uncommitted import UncommittedWriter
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.layout import COMMITS_PREFIX, epoch_key
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.open import open_store


def main(output: str, epoch: int, place: str) -> None:
    store = open_store(output)
    job = require_job(store)
    asks, creates = LocalStore.size, LocalStore.put_exclusive

    def size(self, key):
        if place == "before-asking" and key == epoch_key(epoch + 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return asks(self, key)

    def put_exclusive(self, key, data):
        if place == "before-creating" and key.startswith(COMMITS_PREFIX):
            os.kill(os.getpid(), signal.SIGSTOP)
        return creates(self, key, data)

    LocalStore.size, LocalStore.put_exclusive = size, put_exclusive
    counter, shards = Counter("boot-of-zombie"), load_job_shards(store, job)
    lease = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch).next_lease("zombie", 0.0)
    worker = runner(store, job, epoch, Spending(counter, []), "zombie", counter)
    result = worker.run(lease)
    worker.close()
    worker.timeline.close("idle", last=True)
    words = UncommittedWriter(store, epoch)
    words.add("zombie", worker.timeline.take(), ())
    words.flush()
    shard_id = lease.shard.shard_id
    print(json.dumps({"outcome": result.outcome, "spent_mj": counter.spent_mj, "shard": shard_id}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
