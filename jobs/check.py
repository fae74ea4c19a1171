"""`millijoule check`: re-read an output and compare it with its plan, commits and hashes."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from millijoule.jobs.entry import COMPLETE, ERROR, NamedOutput, run_command, the_output
from millijoule.workers.counted import counted

#: Differences of one kind, and of all kinds, that are printed; the rest is counted.
MAX_OF_A_KIND = 3
MAX_PRINTED = 100

#: What differs between differences of a kind: quoted words, and words with a number in them, as ids, hashes and keys have.
_PARTICULAR = re.compile(r"""'[^']*'|"[^"]*"|[^\s/.,;:()]*\d[^\s/.,;:()]*""")


@dataclass(frozen=True)
class CheckOptions:
    """Re-read an output and compare it with its plan, its commits and every hash.

    Prints the differences, the first of each kind and how many more there are. Exit code 0: complete and sound; 1: anything else. Energy that nobody read to the
    end, and files in data/ that no commit names, are said in lines that begin with "note:" and are no difference.
    """

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")] = ""
    """Output folder or s3:// URL of a job."""

    named: NamedOutput = ""
    """The same, as an option."""

    quick: bool = False
    """Compare sizes and tables only; do not read the image bytes again."""

    all: bool = False
    """Print every difference, a line each."""


def run(options: CheckOptions) -> int:
    from millijoule.pipeline.closing.check import check_output
    from millijoule.workers.storage.open import open_store
    from millijoule.workers.visible_text import visible

    output = the_output(options.output, options.named)
    checked: list[int] = []
    kinds: Counter[str] = Counter()
    printed = 0
    found = check_output(
        open_store(output),
        images=not options.quick,
        on_shard=checked.append,
        on_note=lambda text: print(f"note: {text}"),
    )
    for problem in found:
        kind = _PARTICULAR.sub("...", problem)
        kinds[kind] += 1
        if options.all or (kinds[kind] <= MAX_OF_A_KIND and printed < MAX_PRINTED):
            printed += 1
            print(visible(problem))
    problems = kinds.total()
    if printed < problems:
        for kind, n in kinds.most_common(MAX_PRINTED):
            if n > MAX_OF_A_KIND:
                print(visible(f"... {n:,} like this: {kind}"))
        print(f"... {counted(problems - printed, 'difference')} not shown; --all prints every one")
    print(f"{output}: {counted(len(checked), 'shard')} checked, {counted(problems, 'difference')}")
    return ERROR if problems else COMPLETE


def main(argv: list[str] | None = None) -> int:
    return run_command("check", CheckOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
