"""Running `millijoule generate` as a person would, and the oracle for what it must leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from millijoule.pipeline.check import check_output
from millijoule.workers.storage import open_store

TESTS = Path(__file__).parents[1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "millijoule.jobs.generate", *map(str, arguments)]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a driver: the test's models importable, harm recorded in `folder`, and no cluster but the one given."""
    env = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "MILLIJOULE_TEST_DIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        **more,
    }
    env.pop("RAY_ADDRESS", None)
    return env


def generate(folder: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr captured."""
    return subprocess.run(
        command(*arguments),
        env=environment(folder, **env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


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
