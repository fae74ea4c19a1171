"""Files that are damaged or lost: of hosts while a job runs, of its output between two drivers, and when it is done."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from support.chaos import inside, oracle
from support.chaos.faults import PARTS
from support.fault_plans import Plan
from support.random_runs import World, boot_id_of


class WorldWithFiles(World):
    """A world whose files are struck; `problems` are what must not come of it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan, folder)
        self.ground = inside.Ground(folder)
        self.ground.armed.mkdir()
        self.ground.ill.mkdir()
        self.problems: list[str] = []
        self.lost_books: list[tuple[str, int]] = []
        self.struck: set[Path] = set()  # files of the output that somebody has to put back

    def spoil_files(self, kind: str) -> bool:
        """Of a host: its counter book or the signs of life of its workers; of all: their scratch folders."""
        path = spoil(kind, self.folder, self.rng)
        if path is not None and kind.startswith("counter book"):
            host = int(path.parent.name)
            self.lost_books.append((boot_id_of(host, self.boots[host]), time.monotonic_ns()))
        return path is not None

    def before(self, kind: str) -> Callable[[], None]:
        """Do what is done before a driver starts; the result mends it afterwards."""
        out = self.folder / "out"
        if kind == "host started anew":
            self.ground.write(kind)
        elif kind == "collected commits lost" and (out / "_job" / "ledger").exists():
            shutil.rmtree(out / "_job" / "ledger")
            self.ground.write(kind)
        elif kind == "collected commits damaged":
            for path in sorted(out.glob("_job/ledger/*.parquet"))[:1]:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                self.ground.write(kind)
        elif kind == "half-written files left" and (out / "data").exists():
            (out / "data" / ".millijoule-tmp-0123456789abcdef").write_bytes(b"half")
            (out / "data" / "00000000-e0001-000000000000.parquet").write_bytes(b"half")
            self.ground.write(kind)
        elif kind.endswith("early"):
            for path in sorted(oracle.committed_files(out) - self.struck)[:1]:
                self.struck.add(path)
                whole = path.read_bytes()
                path.unlink()
                if kind == "object corrupted early":
                    path.write_bytes(flipped(whole, self.rng.choice((3, 2, 1.01))))
                self.ground.write(kind)
                return partial(self._mend_object, kind, path, whole)
        elif kind in PARTS and (sealed := self._sealed_part()):
            path = out / json.loads(sealed.read_bytes())["rows_path"]
            whole = path.read_bytes()
            path.unlink()
            if kind == "part cut short":
                path.write_bytes(whole[: len(whole) // 2])
            elif kind == "part damaged":
                path.write_bytes(flipped(whole, 2))
            self.ground.write(kind)
        elif kind == "commit damaged" and not list(out.glob("_job/ledger/*.parquet")):
            # one that is collected is not read again before `check`
            for path in sorted(out.glob("_job/commits/*/*.json"))[:1]:
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                self.ground.write(kind)
                return partial(self._mend_commit, path, whole)
        return lambda: None

    def _sealed_part(self) -> Path | None:
        """The record of a part whose shard is not committed and whose worker is gone: somebody will want to take it over."""
        while self.cluster.actors:
            self.cluster.turn()
        done = {path.stem for path in self.folder.glob("out/_job/commits/*/*.json")}
        records = sorted(self.folder.glob("out/_job/parts/*/*/*.json"))
        return next((path for path in records if path.parent.name not in done), None)

    def _mend_object(self, kind: str, path: Path, whole: bytes) -> None:
        """A person puts the object back; a job that was called finished without it says so when it is checked."""
        if self.codes[-1] in (0, 3) and not any(path.name in problem for problem in self.check()):
            self.problems.append(f"{kind}: check does not name {path.name}")
        path.unlink(missing_ok=True)
        path.write_bytes(whole)

    def _mend_commit(self, path: Path, whole: bytes) -> None:
        """A person puts the object back; meanwhile no driver may have called the job finished."""
        if self.codes[-1] in (0, 3):
            self.problems.append("a job with a damaged commit was called finished")
        if path.read_bytes() != whole[: len(whole) // 2]:
            self.problems.append("a damaged commit was overwritten")
        path.write_bytes(whole)
        self.codes.append(None)

    def damage_objects(self, kinds: Sequence[str]) -> None:
        """What `check` says of data that was damaged or lost when the job was done."""
        for kind in kinds:
            path = self.rng.choice(sorted(oracle.data_files(self.folder / "out")))
            whole = path.read_bytes()
            if kind == "object corrupted":
                path.unlink()  # not through a hard link
                path.write_bytes(flipped(whole, 3))
            else:
                path.unlink()
            self.ground.write(kind)
            if not any(path.name in problem for problem in self.check()):
                self.problems.append(f"{kind}: check does not name {path.name}")
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


#: Where such files lie below a run's folder.
SPOILED = {
    "counter book lost": "hosts/*/millijoule-*.json",
    "counter book damaged": "hosts/*/millijoule-*.json",
    "signs of life lost": "hosts/*/millijoule-*-life-*",
    "scratch lost": "tmp/millijoule-scratch-*",
}


def spoil(kind: str, folder: Path, rng: random.Random) -> Path | None:
    """Strike one of the files of `kind`; None where there is none."""
    found = sorted(folder.glob(SPOILED[kind]))
    if not found:
        return None
    path = rng.choice(found)
    if kind == "scratch lost":
        shutil.rmtree(path, ignore_errors=True)
    elif kind == "counter book damaged":
        path.write_bytes(b'{"epoch":')
    else:
        path.unlink(missing_ok=True)
    return path


def flipped(whole: bytes, part: float) -> bytes:
    """One bit differs, after `1 / part` of it."""
    at = int(len(whole) / part)
    return whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]
