"""A column `lora` chooses among the LoRAs that the command declares, and means nothing where it declares none."""

from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan_options import PlanOptions, compute_fingerprint
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.shard_rows import Shard, read_shard_rows, shard_requests
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store

CSV = """prompt,LoRA
a red cat,ink=0.25
a blue car,
a green tree,paint + ink
a moon,none
a star,ikn
a house,ink=x
"""
DECLARED = (("paint", 1.0), ("ink", 0.5))


@pytest.fixture
def planned(tmp_path):
    source = tmp_path / "p.csv"
    source.write_text(CSV)

    def plan(*loras):
        store = open_store(str(tmp_path / f"out{len(loras)}"))
        made = plan_job(expand_inputs([str(source)]), PlanOptions(loras=loras), store, {})
        (part,) = (tmp_path / f"out{len(loras)}").glob("_job/plan-*/part-*.parquet")
        (bad,) = (tmp_path / f"out{len(loras)}").glob("_job/plan-*/bad_rows.parquet")
        rows = sorted(pq.read_table(part).to_pylist(), key=lambda r: r["prompt_id"])
        return made, rows, pq.read_table(bad).to_pylist()

    return plan


def test_cells_are_read_in_one_form_and_wrong_ones_make_bad_rows(planned):
    _, rows, bad = planned(*DECLARED)
    assert {r["prompt"]: r["lora"] for r in rows} == {
        "a red cat": "ink=0.25",
        "a blue car": None,
        "a green tree": "paint=1.0+ink=0.5",
        "a moon": "none",
    }
    assert [(r["row"], r["column"]) for r in bad] == [(5, "LoRA"), (6, "LoRA")]
    assert bad[0]["reason"].startswith("no LoRA 'ikn' was declared; did you mean 'ink'?")
    assert all('"LoRA"' in r["extra"] for r in rows)  # what the row says stands in the manifest


def test_without_declared_ones_the_column_is_passed_through_as_ever(planned, caplog):
    caplog.set_level("WARNING")
    made, rows, bad = planned()
    assert (made.n_rows, bad) == (6, [])
    assert {r["lora"] for r in rows} == {None}
    assert "not used: LoRA (passed through)" in caplog.text


def test_rows_of_one_mix_are_neighbours_in_a_shard(tmp_path):
    source = tmp_path / "p.csv"
    cells = ("ink", "paint", "none", "")
    source.write_text("prompt,lora\n" + "".join(f"p{i},{cells[i % 4]}\n" for i in range(40)))
    store = open_store(str(tmp_path / "out"))
    plan_job(expand_inputs([str(source)]), PlanOptions(shard_size=8, loras=DECLARED), store, {})
    (part,) = (tmp_path / "out").glob("_job/plan-*/part-*.parquet")
    file = pq.ParquetFile(part)
    shards = [file.read_row_group(i)["lora"].to_pylist() for i in range(file.num_row_groups)]
    changes = [sum(a != b for a, b in pairwise(loras)) for loras in shards]
    assert sum(map(len, shards)) == 40
    assert sorted(changes)[:4] == [0, 0, 0, 0]  # of each mix, one full shard
    assert sum(changes) == 3  # what is left of them shares one, in order


def test_ids_do_not_depend_on_the_option(planned):
    ids = {r["prompt"]: r["prompt_id"] for r in planned()[1]}
    assert {r["prompt"]: r["prompt_id"] for r in planned(*DECLARED)[1]}.items() <= ids.items()


def test_a_job_without_loras_has_the_fingerprint_it_always_had(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\n")
    files = expand_inputs([str(tmp_path / "p.txt")])
    found = compute_fingerprint(files, PlanOptions(), {"model_sha256": "a" * 64, "job_seed": 0})
    assert found == "328cbfb2bc7f533d8b7005dfb78ed29323a6244befc8b66c986490e7072a6ca4"


def test_requests_carry_it_and_plans_without_the_column_are_read(tmp_path):
    import hashlib

    import pyarrow as pa

    row = {
        "prompt_id": "a",
        "prompt": "a cat",
        "num_images": 1,
        "source": "p:1",
        "lora": "ink=0.5",
    }
    for name in ("new", "old"):
        schema = (
            PLAN_ROW_SCHEMA
            if name == "new"
            else PLAN_ROW_SCHEMA.remove(PLAN_ROW_SCHEMA.get_field_index("lora"))
        )
        table = pa.Table.from_pylist([{f: row.get(f) for f in schema.names}], schema)
        pq.write_table(table, tmp_path / f"{name}.parquet")
        digest = hashlib.sha256(b"a\x001\x00").hexdigest()
        shard = Shard(0, f"{name}.parquet", 0, 1, 1, None, None, None, "a", digest)
        (request,) = shard_requests(read_shard_rows(open_store(str(tmp_path)), shard), 0)
        assert request.lora == ("ink=0.5" if name == "new" else None)
