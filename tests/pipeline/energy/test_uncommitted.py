"""What no commit carries comes back from storage as it was, or is named where it cannot be read."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.histories import histories
from support.ledgers import GPU, chain, read

from millijoule.pipeline.energy.uncommitted import UncommittedWriter, read_uncommitted
from millijoule.workers.errors import StoreError
from millijoule.workers.layout import SEGMENTS_PREFIX, worker_key
from millijoule.workers.schemas import PowerSample, PowerTrace, WorkerEnvironment
from millijoule.workers.storage.open import open_store

SEGMENTS = chain([read(0, 5), read(1), read(2, 30, **{"cpu:0": 7})], ["load", "idle"])
TRACE = PowerTrace(
    "GPU-1", "boot", "nvml", (PowerSample(1, 2, None, 700_000), PowerSample(3, 4, 650_000, None))
)
ENVIRONMENT = WorkerEnvironment(
    *(
        "w1",
        1,
        "node",
        "host",
        "GPU-1",
        ("GPU-1", "GPU-2"),
        "NVIDIA H200",
        None,
        "3.11.2",
        None,
        "nvml-counter",
    )
)


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def test_nothing_written_is_nothing_read(output):
    UncommittedWriter(output, 1).flush()
    found = read_uncommitted(output)
    assert (found.segments, found.power, found.workers) == ((), (), {})
    assert list(output.list()) == []


@settings(max_examples=30, deadline=None)  # each writes files
@given(histories(), st.integers(1, 3))
def test_segments_and_power_come_back_whoever_wrote_them(tmp_path_factory, history, drivers):
    store = open_store(str(tmp_path_factory.mktemp("job") / "out"))
    added = []
    for epoch in range(1, drivers + 1):
        writer = UncommittedWriter(store, epoch)
        for part in range(2):
            mine = history.segments[2 * epoch + part :: 2 * drivers]
            power = [replace(TRACE, device=f"GPU-{epoch}-{part}")]
            writer.add(f"w{epoch}", mine, power)
            added += [(mine, [(f"w{epoch}", trace) for trace in power])]
            writer.flush()
    found = read_uncommitted(store)
    assert found.segments == tuple(s for segments, _ in added for s in segments)
    assert found.power == tuple(p for _, power in added for p in power)


def test_a_flush_that_failed_is_repeated_and_written_once(output, monkeypatch):
    writer = UncommittedWriter(output, 1)
    writer.add("w1", SEGMENTS, [TRACE])
    with monkeypatch.context() as patch:
        patch.setattr(output, "put", lambda key, data: (_ for _ in ()).throw(StoreError("disk full")))
        with pytest.raises(StoreError):
            writer.flush()
    writer.flush()
    writer.flush()
    found = read_uncommitted(output)
    assert found.segments == tuple(SEGMENTS)
    assert found.power == (("w1", TRACE),)


def test_segments_from_before_power_was_carried_are_read(output):
    output.put(f"{SEGMENTS_PREFIX}000001-000000.json", json.dumps([asdict(s) for s in SEGMENTS]).encode())
    assert read_uncommitted(output).segments == tuple(SEGMENTS)
    assert read_uncommitted(output).segments[1].close.energy_mj[GPU] == 30


def test_an_environment_survives_its_json(output):
    output.put(worker_key("w1"), ENVIRONMENT.to_json())
    assert read_uncommitted(output).workers == {"w1": ENVIRONMENT}


@pytest.mark.parametrize("key", [f"{SEGMENTS_PREFIX}000001-000000.json", worker_key("w1")])
@pytest.mark.parametrize("body", [b"", b"7", b"{}", b'{"segments": [{}], "power": []}', b"\xff"])
def test_what_is_not_one_is_named(output, key, body):
    output.put(key, body)
    with pytest.raises(StoreError, match=key):
        read_uncommitted(output)
