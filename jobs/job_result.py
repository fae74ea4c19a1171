"""What `generate` returns: how far a job got, what it used, and where its results are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from millijoule.workers.layout import ENERGY_PREFIX, MANIFEST_KEY, STATS_KEY


@dataclass(frozen=True)
class JobResult:
    """How a job ended, or how far it got.

    Attributes:
        status: "complete"; "complete_with_quarantined": every image is there but for rows that no worker could draw, or that
            were rejected; "cap_reached" and "interrupted": the same call goes on where this one ended; "superseded": another
            run has taken the job over, and goes on; "planned": a dry run.
        output: the output folder or URL.
        images: images there are. Until the job is complete: of finished shards, those that are no images included.
        images_quarantined: images that could not be drawn. Until the job is complete: those of this run.
        images_filtered: images that the model's own safety checker hid, of which there are no files. Until the job is
            complete: those of this run. They change neither status nor exit code: the model did what it does with them.
        images_with_warnings: images of which the model said something, such as words it did not read; None until the job is
            complete. `totals["warning_kinds"]` counts them by kind.
        rows_rejected: input rows that are no prompts; `bad_rows.parquet` says why.
        shards_left: shards neither finished nor given up.
        seconds: this call took.
        reason: why a job that is not complete ended, in words.
        total_mj: millijoules of the whole job, earlier runs, loading, idling and waste included. This and the next two are
            None where any part is missing, and until the job is complete.
        joules_per_image: of the shards that were kept.
        full_joules_per_image: of the whole job.
        evidence_class: what the energy figures are worth (docs/energy-tables.md); None until the job is complete.
        totals: the content of `stats.json`; None until the job is complete.
    """

    status: Literal[
        "complete", "complete_with_quarantined", "cap_reached", "interrupted", "superseded", "planned"
    ]
    output: str
    images: int
    images_quarantined: int
    rows_rejected: int
    shards_left: int
    seconds: float
    reason: str = ""
    total_mj: int | None = None
    joules_per_image: float | None = None
    full_joules_per_image: float | None = None
    evidence_class: str | None = None
    totals: Mapping[str, Any] | None = field(default=None, repr=False)
    images_filtered: int = 0
    images_with_warnings: int | None = None

    @staticmethod
    def of_complete(output: str, totals: Mapping[str, Any], seconds: float) -> JobResult:
        """The result of a job whose `stats.json` holds `totals`."""
        quarantined, rejected = totals["images_quarantined"], totals["input_rows_rejected"]
        return JobResult(
            status="complete_with_quarantined" if quarantined or rejected else "complete",
            output=output,
            images=totals["images_ok"],
            images_quarantined=quarantined,
            rows_rejected=rejected,
            shards_left=0,
            seconds=seconds,
            total_mj=totals["energy"]["total_mj"],
            joules_per_image=_joules(totals["direct_mj_per_image"]),
            full_joules_per_image=_joules(totals["full_mj_per_image"]),
            evidence_class=totals["evidence_class"],
            totals=totals,
            images_filtered=totals["images_filtered"],
            images_with_warnings=totals["images_with_warnings"],
        )

    @property
    def manifest(self) -> str | None:
        """Where the table of all images is; None until the job is complete."""
        return self._url(MANIFEST_KEY)

    @property
    def stats(self) -> str | None:
        """Where the totals are, as JSON; None until the job is complete."""
        return self._url(STATS_KEY)

    @property
    def energy_tables(self) -> str | None:
        """The folder of the energy tables; None until the job is complete."""
        return self._url(ENERGY_PREFIX)

    def _url(self, key: str) -> str | None:
        return f"{self.output.rstrip('/')}/{key}" if self.totals else None


def _joules(mj: float | None) -> float | None:
    return None if mj is None else mj / 1000
