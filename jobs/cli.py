"""The `millijoule` command: finds the subcommand and hands the rest of the line to it.

Subcommands are modules of this folder with a `main(argv) -> int`; each also runs as `python -m millijoule.jobs.NAME`.
They are imported only when asked for, so that `--help` does not wait for torch and Ray.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

COMMANDS = {
    "generate": "make images from prompt files on a Ray cluster, with a joule ledger",
    "report": "a page, JSON or table of what a job made and used: joules, cost, carbon, closure",
    "models": "what a model is and needs, without a GPU: parts, memory, operations, options, problems",
    "query": "SQL over the energy tables of one job or many",
    "node-agent": "drain a machine's Ray nodes before its cloud takes it away",
    "node-energy": "compare a finished job's devices with its node's power strip",
    "verify": "measure two models against each other, or check such a bundle offline",
    "check": "re-read an output against its plan, commits and hashes",
    "gc": "find (and with --delete remove) files no commit refers to",
    "train": "train the generator, a control, the diffusion baseline or the verifier",
    "evaluate": "score a model's images: what prompts say, Frechet distance, precision and recall",
    "convert": "turn a published Un-0 checkpoint into a file that --model takes",
    "bench": "measure this program and its boards: pipeline, counters, cost of telemetry",
}


def dispatch(
    program: str,
    commands: Mapping[str, str],
    run: Callable[[str, list[str]], int],
    argv: list[str] | None,
    notes: Sequence[str] = (),
) -> int:
    """Give the rest of the line to the command its first word names.

    Args:
        program: as it is called.
        commands: what each does, by name.
        run: takes a name and the arguments after it; returns the exit code.
        argv: the line, default `sys.argv[1:]`.
        notes: lines at the end of the usage text.

    Returns:
        The command's exit code; 0 for `--help`, 2 for an unknown command or none.
    """
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in commands:
        return run(args[0], args[1:])
    lines = [f"usage: {program} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12} {text}" for name, text in commands.items()]
    lines += ["", f"`{program} COMMAND --help` explains a command's options.", *notes]
    if args and args[0] in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    if args:
        print(f"{program}: no command named {args[0]!r}\n", file=sys.stderr)
    print("\n".join(lines), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit code is the subcommand's, 2 for an unknown one."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] == "--version":
        print(version("millijoule"))
        return 0
    return dispatch("millijoule", COMMANDS, _run, args, [f"version {version('millijoule')}"])


def _run(name: str, args: list[str]) -> int:
    return importlib.import_module(f"millijoule.jobs.{name.replace('-', '_')}").main(args)


if __name__ == "__main__":
    sys.exit(main())
