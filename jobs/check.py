"""`millijoule check`: re-read an output and compare it with its plan, commits and hashes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from millijoule.jobs.entry import COMPLETE, ERROR, NamedOutput, run_command, the_output
from millijoule.workers.counted import counted

#: Differences printed in full; the rest is counted.
MAX_PRINTED = 100


@dataclass(frozen=True)
class CheckOptions:
    """Re-read an output and compare it with its plan, its commits and every hash.

    Prints one line per difference. Exit code 0: complete and sound; 1: anything else. Energy that nobody read to the
    end is said in a line that begins with "note:" and is no difference.
    """

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")] = ""
    """Output folder or s3:// URL of a job."""

    named: NamedOutput = ""
    """The same, as an option."""

    quick: bool = False
    """Compare sizes and tables only; do not read the image bytes again."""


def run(options: CheckOptions) -> int:
    from millijoule.pipeline.closing.check import check_output
    from millijoule.workers.storage.open import open_store
    from millijoule.workers.visible_text import visible

    output = the_output(options.output, options.named)
    checked: list[int] = []
    problems = 0
    found = check_output(
        open_store(output),
        images=not options.quick,
        on_shard=checked.append,
        on_note=lambda text: print(f"note: {text}"),
    )
    for problem in found:
        problems += 1
        if problems <= MAX_PRINTED:
            print(visible(problem))
    if problems > MAX_PRINTED:
        print(f"... and {problems - MAX_PRINTED} more")
    print(f"{output}: {counted(len(checked), 'shard')} checked, {counted(problems, 'difference')}")
    return ERROR if problems else COMPLETE


def main(argv: list[str] | None = None) -> int:
    return run_command("check", CheckOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
