"""The `millijoule` command: finds the subcommand and hands the rest of the line to it.

Subcommands are modules of this folder with a `main(argv) -> int`; each also runs as `python -m millijoule.jobs.NAME`.
They are imported only when asked for, so that `--help` does not wait for torch and Ray.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

COMMANDS = {
    "generate": "make images from prompt files on a Ray cluster, with a joule ledger",
    "report": "a page, JSON or table of what a job made and used: joules, cost, carbon, closure",
    "query": "SQL over the energy tables of one job or many",
    "node-energy": "compare a finished job's devices with its node's power strip",
    "verify": "measure two models against each other, or check such a bundle offline",
    "check": "re-read an output against its plan, commits and hashes",
    "gc": "find (and with --delete remove) files no commit refers to",
    "train": "train the generator, a control, the diffusion baseline or the verifier",
    "evaluate": "score a model's images: what prompts say, Frechet distance, precision and recall",
    "convert": "turn a published Un-0 checkpoint into a file that --model takes",
    "bench": "measure this program: pipeline, energy tables, cost of telemetry, report",
}


def usage() -> str:
    lines = ["usage: millijoule COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "`millijoule COMMAND --help` explains a command's options.",
        f"version {version('millijoule')}",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit code is the subcommand's, 2 for an unknown one."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args and args[0] == "--version":
        print(version("millijoule"))
        return 0
    if not args or args[0] not in COMMANDS:
        if args:
            print(f"millijoule: no command named {args[0]!r}\n", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    return importlib.import_module(f"millijoule.jobs.{args[0].replace('-', '_')}").main(args[1:])


if __name__ == "__main__":
    sys.exit(main())
