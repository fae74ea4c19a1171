"""Azure: Scheduled Events, of all machines of a scale set or availability set, of which only this one's count here.

Source: Azure documentation, "Azure Metadata Service: Scheduled Events for Linux VMs". An event begins at `NotBefore`, or when
every machine it names has acknowledged it.
"""

from __future__ import annotations

import json

from millijoule.workers.notices.metadata import TIMEOUT_S, MetadataError, MetadataService, as_object
from millijoule.workers.notices.notice import Notice, NoticeSource, unix_seconds

EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
HEADERS = {"Metadata": "true"}
#: Events after which processes of this machine no longer run. A freeze is a pause of seconds.
ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
#: The first request switches the service on, which takes up to two minutes.
FIRST_TIMEOUT_S = 120.0


class ScheduledEvents:
    """The events of this machine, the earliest first."""

    name = "scheduled events"

    def __init__(self, service: MetadataService) -> None:
        self.service = service
        self._machine: str | None = None
        self._is_on = False

    def look(self, wait_s: float) -> Notice | None:
        if self._machine is None:
            answer = self.service.ask(NAME_PATH, HEADERS)
            if answer is None:
                raise MetadataError(f"{NAME_PATH}: not found", 404)
            self._machine = answer[0].strip()
        timeout_s = TIMEOUT_S if self._is_on else FIRST_TIMEOUT_S
        answer = self.service.ask(EVENTS_PATH, HEADERS, timeout_s=timeout_s)
        if answer is None:
            return None
        self._is_on = True
        events = as_object(answer[0], EVENTS_PATH).get("Events") or []
        if not isinstance(events, list):
            raise MetadataError(f"{EVENTS_PATH}: no list of events: {answer[0][:100]!r}")
        notices = [n for event in events if isinstance(event, dict) and (n := self._notice(event))]
        return min(notices, key=lambda n: n.deadline or 0.0, default=None)

    def _notice(self, event: dict) -> Notice | None:
        kind, machines = event.get("EventType"), event.get("Resources") or []
        if kind not in ENDS or not isinstance(machines, list) or self._machine not in machines:
            return None
        # blank once it has begun: what is left then is not known
        deadline = unix_seconds(str(event.get("NotBefore") or ""))
        return Notice(f"Azure: {kind}", deadline, event_id=str(event.get("EventId")))

    def acknowledge(self, notice: Notice) -> None:
        """This machine is ready: as far as it is concerned the event may begin."""
        body = json.dumps({"StartRequests": [{"EventId": notice.event_id}]}).encode()
        headers = {**HEADERS, "Content-Type": "application/json"}
        self.service.ask(EVENTS_PATH, headers, method="POST", body=body)


def azure_sources(service: MetadataService) -> tuple[NoticeSource, ...]:
    """All that Azure says."""
    return (ScheduledEvents(service),)
