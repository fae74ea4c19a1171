"""Which cloud a machine is in, and what there is to be watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from millijoule.workers.notices import aws, azure, gcp
from millijoule.workers.notices.metadata import MetadataError, MetadataService
from millijoule.workers.notices.notice import NoticeSource

#: Somebody who is not there is not waited for longer.
DETECT_TIMEOUT_S = 2.0

SOURCES: Mapping[str, Callable[[MetadataService], tuple[NoticeSource, ...]]] = {
    "aws": aws.aws_sources,
    "gcp": gcp.gcp_sources,
    "azure": azure.azure_sources,
}


def detect_provider(service: MetadataService) -> str | None:
    """The provider whose metadata service answers, by a request that the others refuse; None: none does."""
    life = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    asked = (
        ("gcp", "/computeMetadata/v1/instance/", "GET", gcp.HEADERS, True),
        ("azure", azure.NAME_PATH, "GET", azure.HEADERS, False),
        ("aws", aws.TOKEN_PATH, "PUT", life, False),
    )
    for name, path, method, headers, signed in asked:
        try:
            answer = service.ask(path, headers, method=method, timeout_s=DETECT_TIMEOUT_S)
        except MetadataError:
            continue
        if answer is not None and (not signed or answer[1].get(gcp.FLAVOR) == "Google"):
            return name
    return None
