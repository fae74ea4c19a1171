"""Requests to a machine's metadata service: plain HTTP to a link-local address, never through a proxy, never redirected."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from millijoule.workers.errors import MillijouleError

#: Where AWS, GCP and Azure have it.
ENDPOINT = "http://169.254.169.254"
#: An answer that takes longer is none; it comes from the machine's own host.
TIMEOUT_S = 5.0
#: The longest answer that is read.
MOST_BYTES = 1 << 20


class MetadataError(MillijouleError):
    """The metadata service does not answer as it should; `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class MetadataService:
    """One machine's service at `endpoint`, such as `ENDPOINT`."""

    def __init__(self, endpoint: str = ENDPOINT) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def ask(
        self,
        path: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        body: bytes | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[str, Mapping[str, str]] | None:
        """The answer's text and headers; None where there is nothing at `path` (404).

        Raises:
            MetadataError: any other status than 200, or no answer.
        """
        request = urllib.request.Request(
            self.endpoint + path, data=body, headers=dict(headers), method=method
        )
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                return answer.read(MOST_BYTES).decode("utf-8", "replace"), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise MetadataError(f"{self.endpoint}{path}: HTTP {error.code}", error.code) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a token is no header
            raise MetadataError(f"{self.endpoint}{path}: {error}") from error


def as_object(text: str, path: str) -> dict[str, Any]:
    """A JSON object; raises MetadataError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{path}: not JSON: {text[:100]!r}") from error
    if not isinstance(value, dict):
        raise MetadataError(f"{path}: not an object: {text[:100]!r}")
    return value
