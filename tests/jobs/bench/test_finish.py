"""The finishing benchmark's made-up job closes exactly, and its image table is the one made from commits."""

import pytest

from millijoule.jobs.bench.finish import finish, make
from millijoule.jobs.measuring.measurement import run_alone
from millijoule.pipeline.closing.check import check_output
from millijoule.workers.storage.open import open_store


@pytest.mark.long
def test_a_job_of_one_image_shards_closes_and_agrees_with_its_commits(tmp_path):
    make(str(tmp_path), 700)  # more than a block of the manifest
    found = run_alone(finish, str(tmp_path), 700)  # asserts C1, C2 and C5
    assert found["segments"] == 1400
    problems = list(check_output(open_store(str(tmp_path / "out")), images=False))
    assert [p for p in problems if "energy" in p or "manifest" in p] == []
