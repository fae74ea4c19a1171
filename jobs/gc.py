"""`millijoule gc`: list, and on request remove, files that no commit refers to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from millijoule.jobs.entry import COMPLETE, NamedOutput, run_command, the_output
from millijoule.workers.counted import counted


@dataclass(frozen=True)
class GcOptions:
    """Find data files that no commit refers to: what killed and losing attempts left behind.

    Without --delete nothing is changed. A file is removable when another attempt of its shard is committed, or when
    its driver was replaced and the file is more than a day old; the record of a sealed part when its shard is committed.
    """

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")] = ""
    """Output folder or s3:// URL of a job."""

    named: NamedOutput = ""
    """The same, as an option."""

    delete: bool = False
    """Remove what is removable, interrupted writes over a day old included."""


def run(options: GcOptions) -> int:
    from millijoule.pipeline.closing.garbage import find_orphans, remove, stale_temporaries
    from millijoule.workers.storage.open import open_store
    from millijoule.workers.visible_text import visible

    store = open_store(the_output(options.output, options.named))
    removable, size = 0, 0
    orphans = find_orphans(store)
    for orphan in remove(store, orphans) if options.delete else orphans:
        mark = "remove" if orphan.removable else "keep  "
        removable += orphan.removable
        size += orphan.size_bytes if orphan.removable else 0
        print(visible(f"{mark} {orphan.size_bytes:>12} {orphan.key}  ({orphan.reason})"))
    temporaries = stale_temporaries(store)
    for leftover in temporaries:
        print(visible(f"remove {'':>12} {leftover.key}  (an interrupted write, over a day old)"))
    removable += len(temporaries)
    if options.delete:
        store.delete_temporary(temporaries)
        print(f"removed {counted(removable, 'file')}, {counted(size, 'byte')}")
    else:
        print(
            f"{counted(removable, 'removable file')}, {counted(size, 'byte')}"
            + ("; --delete removes them" if removable else "")
        )
    return COMPLETE


def main(argv: list[str] | None = None) -> int:
    return run_command("gc", GcOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
