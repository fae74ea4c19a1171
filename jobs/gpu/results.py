"""What `make gpu` leaves in its folder: the state of each step, a summary, and all of it as an archive in parts."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from millijoule.jobs.gpu.one_step import NO_TIME
from millijoule.jobs.gpu.steps import Step

STATE = "state.json"
SUMMARY = "summary.txt"
FORMAT_VERSION = 1

#: Inside the results: installed wheels, compiled kernels, the lock. Neither results nor worth keeping.
WORK = ".work"
#: Part of an archive: some machines hand back only files of up to 16 MiB.
ARCHIVE_PART_BYTES = 15 * 2**20


class QueueError(Exception):
    """The queue cannot be run; the message says what to do."""


@dataclass
class Row:
    """What is known of one step; `commit`, `board` and times are of its last run."""

    status: str
    reason: str = ""
    began_unix: float | None = None
    seconds: float | None = None
    granted_s: float | None = None
    commit: str | None = None
    board: str | None = None
    runs: int = 0


@dataclass
class State:
    """Of one folder of results; `code` and `device` must stay the same for it to be continued."""

    code: str
    device: str
    commit: str
    steps: dict[str, Row] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """In one move: a reader, and a later call, see the old state or the new."""
        temporary = folder / (STATE + ".part")
        with temporary.open("w") as file:
            file.write(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE)


def load_state(folder: Path) -> State | None:
    """The state in `folder`, None where there is none.

    Raises:
        QueueError: there is one that this program did not write.
    """
    path = folder / STATE
    try:
        table = json.loads(path.read_text())
        if table.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format")
        steps = {name: Row(**row) for name, row in table.pop("steps").items()}
        return State(**table, steps=steps)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise QueueError(f"{path}: cannot be read ({error}); move it away, or give another folder") from error


def line_of(name: str, row: Row) -> str:
    """What is said of a step: status, name, seconds, reason."""
    took = f" {row.seconds:6.1f} s" if row.seconds is not None and row.status != NO_TIME else ""
    return f"{row.status:<13}{name:<29}{took}{'  ' + row.reason if row.reason else ''}"


def summarise(steps: Sequence[Step], state: State) -> str:
    known = {s.name: state.steps[s.name] for s in steps if s.name in state.steps}
    counts = [row.status for row in known.values()]
    totals = ", ".join(f"{counts.count(status)} {status}" for status in dict.fromkeys(counts))
    return "\n".join([*(line_of(*item) for item in known.items()), f"on {state.device}: {totals}", ""])


def keep(results: Path, archive: Path | None, steps: Sequence[Step], state: State) -> None:
    """Write the summary, and the archive if one was asked for."""
    (results / SUMMARY).write_text(summarise(steps, state))
    if archive is not None:
        write_archive(results, archive.absolute())


def write_archive(results: Path, prefix: Path) -> None:
    """All results but what a restart needs (`WORK`, checkpoints), as PREFIX.00, .01, ...: `cat PREFIX.* | tar xz` unpacks them.

    The parts are put in place one after the other when all are written; older ones are replaced.
    """

    def kept(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(info.name)
        left_out = {WORK, "work"} & set(path.parts) or path.name.startswith("checkpoint.pt")
        return None if left_out else info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
        tar.add(results, results.name, filter=kept)
    data = buffer.getvalue()
    staged: list[Path] = []
    for start in range(0, len(data), ARCHIVE_PART_BYTES):
        staged.append(results / WORK / f"archive.{len(staged):02d}")
        staged[-1].write_bytes(data[start : start + ARCHIVE_PART_BYTES])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for old in prefix.parent.glob(f"{prefix.name}.[0-9][0-9]"):
        if int(old.suffix[1:]) >= len(staged):
            old.unlink()
    for number, temporary in enumerate(staged):
        shutil.move(temporary, f"{prefix}.{number:02d}")
