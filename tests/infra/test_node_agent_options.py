"""Whatever starts the node agent gives it options that it has."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support.manifests.documents import ROOT

agent = pytest.importorskip("millijoule.jobs.node_agent", reason="there is no node agent in this tree")

STARTERS = [
    "infra/kubernetes/components/node-agent/daemonset.yaml",
    "infra/systemd/millijoule-node-agent.service",
    "infra/cluster-launcher/aws.yaml",
    "infra/cluster-launcher/gcp.yaml",
]


@pytest.mark.parametrize("file", STARTERS)
def test_the_agent_has_the_options_it_is_given(file):
    text = (ROOT / file).read_text()
    lines = [line for line in text.splitlines() if "node_agent " in line or line.strip().startswith("- --")]
    given = {name.replace("-", "_") for name in re.findall(r"\s--([a-z][a-z-]*)", "\n".join(lines))}
    known = {field.name for field in dataclasses.fields(agent.NodeAgentOptions)}
    assert given
    assert given <= known
