"""`python -m millijoule.jobs.node_agent`: drains this machine's Ray nodes when its cloud says that it is taken away.

One runs per machine, or beside Ray in each of its pods: a sidecar, a DaemonSet or a systemd unit. Workers on a draining node
finish their batch, seal what they have and hand the rest back, so that a preemption costs no work where the notice is long enough.
"""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from millijoule.jobs.entry import COMPLETE, ERROR, run_command
from millijoule.workers.errors import UsageError
from millijoule.workers.notices.agent import NodeAgent
from millijoule.workers.notices.metadata import ENDPOINT, MetadataError, MetadataService
from millijoule.workers.notices.notice import NoticeSource
from millijoule.workers.notices.providers import SOURCES, detect_provider
from millijoule.workers.notices.ray_nodes import RayNodes, nodes_here

#: `--once` found a notice, and the nodes are draining.
NOTICE = 6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeAgentOptions:
    """Drain this machine's Ray nodes before its cloud takes it away.

    Watches what the cloud says: AWS (spot instance-action, rebalance recommendation, Auto Scaling lifecycle), GCP (preempted,
    maintenance-event), Azure (Scheduled Events, which it acknowledges once the nodes have ended); and SIGTERM. Runs until it is
    told to end. Exit codes: 0 ended as told; 1 a node could not be drained; 2 usage; with --once: 0 no notice stands, 6 one
    stands and the nodes are draining, 1 the metadata service or Ray does not answer, or no node is this machine's.
    """

    provider: Literal["auto", "aws", "gcp", "azure", "none"] = "auto"
    """Whose notices to watch; none: SIGTERM alone."""

    endpoint: Annotated[str, tyro.conf.arg(metavar="URL")] = ENDPOINT
    """Where the metadata service is."""

    period: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 5.0
    """Between two looks; where the service can wait for a change, how long each waits."""

    ray_address: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = "auto"
    """The head; auto: from RAY_ADDRESS, or the Ray on this machine."""

    node_address: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IP ...")] = ()
    """Ray nodes at these addresses are this machine's; without it those at addresses of its own."""

    node_label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Ray nodes with all these labels are this machine's, wherever they are: for an agent that shares no network with them."""

    notice: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 120.0
    """How soon the end is taken to come where a notice does not say."""

    rebalance: Literal["log", "drain"] = "log"
    """What to do on an AWS rebalance recommendation, which often comes to nothing."""

    on_sigterm: Literal["drain", "exit"] = "drain"
    """What a SIGTERM means: its pod or machine ends (drain), or only the agent is replaced (exit), as in a DaemonSet's roll-out."""

    grace: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 30.0
    """From a SIGTERM to the kill, which is the pod's terminationGracePeriodSeconds."""

    once: bool = False
    """Look once, drain if a notice stands, and end."""


def run(options: NodeAgentOptions) -> int:
    labels = _check(options)
    service = MetadataService(options.endpoint)
    provider = _provider(options, service)
    if options.once and provider is None:
        raise MetadataError(
            f"no metadata service answers at {options.endpoint}; name the cloud with --provider"
        )
    sources = SOURCES[provider](service) if provider is not None and provider in SOURCES else ()
    agent = NodeAgent(
        sources,
        RayNodes(options.ray_address),
        lambda nodes: nodes_here(nodes, options.node_address, labels),
        notice_s=options.notice,
        heeds_advice=options.rebalance == "drain",
        period_s=options.period,
        find_sources=(lambda: _found(service)) if provider is None else None,
    )
    if options.once:
        return COMPLETE if agent.once() is None else NOTICE
    grace_s = options.grace if options.on_sigterm == "drain" else None
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: agent.terminate(grace_s))
    watched = ", ".join(["SIGTERM", *(source.name for source in sources)])
    log.info("node agent: provider %s, watching %s", provider or "not found yet", watched)
    return COMPLETE if agent.run() else ERROR


def _check(options: NodeAgentOptions) -> dict[str, str]:
    """The labels asked for; raises InputError."""
    if not options.endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint {options.endpoint}: an http:// URL")
    for name in ("period", "notice", "grace"):
        if not 0 < getattr(options, name) < 86_400:
            raise UsageError(f"--{name} {getattr(options, name):g}: seconds, more than 0 and less than a day")
    labels = dict(label.partition("=")[::2] for label in options.node_label)
    if not all(labels) or not all(labels.values()):
        raise UsageError(f"--node-label {' '.join(options.node_label)}: each as NAME=VALUE")
    return labels


def _provider(options: NodeAgentOptions, service: MetadataService) -> str | None:
    """The cloud's name; None: it is to be found, and has not answered."""
    if options.provider != "auto":
        return options.provider
    found = detect_provider(service)
    if found is None and not options.once:
        log.warning(
            "no metadata service answers at %s; asking on. Name the cloud with --provider, or none",
            options.endpoint,
        )
    return found


def _found(service: MetadataService) -> tuple[NoticeSource, ...]:
    provider = detect_provider(service)
    return () if provider is None else SOURCES[provider](service)


def main(argv: list[str] | None = None) -> int:
    return run_command("node-agent", NodeAgentOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
