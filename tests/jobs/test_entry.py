"""What every command does with its command line."""

from dataclasses import dataclass

from millijoule.jobs.entry import COMPLETE, USAGE, OnUnlessNo, run_command


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
