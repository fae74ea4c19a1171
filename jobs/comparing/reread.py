"""Read the images of a bundle again with the packaged verifier, and compare with the readings and features it states.

The reference features are of true renders, which are not in a bundle: they are not made again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from millijoule.pipeline.comparison.acceptance import parse_icons
from millijoule.pipeline.comparison.registration import ARMS, Registration
from millijoule.pipeline.comparison.result import index_images
from millijoule.pipeline.comparison.rows import Rows, decode_pixels
from millijoule.workers.judging.image_judge import ICON_JUDGE, ImageJudge, load_judge

#: Images read at once.
BATCH = 256
#: Pixels by which a second reading of the same image may differ: another processor rounds differently.
REREAD_PIXELS = 0.05
#: The same for features, as a share of their largest value.
REREAD_FEATURES = 1e-3


def reread_images(registration: Registration, rows: Rows) -> Iterator[str]:
    """Yield every image of a bundle, whose pixels are in it, that the packaged verifier reads otherwise."""
    if registration.gate.rule != ICON_JUDGE or rows.pixels is None:
        yield "the images cannot be judged again: their judge is not the packaged verifier"
        return
    judge = load_judge(ICON_JUDGE, registration.gate.nouns)
    if judge.sha256 != registration.gate.judge_sha256:
        yield f"the packaged verifier {judge.sha256} is not the registered judge"
        return
    pixels = decode_pixels(rows.pixels)
    judged = rows.judgements.to_pylist()
    for start in range(0, len(judged), BATCH):
        chunk = judged[start : start + BATCH]
        requests = [registration.requests[row["request"]] for row in chunk]
        again = judge.judge(
            np.stack([pixels[row["sha256"]] for row in chunk]),
            [r.prompt for r in requests],
            [r.family for r in requests],
        )
        for row, judgement in zip(chunk, again, strict=True):
            stated, found = parse_icons(row["icons"]), parse_icons(judgement.icons or "[]")
            same = len(stated) == len(found) and all(
                a[:3] == b[:3] and max(abs(a[3] - b[3]), abs(a[4] - b[4])) <= REREAD_PIXELS
                for a, b in zip(stated, found, strict=True)
            )
            if not same:
                yield f"judgements.parquet: image {row['sha256'][:12]}: the verifier reads {judgement.icons}"
    yield from _compare_features(registration, rows, judge, pixels)


def _compare_features(
    registration: Registration, rows: Rows, judge: ImageJudge, pixels: Mapping[str, np.ndarray]
) -> Iterator[str]:
    images = index_images(registration, rows)
    for arm in ARMS:
        stated = {r["request"]: r["values"] for r in rows.features.to_pylist() if r["arm"] == arm}
        digests = [images.pairs[p][1] for p in images.first[arm]]
        for start in range(0, len(digests), BATCH):
            found = judge.features(np.stack([pixels[d] for d in digests[start : start + BATCH]]))
            limit = REREAD_FEATURES * np.abs(found).max()
            for request, values in enumerate(found, start):
                other = np.array(stated[request], dtype=np.float64)
                if other.shape != values.shape or not (np.abs(other - values) <= limit).all():
                    yield f"features.parquet: arm {arm}, request {request}: the verifier has other features"
