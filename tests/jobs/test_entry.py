"""What every command does with its command line."""

from dataclasses import dataclass

import pytest

from millijoule.jobs.entry import COMPLETE, ERROR, SUPERSEDED, USAGE, OnUnlessNo, joined, run_command
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.workers.errors import InputError, JobError, SupersededError, UsageError


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    share: OnUnlessNo = True
    """Do not share."""

    repeats: int = 3
    """How often."""


def test_a_switch_that_is_turned_off_says_no_default_in_its_help(capsys):
    taken = []

    def run(options):
        taken.append(options)
        return COMPLETE

    assert run_command("x", Options, run, []) == run_command("x", Options, run, ["--no-share"]) == COMPLETE
    assert [o.share for o in taken] == [True, False]
    assert run_command("x", Options, run, ["--help"]) == COMPLETE
    text = capsys.readouterr().out
    assert "--no-share" in text
    assert "(default: 3)" in text
    assert "True" not in text
    assert run_command("x", Options, run, ["--share"]) == USAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [(JobError, ERROR), (SupersededError, SUPERSEDED), (InputError, ERROR), (UsageError, USAGE)],
)
def test_an_error_is_a_message_and_an_exit_code(capsys, error, code):
    def run(options):
        raise error("what is wrong, and what to do")

    assert run_command("x", Options, run, []) == code
    assert capsys.readouterr().err == "millijoule x: what is wrong, and what to do\n"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--lora a b=0.5 --seed 3", "--lora a b=0.5 --seed 3"),
        ("--lora a --seed 3 --lora b=0.5", "--lora a b=0.5 --seed 3"),
        ("--lora=a=0.5 --quiet --lora=b", "--lora a=0.5 b --quiet"),
        ("--prompts a --lora x --prompts b c --output o", "--prompts a b c --lora x --output o"),
        ("--seed 1 --seed 2", "--seed 1 --seed 2"),
        ("out --help", "out --help"),
        ("", ""),
    ],
)
def test_an_option_of_several_values_may_be_given_several_times(given, read):
    assert joined(given.split(), GenerateOptions) == read.split()
