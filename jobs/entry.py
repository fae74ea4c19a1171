"""What every command does the same way: parse options, log, turn known errors into messages and exit codes."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

import tyro

from millijoule.kernels.native_library import KernelChoiceError, check_choice
from millijoule.workers.errors import InputError, MillijouleError, SupersededError, UsageError
from millijoule.workers.visible_text import log_to_stderr, visible_lines

COMPLETE = 0
ERROR = 1
USAGE = 2
QUARANTINED = 3
CAP_REACHED = 4
INTERRUPTED = 5
#: 6 is of commands that find that something was not shown, or is missing.
SUPERSEDED = 7

Options = TypeVar("Options")

#: A switch that is on unless `--no-...` is given: what its help says of its default would be read the wrong way round.
OnUnlessNo = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


#: The output of a command that takes it by its place, by name: people know it from `generate`.
NamedOutput = Annotated[str, tyro.conf.arg(name="output", metavar="DIR|URL")]
NamedOutputs = Annotated[tuple[str, ...], tyro.conf.arg(name="output", metavar="DIR|URL ...")]


def the_output(placed: str, named: str) -> str:
    """The output of a command that takes one, given by its place or by name.

    Raises:
        InputError: it was given in neither way, or in both.
    """
    if bool(placed) == bool(named):
        given = f"both {placed} and --output {named} are given; give one" if placed else "none is given"
        raise UsageError(f"which output? {given}: an output folder or s3:// URL of a job")
    return placed or named


def check_writable(folder: Path, option: str) -> None:
    """Make `folder`, and see that a file can be written there, before anything is done that costs time.

    Raises:
        InputError: it cannot; the message names `option`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: nothing can be written there ({error.strerror})") from error


def run_command(
    name: str,
    options_class: type[Options],
    run: Callable[[Options], int],
    argv: list[str] | None,
) -> int:
    """Parse `argv` into `options_class` and call `run`.

    Returns:
        What `run` returns; 2 for options that cannot be parsed or mean nothing (`UsageError`); 1 after any other
        `MillijouleError`, whose message is printed (7 after a `SupersededError`), or a file that cannot be used, which is
        named; 5 after Ctrl-C outside the parts that handle it.
    """
    log_to_stderr("%(message)s")
    for noisy in ("botocore", "aiobotocore", "s3fs", "ray", "asyncio", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        check_choice()
    except KernelChoiceError as error:
        print(f"millijoule {name}: {error}", file=sys.stderr)
        return ERROR
    try:
        options = tyro.cli(
            options_class,
            prog=f"millijoule {name}",
            args=joined(sys.argv[1:] if argv is None else argv, options_class),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    try:
        return run(options)
    except MillijouleError as error:
        print(visible_lines(f"millijoule {name}: {error}"), file=sys.stderr)
        if isinstance(error, UsageError):
            return USAGE
        return SUPERSEDED if isinstance(error, SupersededError) else ERROR
    except OSError as error:
        if error.filename is None:  # not a file that somebody named
            raise
        print(visible_lines(f"millijoule {name}: {error.filename}: {error.strerror}"), file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(f"millijoule {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def joined(argv: Sequence[str], options_class: type) -> list[str]:
    """`argv` in which an option of several values that is given twice has all of them: the parser would keep the last alone."""
    several = _of_several_values(options_class)
    current: list[str] = []
    parts, given = [current], dict[str, list[str]]()
    for word in argv:
        name, equals, value = word.partition("=")
        if name in several:
            if name not in given:
                given[name] = [name]
                parts.append(given[name])
            given[name] += [value] if equals else []
            current = given[name]
        elif word.startswith("--"):
            current = [word]
            parts.append(current)
        else:
            current.append(word)
    return [word for part in parts for word in part]


def _of_several_values(options_class: type) -> set[str]:
    """Options whose values are a tuple of any length, as the command line names them; those of groups among them."""
    found = set()
    for name, hint in get_type_hints(options_class).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found |= _of_several_values(hint)
        elif get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
            found.add(f"--{name.replace('_', '-')}")
    return found
