"""A row of the counter table stays as small as promised, with times and powers as real ones wander."""

import numpy as np
import pyarrow as pa

from millijoule.pipeline.energy.rows import DAY_NS, LATENCY_STEP_NS, WALL_STEP_NS
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS
from millijoule.pipeline.energy.tables import table_row_groups, write_row_groups
from millijoule.workers.storage.open import open_store

START_NS = 1_760_000_400_000_000_000
BOOT_NS = 3_000_000_000_000
GPUS, READS, PERIOD_NS = 8, 6000, 100_000_000


def counter_rows():
    """Eight GPUs read ten times a second for ten minutes, in order of time.

    A sleeping thread wakes up 50 us late, or one time in a hundred up to 5 ms; the sensor counts every 100 ms by a clock of
    its own, and its timestamps are microseconds.
    """
    rng = np.random.default_rng(0)
    shape = (READS, GPUS)
    late_ns = np.abs(rng.normal(0, 50_000, shape))
    late_ns += rng.integers(0, 5_000_000, shape) * (rng.random(shape) < 0.01)
    steps = np.arange(READS)[:, None]
    mono = steps * PERIOD_NS + np.arange(GPUS) * 1000 + late_ns.astype(np.int64) + BOOT_NS
    sensor_ns = (100_000_000 * (1 + rng.normal(0, 20e-6, GPUS))).astype(np.int64)
    phase = rng.integers(0, 100_000_000, GPUS)
    latency = 400_000 + (mono - phase) % sensor_ns // 1000 * 1000 + rng.integers(0, 1000, shape)
    watts = 500 + 100 * np.sin(steps / 700 + np.arange(GPUS)) + rng.normal(0, 15, shape)
    wall = mono - BOOT_NS + START_NS + rng.integers(-40, 40, shape)
    values = {
        "worker_id": [f"e000001-w{g:04d}" for g in range(GPUS)] * READS,
        "boot_id": [f"{g // 4:08d}-1111-4222-8333-444444444444" for g in range(GPUS)] * READS,
        "epoch": [0] * GPUS * READS,
        "domain": [f"gpu:GPU-{g:08x}-0000-4000-8000-{g * 7919:012x}" for g in range(GPUS)] * READS,
        "t_mono_ns": mono.ravel(),
        "t_wall_ns": (wall - wall % WALL_STEP_NS).ravel(),
        "read_latency_ns": (latency + -latency % LATENCY_STEP_NS).ravel(),
        "energy_mj": (10_000_000 + np.cumsum((watts * PERIOD_NS / 1e6).astype(np.int64), axis=0)).ravel(),
    }
    schema = ENERGY_SCHEMAS["counter"]
    assert list(values) == schema.names
    return pa.table([pa.array(values[f.name], f.type) for f in schema], schema=schema)


def test_a_counter_row_takes_at_most_nine_bytes(tmp_path):
    store, rows, day = open_store(str(tmp_path)), counter_rows(), START_NS // DAY_NS
    keys = write_row_groups(store, table_row_groups("counter", "run", iter([(day, rows)]), day))
    assert sum(store.size(key) for key in keys) <= 9 * len(rows)
