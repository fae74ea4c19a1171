"""Memory that books no longer need goes back to the system, and Arrow is left as it was."""

import subprocess
import sys

import pyarrow as pa
import pytest

from millijoule.pipeline.closing.lean_memory import lean_memory


def test_arrows_allocator_comes_back_whatever_happens():
    before = pa.default_memory_pool().backend_name
    within = []

    @lean_memory()
    def fails():
        within.append(pa.default_memory_pool().backend_name)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert within == ["system"]
    assert pa.default_memory_pool().backend_name == before


GROW = """
import sys
from array import array
from millijoule.jobs.measuring.process import private_mb
from millijoule.pipeline.closing.lean_memory import lean_memory
import numpy as np
def grow():
    np.ones(20 << 20, np.uint8)  # once freed, glibc keeps blocks up to its size in the heap
    columns = [array("q") for _ in range(20)]
    for _ in range(200):
        for column in columns:
            column.extend(range(1000))
    return columns
before = private_mb()
if sys.argv[1] == "lean":
    with lean_memory():
        columns = grow()
else:
    columns = grow()
print(private_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="smaps")
def test_columns_that_grow_in_turns_leave_no_holes():
    took = float(subprocess.run([sys.executable, "-c", GROW, "lean"], check=True, capture_output=True).stdout)
    assert took < 1.3 * 20 * 200_000 * 8 / 1e6
