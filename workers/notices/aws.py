"""Amazon EC2: instance metadata service, version 2 (a session token first, in every request).

Sources: EC2 user guide, "Spot Instance interruption notices" (two minutes before, `spot/instance-action`), "EC2 instance
rebalance recommendations" (`events/recommendations/rebalance`, earlier, without a time), and Auto Scaling user guide, "Retrieve
the target lifecycle state" (`autoscaling/target-lifecycle-state`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from millijoule.workers.notices.metadata import MetadataError, MetadataService, as_object
from millijoule.workers.notices.notice import Notice, NoticeSource, unix_seconds

TOKEN_PATH = "/latest/api/token"
ACTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
LIFECYCLE_PATH = "/latest/meta-data/autoscaling/target-lifecycle-state"
#: A token lives so long, in seconds, and is renewed in the last minute.
TOKEN_LIFE_S = 21_600
RENEW_BEFORE_S = 60.0


class AwsSession:
    """The token of one machine, for all that is asked of it."""

    def __init__(self, service: MetadataService, clock: Callable[[], float] = time.monotonic) -> None:
        self.service = service
        self._clock = clock
        self._token = ""
        self._until = 0.0

    def get(self, path: str) -> str | None:
        """The text at `path`, None where there is none; with a new token where the old one is no longer taken."""
        try:
            answer = self.service.ask(path, self._headers())
        except MetadataError as error:
            if error.status != 401:
                raise
            self._until = 0.0
            answer = self.service.ask(path, self._headers())
        return None if answer is None else answer[0]

    def _headers(self) -> dict[str, str]:
        if self._clock() >= self._until:
            asked = self._clock()
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE_S)}
            answer = self.service.ask(TOKEN_PATH, life, method="PUT")
            if answer is None:
                raise MetadataError(
                    f"{TOKEN_PATH}: not found; is this EC2, with its metadata service on?", 404
                )
            self._token, self._until = answer[0], asked + TOKEN_LIFE_S - RENEW_BEFORE_S
        return {"X-aws-ec2-metadata-token": self._token}


class _AwsSource:
    def __init__(self, session: AwsSession) -> None:
        self.session = session

    def acknowledge(self, notice: Notice) -> None:
        """Nobody waits for it."""


class SpotAction(_AwsSource):
    """The instance is stopped, hibernated or terminated at the time stated."""

    name = "spot/instance-action"

    def look(self, wait_s: float) -> Notice | None:
        text = self.session.get(ACTION_PATH)
        if text is None:
            return None
        said = as_object(text, ACTION_PATH)
        if not isinstance(action := said.get("action"), str):
            raise MetadataError(f"{ACTION_PATH}: no action: {text[:100]!r}")
        return Notice(f"AWS spot: {action}", unix_seconds(str(said.get("time"))))


class Rebalance(_AwsSource):
    """The instance is likelier than others to be interrupted: a recommendation, which sets no time."""

    name = "rebalance recommendation"

    def look(self, wait_s: float) -> Notice | None:
        text = self.session.get(REBALANCE_PATH)
        if text is None:
            return None
        noticed = as_object(text, REBALANCE_PATH).get("noticeTime")
        if not isinstance(noticed, str):
            raise MetadataError(f"{REBALANCE_PATH}: no noticeTime: {text[:100]!r}")
        return Notice(f"AWS rebalance recommendation of {noticed}", is_advice=True)


class Lifecycle(_AwsSource):
    """The Auto Scaling group is about to end the instance."""

    name = "autoscaling lifecycle"

    def look(self, wait_s: float) -> Notice | None:
        state = (self.session.get(LIFECYCLE_PATH) or "").strip()
        return Notice(f"AWS Auto Scaling: target lifecycle state {state}") if state == "Terminated" else None


def aws_sources(service: MetadataService) -> tuple[NoticeSource, ...]:
    """All that EC2 says."""
    session = AwsSession(service)
    return SpotAction(session), Rebalance(session), Lifecycle(session)
