"""Google Compute Engine: a request waits at the metadata server until the value changes (`wait_for_change`).

Sources: Compute Engine documentation, "Preemptible VM instances" (`instance/preempted`, about 30 seconds before the end) and
"Monitor and plan for a host maintenance event" (`instance/maintenance-event`).
"""

from __future__ import annotations

from urllib.parse import urlencode

from millijoule.workers.notices.metadata import TIMEOUT_S, MetadataError, MetadataService
from millijoule.workers.notices.notice import Notice, NoticeSource

PREEMPTED_PATH = "/computeMetadata/v1/instance/preempted"
MAINTENANCE_PATH = "/computeMetadata/v1/instance/maintenance-event"
FLAVOR = "Metadata-Flavor"
HEADERS = {FLAVOR: "Google"}
#: From the notice to the end, by Google's documentation.
PREEMPTED_WITHIN_S = 30.0
MAINTENANCE_WITHIN_S = 3600.0


class GcpValue:
    """A value of the metadata server that means an end when it is `ends`."""

    def __init__(self, service: MetadataService, path: str, ends: str, within_s: float) -> None:
        self.service = service
        self.name = path.rpartition("/")[2]
        self._path = path
        self._ends = ends
        self._within_s = within_s
        self._etag = ""

    def look(self, wait_s: float) -> Notice | None:
        """The first look answers at once, later ones when the value has changed since, or after `wait_s`."""
        path, timeout_s = self._path, TIMEOUT_S
        if self._etag and wait_s >= 1:
            timeout_s += wait_s
            asked = {"wait_for_change": "true", "last_etag": self._etag, "timeout_sec": int(wait_s)}
            path += "?" + urlencode(asked)
        answer = self.service.ask(path, HEADERS, timeout_s=timeout_s)
        if answer is None:
            return None
        value, headers = answer
        if headers.get(FLAVOR) != "Google":
            raise MetadataError(f"{path}: whoever answers is not Google's metadata server")
        self._etag = headers.get("ETag", "")
        if value.strip() != self._ends:
            return None
        return Notice(f"GCP: {self.name} {self._ends}", within_s=self._within_s)

    def acknowledge(self, notice: Notice) -> None:
        """Nobody waits for it."""


def gcp_sources(service: MetadataService) -> tuple[NoticeSource, ...]:
    """All that Compute Engine says. A live migration ends nothing."""
    return (
        GcpValue(service, PREEMPTED_PATH, "TRUE", PREEMPTED_WITHIN_S),
        GcpValue(service, MAINTENANCE_PATH, "TERMINATE_ON_HOST_MAINTENANCE", MAINTENANCE_WITHIN_S),
    )
