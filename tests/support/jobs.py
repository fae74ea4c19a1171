"""Running `millijoule generate` as a person would, and the oracle for what it must leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from millijoule.pipeline.closing.check import check_output
from millijoule.workers.storage.open import open_store

TESTS = Path(__file__).parents[1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "millijoule.jobs.generate", *map(str, arguments)]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a driver and its workers: the test's models importable, harm recorded in `folder`.

    Workers on a cluster inherit their node's environment, not the driver's; a job's variables reach them the way
    `ray job submit` sends them.
    """
    ours = {"PYTHONPATH": str(TESTS), "MILLIJOULE_TEST_DIR": str(folder), **more}
    ours |= {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **ours}
    env["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": ours}})
    env.pop("RAY_ADDRESS", None)
    return env


def generate(
    folder: Path, *arguments: object, ray: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end, on the cluster at `ray` or a local one; stdout and stderr captured."""
    where = () if ray is None else ("--ray-address", ray)
    return subprocess.run(
        command(*arguments, *where),
        env=environment(folder, **env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start(folder: Path, *arguments: object, ray: str, **env: str) -> subprocess.Popen[str]:
    """Start and return at once; stderr goes to `driver.log` in `folder`."""
    with (folder / "driver.log").open("a") as log:
        return subprocess.Popen(
            command(*arguments, "--ray-address", ray),
            env=environment(folder, **env),
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def wait_for_commits(output: Path, n: int, timeout_s: float = 90.0) -> None:
    """Until at least `n` shards of a local output are committed."""
    deadline = time.monotonic() + timeout_s
    while len(list(output.glob("_job/commits/*/*.json"))) < n:
        assert time.monotonic() < deadline, f"{output}: no {n} commits after {timeout_s:.0f} s"
        time.sleep(0.05)


def wait_for_log(folder: Path, words: str, timeout_s: float = 90.0) -> None:
    """Until the driver that `start` started in `folder` has said `words`."""
    deadline = time.monotonic() + timeout_s
    while words not in (log := (folder / "driver.log").read_text()):
        assert time.monotonic() < deadline, f"never said {words!r}:\n{log}"
        time.sleep(0.05)


def write_prompts(path: Path, n: int) -> Path:
    path.write_text("".join(f"prompt number {i}\n" for i in range(n)))
    return path


def manifest(output: Path | str) -> list[dict]:
    with open_store(str(output)).open_input("manifest.parquet") as source:
        return pq.ParquetFile(source).read().to_pylist()


def hashes(output: Path | str) -> dict[tuple[str, int], str | None]:
    """(prompt id, image index) -> SHA-256 of the encoded image, None where quarantined."""
    return {(r["prompt_id"], r["image_index"]): r["sha256"] for r in manifest(output)}


def assert_exactly_once(output: Path | str, images: int) -> None:
    """Union of committed rows equals the plan, each (prompt id, image index) once, every hash true."""
    keys = Counter((r["prompt_id"], r["image_index"]) for r in manifest(output))
    assert sum(keys.values()) == images
    assert set(keys.values()) == {1}
    assert list(check_output(open_store(str(output)))) == []


def energy_rows(output: Path, table: str) -> list[dict]:
    """A table of `energy/` of a finished job."""
    parts = sorted(output.glob(f"energy/{table}/run_id=*/date=*/part-*.parquet"))
    assert parts, f"{output}: no {table} table"
    return [row for part in parts for row in pq.ParquetFile(part).read().to_pylist()]


def assert_books_close(output: Path) -> None:
    """C1, C2 and C5 of a finished job whose counters could be read all the time, whoever died meanwhile.

    What a killed worker did since its last commit is nobody's segment, but the counters went on and others read them:
    its energy is in gaps, so every counter adds up (C1), everything is images or overhead (C2, direct), and no attempt
    is charged that did not win (C5). A reader that waits too long for the host's counter book misses a reading: then, and
    only then, a segment's energy is null, and so may be the figures it belongs to (C2, full among them).
    """
    rows = energy_rows(output, "closure")
    verdicts = {(r["check"], r["scope"]): r["passed"] for r in rows}
    assert verdicts["C2", "job, direct"] is True, rows
    assert verdicts["C5", "job"] is True, rows
    counters = [scope for check, scope in verdicts if check == "C1"]
    assert {scope.split(" boot ")[0] for scope in counters} == {"cpu:package-0", "dram:package-0"}, rows
    assert all(verdicts["C1", scope] is True for scope in counters), rows
    stats = json.loads((output / "stats.json").read_text())
    missing = [s for s in energy_rows(output, "segment") if s["worker_id"] and s["energy_mj"] is None]
    readings = {
        (c["worker_id"], c["boot_id"], c["epoch"], c["domain"], c["t_mono_ns"])
        for c in energy_rows(output, "counter")
    }
    for s in missing:
        counter = (s["worker_id"], s["boot_id"], s["epoch"], s["domain"])
        read = [(*counter, s[end]) in readings for end in ("t_open_mono_ns", "t_close_mono_ns")]
        assert not all(read), f"null though its counter was read at both ends: {s}"
    assert missing or stats["full_mj_per_image"] is not None
    shards_missing = any(s["segment_class"] == "shard" for s in missing)
    assert (stats["direct_mj_per_image"] is None) == shards_missing
    whole = stats["full_mj_per_image"] is not None and not shards_missing
    assert verdicts["C2", "job, full"] is (True if whole else None), rows
    assert stats["closure"] | {"C1": True, "C2": True, "C5": True} == stats["closure"]
    assert stats["evidence_class"] == ("E1" if whole else "E0")
