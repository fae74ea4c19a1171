"""`millijoule report` over outputs of many shards, side by side: the product's own, on what `closing_load` closed."""

from __future__ import annotations

import io
import logging
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from millijoule.jobs.measuring.process import peak_mb


def report_on(*outputs: str) -> dict[str, Any]:
    """Seconds, memory and size of one page over `outputs`, folders of finished jobs."""
    from millijoule.jobs.report import ReportOptions, run

    page = Path(outputs[0], "report.html")
    product = logging.getLogger("millijoule")
    before = product.level
    product.setLevel(logging.ERROR)  # there are no pictures, which it says of each
    cpu, began = time.process_time(), time.monotonic()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run(ReportOptions(outputs=outputs, html=str(page)))
    finally:
        product.setLevel(before)
    return {
        "outputs": len(outputs),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mb": round(peak_mb()),
        "page_mb": round(page.stat().st_size / 1e6, 2),
    }
