"""No column, no result entry and no byte of a bundle can change unnoticed, and no damage stops the check."""

import copy
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.comparisons import ENVIRONMENT, run_comparison, small_registration

from millijoule.pipeline.comparison.bundle import RESULT, hash_inputs, seal, write_bundle
from millijoule.pipeline.comparison.bundle_check import check_bundle, differences
from millijoule.pipeline.comparison.registration import canonical_json
from millijoule.pipeline.comparison.rows import SCHEMAS

#: Columns from which nothing follows as long as they stay plausible; hashes and the signature cover them.
FREE = {("reads", "t_wall_ns"), ("reads", "latency_ns")}
#: Tables of runs in which power was sampled: `test_sampled_power`.
POWERED = ("second_meter.parquet", "power.parquet")
COLUMNS = [
    (name.removesuffix(".parquet"), column)
    for name, schema in SCHEMAS.items()
    if name not in POWERED
    for column in schema.names
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    plan = small_registration()
    write_bundle(folder / "bundle", plan, ENVIRONMENT, run_comparison(folder / "parts", plan=plan))
    return folder / "bundle"


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def altered(value, step=1):
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + step
        case str():
            return value + "x"
        case bytes():
            return value[:-1] + bytes([value[-1] ^ 1])
        case dict():
            return {**value, "energy_mj": value["energy_mj"] + 1}
        case list():
            return [altered(value[0]), *value[1:]]
        case None:
            return 1
    raise TypeError(type(value))


@pytest.mark.long
@pytest.mark.parametrize(("name", "column"), COLUMNS)
def test_every_column_matters(name, column, bundle):
    path = bundle / f"{name}.parquet"
    rows = pq.ParquetFile(path).read().to_pylist()
    # a block of the comparison, and the read that closes it
    row = len(rows) // 2 if name != "reads" else max(i for i, r in enumerate(rows) if r["block_id"] == "0020")
    step = 10**6 if column == "t_mono_ns" else 1  # a nanosecond changes nothing that is quoted
    rows[row][column] = altered(rows[row][column], step)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMAS[path.name]), path)
    result = json.loads((bundle / RESULT).read_bytes())
    result["inputs"] = hash_inputs(bundle)
    (bundle / RESULT).write_bytes(canonical_json(result))
    seal(bundle, None)
    assert bool(check_bundle(bundle).mismatches) is ((name, column) not in FREE)


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path


def test_every_entry_of_the_result_is_compared(original):
    result = json.loads((original / RESULT).read_bytes())
    paths = list(leaves(result))
    assert len(paths) > 100
    for path in paths:
        edited = copy.deepcopy(result)
        entry = edited
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = altered(entry[path[-1]])
        assert list(differences(edited, result)), path


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    sorted(
        ["registration.json", "environment.json", RESULT, "manifest.json", "statement.dsse.json", *SCHEMAS]
    ),
)
def test_any_flipped_byte_is_noticed(name, bundle):
    path = bundle / name
    if not path.exists():
        return
    data = path.read_bytes()
    rng = np.random.default_rng(len(data))
    for at in rng.integers(len(data), size=4):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :])
        assert check_bundle(bundle).mismatches, at


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in SCHEMAS if n not in POWERED])
def test_damaged_tables_with_new_hashes_do_not_stop_the_check(name, bundle):
    data = (bundle / name).read_bytes()
    rng = np.random.default_rng(len(data))
    for _ in range(6):
        damaged = bytearray(data)
        for at in rng.integers(len(data), size=5):
            damaged[at] ^= 1 << rng.integers(8)
        (bundle / name).write_bytes(damaged)
        seal(bundle, None)
        assert check_bundle(bundle).mismatches
