"""What tests of killed jobs believe of the books: null only where a reading is missing."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import assert_books_close
from support.report_outputs import WattMeter, finished, worker

PROMPTS = [f"prompt {i}" for i in range(12)]


class Forgetful(WattMeter):
    """Misses one reading of the memory, in the middle of a chain of reads."""

    reads = 0

    def read(self):
        read = super().read()
        self.reads += 1
        if self.reads == 4:
            del read.energy_mj["dram:package-0"]
        return read


def output(folder, kind=WattMeter):
    watts = {"cpu:package-0": 50.0, "dram:package-0": 5.0}

    def workers(clock, store, job, epoch):
        return [worker(store, job, epoch, "w0", "host", "cpu", kind(clock, "boot", watts), 0.001)]

    return Path(finished(folder, PROMPTS, workers).url)


def test_books_of_counters_that_were_read_close(tmp_path):
    assert_books_close(output(tmp_path))


def test_a_reading_that_is_missing_may_leave_null(tmp_path):
    made = output(tmp_path, Forgetful)
    assert json.loads((made / "stats.json").read_text())["direct_mj_per_image"] is None
    assert_books_close(made)


def test_null_where_a_counter_was_read_is_never_accepted(tmp_path):
    made = output(tmp_path)
    (part,) = made.glob("energy/segment/*/*/part-*.parquet")
    table = pq.ParquetFile(part).read()
    energy = [None, *table["energy_mj"].to_pylist()[1:]]
    place = table.schema.get_field_index("energy_mj")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(energy, pa.int64())), part)
    with pytest.raises(AssertionError, match="null though its counter was read"):
        assert_books_close(made)


@pytest.mark.parametrize("figure", ["direct_mj_per_image", "full_mj_per_image"])
def test_a_figure_that_is_null_needs_a_missing_reading(tmp_path, figure):
    made = output(tmp_path)
    stats = json.loads((made / "stats.json").read_text())
    (made / "stats.json").write_text(json.dumps(stats | {figure: None, "evidence_class": "E0"}))
    with pytest.raises(AssertionError):
        assert_books_close(made)
