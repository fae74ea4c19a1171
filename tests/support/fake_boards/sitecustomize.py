"""On a job's PYTHONPATH: its processes read the stand-in boards of the folder MILLIJOULE_TEST_BOARDS, and nothing else.

Python imports this by itself at start.
"""

import os
from pathlib import Path

if folder := os.environ.get("MILLIJOULE_TEST_BOARDS"):
    from support import boards

    boards.install(Path(folder))
    if chaos := os.environ.get("MILLIJOULE_TEST_CHAOS"):
        from support.chaos import in_ray

        in_ray.install(Path(chaos))
