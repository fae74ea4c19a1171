"""What a failed S3 request says, and how long it is repeated.

Servers disagree about the exception a refused conditional write raises; only the HTTP status and the error code of the
answer count here.
"""

from __future__ import annotations

import logging
import random
import time

from aiohttp import ClientError as HTTPClientProblem
from botocore.exceptions import BotoCoreError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection
from botocore.parsers import ResponseParserError

from millijoule.workers.errors import NotFoundError, StoreError
from millijoule.workers.storage.trouble import note_failure

logger = logging.getLogger(__name__)

#: Wait before repeat n is half to all of min(BACKOFF_FIRST_S * 2**n, BACKOFF_MAX_S).
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 8.0
#: Of the repeats of one request, the first few are logged, then one in so many: a minute of them.
FIRST_TRIES_LOGGED = 6
LATER_TRIES_LOGGED = 10

_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
    *("InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),  # damaged on the way
}
_NO_ANSWER = (
    *(HTTPClientError, NoConnection, ResponseParserError),  # botocore
    *(HTTPClientProblem, TimeoutError, ConnectionError),  # aiohttp and the system
)

_FULL_ADVICE = "the store is full or its quota is used up: free space or choose another output"
_LOGIN_ADVICE = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role"
_PERMISSION_ADVICE = (
    "check the credentials (AWS_ACCESS_KEY_ID, ...) and their permission to read, write and list"
)
_REGION_ADVICE = "the bucket is in another region: set AWS_REGION"
_ADVICE_BY_CODE = {
    "NoSuchBucket": "create the bucket, or correct its name or the endpoint (AWS_ENDPOINT_URL)",
    "QuotaExceeded": _FULL_ADVICE,
    "XMinioStorageFull": _FULL_ADVICE,
    "XMinioAdminBucketQuotaExceeded": _FULL_ADVICE,
    "InsufficientCapacity": _FULL_ADVICE,
    "NoCredentialsError": _LOGIN_ADVICE,
    "PartialCredentialsError": _LOGIN_ADVICE,
    "RequestTimeTooSkewed": "correct this machine's clock",
    "AuthorizationHeaderMalformed": _REGION_ADVICE,
}
_ADVICE_BY_STATUS = {
    301: _REGION_ADVICE,
    307: _REGION_ADVICE,
    401: _PERMISSION_ADVICE,
    403: _PERMISSION_ADVICE,
    501: "this server does not support the request",
    507: _FULL_ADVICE,
}


class S3Failure(Exception):
    """One failed request: `status` is the HTTP status, None when no answer came; `code` the server's error code."""

    def __init__(self, status: int | None, code: str, detail: str, *, transient: bool) -> None:
        super().__init__(f"{status or 'no answer'} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.transient = transient

    @property
    def refused_because_present(self) -> bool:
        return self.status == 412 or self.code == "PreconditionFailed"

    @property
    def not_found(self) -> bool:
        return self.code in ("NoSuchKey", "404", "NotFound", "NoSuchUpload")

    def as_store_error(self, action: str, url: str, endpoint: str | None) -> StoreError:
        """The same failure for a person: place, server's words, next step."""
        if self.not_found:
            return NotFoundError(f"{url} does not exist")
        where = f"cannot {action} {url}" + (f" at {endpoint}" if endpoint else "")
        said = f"{self.status} {self.code}" if self.status else self.code
        if self.detail and self.detail != self.code:
            said += f" ({self.detail})"
        advice = "see the server's log"
        if self.status is None:  # the client's own: no server was asked
            advice = "check the settings of S3 on this machine (AWS_REGION, AWS_PROFILE, other AWS_* variables, ~/.aws)"
        if self.transient:
            advice = "the server is overloaded or failing; try again later"
            if self.status is None:
                advice = "check the endpoint (AWS_ENDPOINT_URL) and the network, then try again"
        advice = _ADVICE_BY_STATUS.get(self.status or 0, advice)
        advice = _ADVICE_BY_CODE.get(self.code, advice)
        return StoreError(f"{where}: {said}; {advice}", transient=self.transient)


def failure_of(error: Exception) -> S3Failure | None:
    """What an exception of s3fs says about its request; None where it is not about one."""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            answer = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(answer.get("Code") or status or "unknown")
            transient = status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
            return S3Failure(status, code, str(answer.get("Message") or ""), transient=transient)
        link = link.__cause__
    if isinstance(error, FileExistsError):
        return S3Failure(412, "PreconditionFailed", str(error), transient=False)
    if isinstance(error, FileNotFoundError):
        return S3Failure(404, "NoSuchKey", str(error), transient=False)
    kind = type(error).__name__
    if isinstance(error, _NO_ANSWER):
        return S3Failure(None, kind, str(error), transient=True)
    if isinstance(error, (BotoCoreError, OSError)):
        return S3Failure(None, kind, str(error), transient=False)
    return None


class Backoff:
    """The waits between the tries of one operation: growing, jittered, and over after `limit_s` seconds."""

    def __init__(self, what: str, limit_s: float) -> None:
        self._what = what
        self._deadline = time.monotonic() + limit_s
        self._tries = 0

    def wait(self, failure: S3Failure) -> bool:
        """Sleep before the next try and return True; False when the time is up."""
        pause = min(BACKOFF_FIRST_S * 2**self._tries, BACKOFF_MAX_S) * random.uniform(0.5, 1.0)
        self._tries += 1
        if time.monotonic() + pause > self._deadline:
            return False
        note_failure()
        if self._tries <= FIRST_TRIES_LOGGED or self._tries % LATER_TRIES_LOGGED == 0:
            logger.warning(
                "%s failed (%s); try %d follows in %.1f s", self._what, failure, self._tries + 1, pause
            )
        time.sleep(pause)
        return True
