"""On a job's PYTHONPATH: its processes read processor counters from MILLIJOULE_TEST_POWERCAP, and share books of their own.

Python imports this by itself at start, before anything can ask where the counters are.
"""

import os
from pathlib import Path

if root := os.environ.get("MILLIJOULE_TEST_POWERCAP"):
    from millijoule.workers.meters import counter_book, rapl

    rapl.POWERCAP_ROOT = Path(root)
    counter_book.shared_folder = lambda: Path(root).parent
