"""The address of an OpenTelemetry collector, and the library that sends to it: both optional, both checked before Ray starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from millijoule.workers.errors import InputError

if TYPE_CHECKING:
    from millijoule.pipeline.output.job import JobSpec
    from millijoule.pipeline.running.run import JobRun

OPTION = "--otlp"
PATH = "v1/metrics"


def check_endpoint(url: str) -> str:
    """The address that metrics are sent to, of a collector's address.

    Raises:
        InputError: it is none, it carries a secret, or the library is not installed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError(f"{OPTION} {url!r}: not an address such as http://collector:4318") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"{OPTION}: the address carries a login or a query, and everybody can read the arguments of a process: give "
            "http(s)://host:port alone, and headers in OTEL_EXPORTER_OTLP_HEADERS"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError(f"{OPTION} {url}: not an address such as http://collector:4318")
    _check_library()
    base = url.rstrip("/")
    return base if base.endswith(f"/{PATH}") else f"{base}/{PATH}"


def _check_library() -> None:
    """Raise InputError where the exporter is not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.metric_exporter
        import opentelemetry.sdk.metrics.export  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise InputError(f"{OPTION} needs the exporter: pip install 'millijoule[otel]'") from error


@contextmanager
def exported(endpoint: str | None, job: JobSpec, run: JobRun) -> Iterator[Callable[[], None]]:
    """Send the figures of `run` to `endpoint` for the length of a `with` block; call what it yields from the run.

    None: nothing is sent.
    """
    if endpoint is None:
        yield lambda: None
        return
    from millijoule.pipeline.telemetry.open_telemetry import OpenTelemetryMetrics

    metrics = OpenTelemetryMetrics(endpoint, job, run)
    try:
        yield metrics.tick
    finally:
        metrics.close()
