"""The node agent's command line where nothing answers."""

import re

import pytest
from support.cluster import free_port
from support.manifests.documents import ROOT

from millijoule.jobs.node_agent import main


@pytest.mark.parametrize("provider", ["auto", "aws", "gcp", "azure"])
def test_a_look_at_a_service_that_is_not_there_is_no_look_without_a_notice(provider, capsys):
    endpoint = f"http://127.0.0.1:{free_port()}"
    assert main(["--once", "--provider", provider, "--endpoint", endpoint]) == 1
    assert endpoint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--period", "0"],
        ["--grace", "-5"],
        ["--notice", "many"],
        ["--endpoint", "here"],
        ["--node-label", "a"],
        ["--perod", "5"],
    ],
)
def test_a_command_line_that_nothing_will_mend_ends_with_the_code_that_systemd_does_not_start_again(
    words, capsys
):
    unit = (ROOT / "infra/systemd/millijoule-node-agent.service").read_text()
    assert main([*words, "--provider", "none"]) == int(
        re.search(r"^RestartPreventExitStatus=(\d+)$", unit, re.MULTILINE)[1]
    )
    assert words[0] in capsys.readouterr().err
