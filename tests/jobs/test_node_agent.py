"""The node agent's command line where nothing answers."""

import pytest
from support.cluster import free_port

from millijoule.jobs.node_agent import main


@pytest.mark.parametrize("provider", ["auto", "aws", "gcp", "azure"])
def test_a_look_at_a_service_that_is_not_there_is_no_look_without_a_notice(provider, capsys):
    endpoint = f"http://127.0.0.1:{free_port()}"
    assert main(["--once", "--provider", provider, "--endpoint", endpoint]) == 1
    assert endpoint in capsys.readouterr().err
