"""`gc` tells what may go from what must stay, a handful of objects at a time."""

import os

import pytest
from support.local_job import plan, work

from millijoule.pipeline.closing import garbage
from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.garbage import GRACE_S, find_orphans, remove


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("output_format", ["parquet", "files"])
def test_only_what_no_commit_names_goes(tmp_path, monkeypatch, at_once, output_format):
    monkeypatch.setattr(garbage, "OBJECTS_AT_ONCE", at_once)
    store, job = plan(tmp_path, [f"prompt {i}" for i in range(20)], output_format=output_format)
    work(store, job)
    assert list(find_orphans(store)) == []
    orphans = {
        "data/00000001-e000001-0badbeef.parquet": True,  # the shard is committed by another attempt
        "data/00000000-e000001-0badbeef/x-0.png": True,
        "data/00000099-e000001-0badbeef.parquet": False,  # of no shard that is committed, by the running driver
        "data/note.txt": False,
        "_job/parts/01/00000001/e0001-0badbeef.p0.json": True,  # its attempt ended when another had won
    }
    for key in (*orphans, "_job/parts/99/00000099/e0001-0badbeef.p0.json"):
        store.put(key, b"xyz")
    assert {o.key: o.removable for o in find_orphans(store)} == orphans
    later = os.stat(tmp_path / "out" / "data").st_mtime + GRACE_S + 100
    assert {o.key: o.removable for o in find_orphans(store, now=later)} == orphans  # its driver is the newest
    store.put("_job/epochs/000007.json", b"{}")
    old = orphans | {"data/00000099-e000001-0badbeef.parquet": True}
    assert {o.key: o.removable for o in find_orphans(store, now=later)} == old
    assert {o.key for o in remove(store, find_orphans(store, now=later))} == set(old)
    assert {o.key for o in find_orphans(store)} == {"data/note.txt"}
    assert list(check_output(store)) == []
