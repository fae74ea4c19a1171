"""What a cloud says before it takes a machine away, in one form for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol


@dataclass(frozen=True)
class Notice:
    """The machine is to end.

    Attributes:
        reason: in words, with the provider's own name for it.
        deadline: Unix seconds at which it may end; None: the provider does not say.
        within_s: the provider says how soon instead, in seconds.
        is_advice: it may never come to it.
        event_id: the provider's name for the event, where it wants to be told that the machine is ready for it.
    """

    reason: str
    deadline: float | None = None
    within_s: float | None = None
    is_advice: bool = False
    event_id: str = ""


class NoticeSource(Protocol):
    """One place where a provider says it. `name` is for log lines."""

    name: str

    def look(self, wait_s: float) -> Notice | None:
        """The notice that stands there, or None; may wait for one up to `wait_s`.

        Raises:
            MetadataError: the place does not answer as it should; to be asked again.
        """
        ...

    def acknowledge(self, notice: Notice) -> None:
        """The machine is ready for it: nobody needs to wait until its deadline. Raises MetadataError."""
        ...


def unix_seconds(text: str) -> float | None:
    """A provider's time, ISO 8601 or as in HTTP headers; UTC where it names no zone. None: it is none."""
    text = text.strip()
    for parse in (lambda t: datetime.fromisoformat(t.replace("Z", "+00:00")), parsedate_to_datetime):
        try:
            when = parse(text)
        except (ValueError, TypeError):
            continue
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return None
