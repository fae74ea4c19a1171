"""A device that draws other pixels than it should, all finite and of the right shape: who sees it?

No storm has this fault, since the product has nothing to hold an image against. These runs say what is seen, and by whom.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.chaos.faults import WRONG_PIXELS, Fault, Round, Storm, job_of
from support.chaos.runs import run_in_child

#: Two hosts of a board each: one of them is sick.
SHAPE = 1
#: What the oracle says of each such image: of its hash, and of its pixels.
_OF_HASH, _OF_PIXELS = "is not the image of an undisturbed run", "has other pixels than its prompt and seed"


def run(seed: int, folder: Path, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """One job with one sick device. `product_says`: everything but the oracle's word on images."""
    faults = (Fault(WRONG_PIXELS, random.Random(seed).uniform(0.0, 0.4)),)
    where = folder / f"pixels-{seed}"
    result = run_in_child(
        Storm(seed, SHAPE, job_of(SHAPE, seed), (Round(faults=faults),)), where, undisturbed
    )
    shutil.rmtree(where, ignore_errors=True)
    if result["outcome"] == "unfinished":
        return result
    problems = result.pop("problems")
    return {
        **result,
        "oracle_says_other_hash": sum(_OF_HASH in p for p in problems),
        "oracle_says_other_pixels": sum(_OF_PIXELS in p for p in problems),
        "product_says": [p for p in problems if _OF_HASH not in p and _OF_PIXELS not in p],
        "problems": [],
    }


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    results = [r for r in results if r["outcome"] != "unfinished"]
    return {
        "runs": len(results),
        "injected": sum(len(r["faults"]) for r in results),
        "images_with_other_pixels": sum(r["oracle_says_other_pixels"] for r in results),
        "runs_in_which_the_product_says_anything": sum(
            bool(r["product_says"]) or r["codes"] != [0] for r in results
        ),
    }
