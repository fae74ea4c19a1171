"""A bundle says what its rows say, and every change to it is noticed.

Mutations come in three tables. EDITS change something that the conclusion or the protocol rests on: they are noticed by
recomputation alone, even after all hashes were made new by someone without the key. QUIET ones change nothing that
follows: hashes and signature notice them. FORGERIES redo the whole result from edited rows: only the signature notices.
"""

import base64
import dataclasses
import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.comparisons import (
    ENVIRONMENT,
    REQUESTS,
    World,
    registration,
    run_comparison,
    small_registration,
)

from millijoule.pipeline.comparison.attestation import (
    Envelope,
    load_private_key,
    load_public_key,
    merkle_root,
    sign,
)
from millijoule.pipeline.comparison.bundle import (
    ENVIRONMENT as ENVIRONMENT_FILE,
)
from millijoule.pipeline.comparison.bundle import (
    MANIFEST,
    REGISTRATION,
    RESULT,
    STATEMENT,
    hash_inputs,
    predicate,
    seal,
    write_bundle,
)
from millijoule.pipeline.comparison.bundle_check import check_bundle
from millijoule.pipeline.comparison.registration import Registration, canonical_json
from millijoule.pipeline.comparison.rows import SCHEMAS, SECOND_METER_SCHEMA
from millijoule.workers.errors import InputError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return run_comparison(tmp_path_factory.mktemp("run") / "parts")


@pytest.fixture(scope="module")
def original(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, registration(), ENVIRONMENT, rows, KEY)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of a smaller registration, for what is done a hundred times."""
    folder, plan = tmp_path_factory.mktemp("small"), small_registration()
    rows = run_comparison(folder / "parts", plan=plan)
    write_bundle(folder / "bundle", plan, ENVIRONMENT, rows, KEY)
    assert check_bundle(folder / "bundle", KEY.public_key()).mismatches == ()
    return folder / "bundle"


@pytest.fixture
def bundle(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


def result_of(folder):
    return json.loads((folder / RESULT).read_bytes())


# ---- ways to change a bundle -------------------------------------------------------------------------------------


def table(name, change):
    """Change the rows of a table, a list of dictionaries, in place or by returning another list."""

    def mutate(folder):
        path = folder / f"{name}.parquet"
        found = pq.ParquetFile(path).read().to_pylist()
        found = change(found) or found
        pq.write_table(pa.Table.from_pylist(found, SCHEMAS[path.name]), path)

    return mutate


def document(name, change):
    def mutate(folder):
        raw = json.loads((folder / name).read_bytes())
        change(raw)
        (folder / name).write_bytes(canonical_json(raw))

    return mutate


def cell(name, column, value, which=lambda r: True, number=0):
    """Set one column of row `number` among those that `which` picks; `value` may be a function of the old one."""

    def change(found):
        row = [r for r in found if which(r)][number]
        new = value(row[column]) if callable(value) else value
        assert new != row[column]
        row[column] = new

    return table(name, change)


def both(*mutations):
    def mutate(folder):
        for mutation in mutations:
            mutation(folder)

    return mutate


def without(name, which, number=0):
    def change(found):
        dropped = [r for r in found if which(r)][number]
        return [r for r in found if r is not dropped]

    return table(name, change)


def swap(column, a, b):
    def change(found):
        assert found[a][column] != found[b][column]
        found[a][column], found[b][column] = found[b][column], found[a][column]

    return change


def rehash(folder):
    """What someone without the key can do: every hash, root and statement anew."""
    path = folder / RESULT
    try:
        raw = json.loads(path.read_bytes())
        raw["inputs"] = hash_inputs(folder)
        path.write_bytes(canonical_json(raw))
    except ValueError:
        pass
    seal(folder, None)


def compared(row):
    return row["kind"] == "compare"


def block_of(row):
    return row["block_id"] == "0020"


def last_read(row):
    return block_of(row) and row["read_index"] == 8


def add_energy(mj):
    return lambda energy: [{**part, "energy_mj": part["energy_mj"] + mj} for part in energy]


def all_reads(change):
    def apply(found):
        for row in found:
            change(row)

    return table("reads", apply)


def restamp(folder):
    """Stamp all blocks with the hash of the registration that now lies there."""
    sha256 = Registration.from_json((folder / REGISTRATION).read_bytes()).sha256

    def change(found):
        for row in found:
            row["registration_sha256"] = sha256

    table("blocks", change)(folder)


def keep_accepted_only(folder):
    """The oldest trick: images that were rejected never happened."""
    judged = pq.ParquetFile(folder / "judgements.parquet").read().to_pylist()
    good = {(r["request"], r["sha256"]) for r in judged if r["accepted"]}
    table("images", lambda found: [r for r in found if (r["request"], r["sha256"]) in good])(folder)


def write_text(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def second_meter(folder):
    """A meter that agrees with everything, to climb a class."""
    reads = pq.ParquetFile(folder / "reads.parquet").read().to_pylist()
    made_up = [
        {"source": "power", "t_wall_ns": r["t_wall_ns"], "energy_mj": r["energy"][0]["energy_mj"]}
        for r in reads
    ]
    pq.write_table(pa.Table.from_pylist(made_up, SECOND_METER_SCHEMA), folder / "second_meter.parquet")


def retype(name, column, kind):
    def mutate(folder):
        path = folder / f"{name}.parquet"
        found = pq.ParquetFile(path).read()
        at = found.schema.get_field_index(column)
        pq.write_table(found.set_column(at, column, found[column].cast(kind)), path)

    return mutate


def add_column(folder):
    path = folder / "images.parquet"
    found = pq.ParquetFile(path).read()
    pq.write_table(found.append_column("note", pa.array(["x"] * len(found))), path)


def flip_pixel(found):
    found[0]["pixels"] = bytes([found[0]["pixels"][0] ^ 255]) + found[0]["pixels"][1:]


def rejected(row):
    return not row["accepted"]


def drop_batch(found):
    last = [i for i, r in enumerate(found) if block_of(r)][-8:]
    return [r for i, r in enumerate(found) if i not in last]


def improve_reading(found):
    row = next(r for r in found if rejected(r))
    colour, noun = REQUESTS[row["request"]].prompt.split()[1:]
    row["icons"] = json.dumps([[noun, colour, "big", 1, 1]])


EDITS = {
    # registration
    "factor lowered": document(REGISTRATION, lambda r: r.update(factor=2.0)),
    "factor lowered, blocks stamped again": both(
        document(REGISTRATION, lambda r: r.update(factor=2.0)), restamp
    ),
    "margin widened, blocks stamped again": both(
        document(REGISTRATION, lambda r: r["gate"].update(score_margin=0.9)), restamp
    ),
    "another bootstrap seed": both(
        document(REGISTRATION, lambda r: r["statistics"].update(seed=77)), restamp
    ),
    "lower confidence": both(
        document(REGISTRATION, lambda r: r["statistics"].update(confidence=0.6)), restamp
    ),
    "smaller systematics": both(
        document(REGISTRATION, lambda r: r["systematics"].update(counter_delay_s=0.0)), restamp
    ),
    "rest of the node declared": both(
        document(
            REGISTRATION,
            lambda r: r["systematics"].update(declared_rest_watts=0.0, declared_rest_tolerance_watts=0.0),
        ),
        restamp,
    ),
    "prompt dropped": both(document(REGISTRATION, lambda r: r["requests"].pop()), restamp),
    "prompt replaced by an easier one": both(
        document(REGISTRATION, lambda r: r["requests"][0].update(prompt="a cat")), restamp
    ),
    "blocks claimed to be longer": both(
        document(REGISTRATION, lambda r: r["design"].update(block_seconds=90.0)), restamp
    ),
    "blocks need not be as long": both(
        document(REGISTRATION, lambda r: r["design"].update(block_seconds=59.0)), restamp
    ),
    "warm-up need not settle": both(
        document(REGISTRATION, lambda r: r["design"].update(warmup_cv=99.0)), restamp
    ),
    "fewer images asked for": both(document(REGISTRATION, lambda r: r["gate"].update(min_images=1)), restamp),
    "fewer quadruples claimed": both(
        document(REGISTRATION, lambda r: r["design"].update(quadruples=4)), restamp
    ),
    "controls not registered": both(
        document(REGISTRATION, lambda r: r["design"].update(control_quadruples=0)), restamp
    ),
    "registered after the run": both(
        document(REGISTRATION, lambda r: r.update(registered_wall_ns=2 * 10**18)), restamp
    ),
    "another model registered": both(
        document(REGISTRATION, lambda r: r["b"].update(sha256="e" * 64)), restamp
    ),
    "another judge registered": both(
        document(REGISTRATION, lambda r: r["gate"].update(judge_sha256="e" * 64)), restamp
    ),
    "metric dropped": both(document(REGISTRATION, lambda r: r["gate"].update(metrics=[])), restamp),
    "registration not canonical": lambda f: (f / REGISTRATION).write_text(
        json.dumps(json.loads((f / REGISTRATION).read_bytes()))
    ),
    "registration emptied": write_text(REGISTRATION, b"{}"),
    # counter reads
    "closing counter raised": cell("reads", "energy", add_energy(500), last_read),
    "opening counter lowered": cell(
        "reads", "energy", add_energy(-500), lambda r: block_of(r) and r["read_index"] == 0
    ),
    "all counters of A's blocks scaled": all_reads(
        lambda r: r.update(energy=add_energy(r["energy"][0]["energy_mj"] // 100)(r["energy"]))
    ),
    "counter goes back": cell(
        "reads", "energy", add_energy(-3 * 10**6), lambda r: block_of(r) and r["read_index"] == 1
    ),
    "counter dropped in one read": cell("reads", "energy", [], last_read),
    "counter added in one read": cell(
        "reads", "energy", lambda e: [*e, {"domain": "cpu:0", "energy_mj": 1}], last_read
    ),
    "all counters dropped": all_reads(lambda r: r.update(energy=[])),
    "domain renamed": all_reads(
        lambda r: r.update(energy=[{**p, "domain": "cpu:package-0"} for p in r["energy"]])
    ),
    "closing read dropped": without("reads", last_read),
    "middle read dropped": without("reads", lambda r: block_of(r) and r["read_index"] == 1),
    "read doubled": table("reads", lambda found: [*found, found[5]]),
    "all reads of a block dropped": table("reads", lambda f: [r for r in f if not block_of(r)]),
    "reads of no block": table("reads", lambda f: [*f, {**f[0], "block_id": "9999"}]),
    "block shortened": cell("reads", "t_mono_ns", lambda t: t - 500_000_000, last_read),
    "block lengthened": cell("reads", "t_mono_ns", lambda t: t + 500_000, last_read),
    "read moved into the past": cell("reads", "t_mono_ns", 5, last_read),
    "wall clock set": cell("reads", "t_wall_ns", lambda t: t + 10**11, last_read),
    "read before registration": all_reads(lambda r: r.update(t_wall_ns=r["t_mono_ns"])),
    "another boot": cell("reads", "boot_id", "other", last_read),
    "another epoch": cell("reads", "epoch", 1, last_read),
    "latency below zero": cell("reads", "latency_ns", -1, last_read),
    "estimate changed": cell("reads", "estimate_mj", lambda mj: mj + 5, last_read),
    "estimate dropped": cell("reads", "estimate_mj", None, last_read),
    # blocks
    "energy of a block": cell("blocks", "energy_mj", lambda mj: mj - 1, compared),
    "energy of a block nulled": cell("blocks", "energy_mj", None, compared),
    "estimate of a block": cell("blocks", "estimate_mj", 1, compared),
    "accepted images of a block": cell("blocks", "accepted", lambda n: n + 1, compared),
    "images of a block": cell("blocks", "images", lambda n: n + 1, compared),
    "seconds of a block": cell("blocks", "seconds", lambda s: s + 0.01, compared),
    "arms exchanged": table("blocks", swap("arm", 26, 27)),
    "sides exchanged": table("blocks", swap("side", 26, 27)),
    "a comparison made a control": cell("blocks", "kind", "same", compared),
    "a comparison made a warm-up": cell("blocks", "kind", "warmup", compared),
    "a bad block dropped": without("blocks", compared, 3),
    "a block doubled": table("blocks", lambda f: [*f, f[20]]),
    "order exchanged": table("blocks", swap("ordinal", 20, 22)),
    "quadruple changed": cell("blocks", "quadruple", lambda q: q + 1, compared),
    "telemetry flag": cell("blocks", "telemetry", lambda t: not t, compared),
    "another session": cell("blocks", "session", 1, compared),
    "first request moved": cell("blocks", "first_request", lambda r: r + 1, compared),
    "of another registration": cell("blocks", "registration_sha256", "f" * 64, compared),
    "warm-up dropped": table("blocks", lambda f: [r for r in f if r["kind"] != "warmup"]),
    "idle dropped": without("blocks", lambda r: r["kind"] == "idle"),
    # images
    "image dropped": without("images", block_of),
    "batch dropped": table("images", drop_batch),
    "image added": table("images", lambda f: [*f, f[-1]]),
    "rejected images dropped": keep_accepted_only,
    "request changed": cell("images", "request", lambda r: (r + 1) % len(REQUESTS), block_of),
    "request out of range": cell("images", "request", len(REQUESTS), block_of),
    "request below zero": cell("images", "request", -1, block_of),
    "image exchanged for another": cell("images", "sha256", "0" * 64, block_of),
    "image moved to another block": cell("images", "block_id", "0021", block_of),
    "images of no block": cell("images", "block_id", "9999", block_of),
    "order of images": table("images", swap("request", 100, 101)),
    # judgements
    "accepted flag raised": cell("judgements", "accepted", True, rejected),
    "accepted flag lowered": cell("judgements", "accepted", False, lambda r: r["accepted"]),
    "reading improved": table("judgements", improve_reading),
    "reading and flag improved": table(
        "judgements",
        lambda f: [{**r, "accepted": True, "icons": f[0]["icons"]} if rejected(r) else r for r in f],
    ),
    "reading damaged": cell("judgements", "icons", "[[]]"),
    "reading dropped": cell("judgements", "icons", None),
    "score of another rule": cell("judgements", "score", 0.9),
    "blank flag": cell("judgements", "blank", True),
    "judgement dropped": without("judgements", lambda r: True),
    "judgement doubled": table("judgements", lambda f: [*f, f[0]]),
    "judgement invented": table("judgements", lambda f: [*f, {**f[0], "sha256": "0" * 64}]),
    "metric changed": cell("judgements", "metrics", [200.0]),
    "metric not a number": cell("judgements", "metrics", [float("nan")]),
    "metric of an image dropped": cell("judgements", "metrics", []),
    # pixels and features
    "pixel changed": table("pixels", flip_pixel),
    "image hash changed": cell("pixels", "sha256", "0" * 64),
    "pixels of two images exchanged": table("pixels", swap("pixels", 0, 1)),
    "pixels of an image dropped": without("pixels", lambda r: True),
    "pixels of an image doubled": table("pixels", lambda f: [*f, f[0]]),
    "all pixels dropped": lambda f: (f / "pixels.parquet").unlink(),
    "shape changed": both(cell("pixels", "height", 4), cell("pixels", "width", 16)),
    "pixels cut": cell("pixels", "pixels", lambda p: p[:-1]),
    "feature changed": cell("features", "values", lambda v: [v[0] + 0.5, *v[1:]]),
    "feature not a number": cell("features", "values", lambda v: [float("nan"), *v[1:]]),
    "features of an image dropped": without("features", lambda r: r["arm"] == "B"),
    "features doubled": table("features", lambda f: [*f, f[0]]),
    "features of the arms exchanged": table(
        "features", lambda f: [{**r, "arm": {"A": "B", "B": "A"}.get(r["arm"], r["arm"])} for r in f]
    ),
    "reference dropped": table("features", lambda f: [r for r in f if r["arm"] != "reference"]),
    "reference moved towards A": table(
        "features",
        lambda f: [{**r, "values": f[0]["values"]} if r["arm"] == "reference" else r for r in f],
    ),
    "second meter invented": second_meter,
    # tables
    "column of another type": retype("blocks", "seconds", pa.float32()),
    "column added": add_column,
    "table cut short": lambda f: (f / "reads.parquet").write_bytes((f / "reads.parquet").read_bytes()[:-100]),
    "table emptied": table("images", lambda f: f.clear()),
    "not a table": write_text("blocks.parquet", b"PAR1"),
    # environment
    "another model was loaded": document(
        ENVIRONMENT_FILE, lambda r: r["models"]["A"].update(sha256="e" * 64)
    ),
    "models not named": document(ENVIRONMENT_FILE, lambda r: r.pop("models")),
    "another device": document(ENVIRONMENT_FILE, lambda r: r.update(device="cuda")),
    "another judge": document(ENVIRONMENT_FILE, lambda r: r.update(judge_sha256="")),
    "environment not an object": write_text(ENVIRONMENT_FILE, b"[]\n"),
    # result
    "verdict": document(RESULT, lambda r: r.update(verdict=r["verdict"].replace("times", "TIMES"))),
    "ratio": document(RESULT, lambda r: r["ratio_per_accepted_image"].update(ratio=1000.0)),
    "ratio by a thousandth": document(
        RESULT,
        lambda r: r["ratio_per_accepted_image"].update(ratio=1.001 * r["ratio_per_accepted_image"]["ratio"]),
    ),
    "lower end": document(RESULT, lambda r: r["ratio_per_accepted_image"].update(low=1000.0)),
    "interval dropped": document(RESULT, lambda r: r["ratio_per_accepted_image"].update(low=None)),
    "claim": document(RESULT, lambda r: r["claim"].update(factor=1000.0)),
    "claim's outcome": document(RESULT, lambda r: r["claim"].update(outcome="proven")),
    "evidence class": document(RESULT, lambda r: r.update(evidence_class="E4")),
    "boundary": document(RESULT, lambda r: r.update(boundary="wall plug")),
    "domains": document(RESULT, lambda r: r["domains"].append("node")),
    "block length": document(RESULT, lambda r: r["protocol"].update(block_seconds=600.0)),
    "margin": document(RESULT, lambda r: r["protocol"].update(score_margin=0.0)),
    "metric's margin": document(RESULT, lambda r: r["protocol"]["metric_margins"].update(brightness=0.0)),
    "departure from the protocol": document(RESULT, lambda r: r["protocol"]["loosened"].append("none")),
    "gate": document(RESULT, lambda r: r["gate"]["checks"]["score"].update(passed=False)),
    "gate's numbers": document(RESULT, lambda r: r["gate"]["checks"]["score"].update(low=0.5)),
    "systematics": document(RESULT, lambda r: r["systematics"]["parts"].update(prompts=0.0)),
    "control": document(RESULT, lambda r: r["controls"].update(same=0.0)),
    "energy of an arm": document(RESULT, lambda r: r["arms"]["A"].update(energy_mj=1)),
    "number as text": document(RESULT, lambda r: r["arms"]["A"].update(accepted="1")),
    "statement added": document(RESULT, lambda r: r.update(certified="by nobody")),
    "entry dropped": document(RESULT, lambda r: r.pop("idle_watts")),
    "warm-up": document(RESULT, lambda r: r.update(warmup_stable={})),
}


def shift_clocks(row):
    row["t_wall_ns"] += 3_600 * 10**9


QUIET = {
    "all wall clocks an hour later": all_reads(shift_clocks),
    "middle counter moved": cell(
        "reads", "energy", add_energy(5), lambda r: block_of(r) and r["read_index"] == 1
    ),
    "latency shortened": cell("reads", "latency_ns", 1, last_read),
    "icon moved by a hair": cell(
        "judgements", "icons", lambda t: t.replace("4.0", "4.1"), lambda r: r["accepted"]
    ),
    "rows sorted otherwise": table("judgements", lambda f: f[::-1]),
    "commit in the environment": document(ENVIRONMENT_FILE, lambda r: r.update(commit="other")),
    "compressed otherwise": lambda f: pq.write_table(
        pq.ParquetFile(f / "reads.parquet").read(), f / "reads.parquet", compression="none"
    ),
}


def edit_manifest(change):
    return document(MANIFEST, change)


def edit_payload(change, key=None):
    def mutate(folder):
        envelope = Envelope.from_json((folder / STATEMENT).read_bytes())
        raw = json.loads(envelope.payload)
        change(raw)
        changed = (
            sign(canonical_json(raw), key)
            if key
            else dataclasses.replace(envelope, payload=canonical_json(raw))
        )
        (folder / STATEMENT).write_bytes(changed.to_json())

    return mutate


def spelt_otherwise(text):
    """Base64 of the same bytes, with one of the last character's unused bits set, or with a space after it."""
    body = text.rstrip("=")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = body[:-1] + letters[letters.index(body[-1]) ^ 1] + "=" * (len(text) - len(body))
    return other if body != text else text + " "


def edit_envelope(change):
    return document(STATEMENT, change)


def nested(folder):
    (folder / "reads.parquet").unlink()
    (folder / "reads.parquet").mkdir()


def linked(folder):
    outside = folder.parent / "outside.parquet"
    shutil.move(folder / "reads.parquet", outside)
    (folder / "reads.parquet").symlink_to(outside)


ENVELOPES = {
    "file added": write_text("notes.txt", b"x"),
    "file with odd name added": write_text("a\nb", b"x"),
    "file removed": lambda f: (f / "reads.parquet").unlink(),
    "registration removed": lambda f: (f / REGISTRATION).unlink(),
    "statement removed": lambda f: (f / STATEMENT).unlink(),
    "manifest removed": lambda f: (f / MANIFEST).unlink(),
    "file is a folder": nested,
    "file is a link": linked,
    "root": edit_manifest(lambda r: r.update(merkle_root="0" * 64)),
    "hash in the manifest": edit_manifest(lambda r: r["files"][RESULT].update(sha256="0" * 64)),
    "hash that is none": edit_manifest(lambda r: r["files"][RESULT].update(sha256="xyz")),
    "size in the manifest": edit_manifest(lambda r: r["files"][RESULT].update(size_bytes=1)),
    "entry dropped": edit_manifest(lambda r: r["files"].pop(RESULT)),
    "path out of the folder": edit_manifest(
        lambda r: r["files"].update({"../../etc/hostname": {"sha256": "0" * 64, "size_bytes": 1}})
    ),
    "manifest's format": edit_manifest(lambda r: r.update(format="other")),
    "manifest not JSON": write_text(MANIFEST, b"\xff"),
    "manifest with spaces": lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes() + b" "),
    "manifest a list": write_text(MANIFEST, b"[]\n"),
    "manifest too deep": write_text(MANIFEST, b"[" * 100_000),
    "statement's subject": edit_payload(lambda r: r["subject"].pop()),
    "statement's verdict": edit_payload(lambda r: r["predicate"].update(verdict="better")),
    "statement's predicate type": edit_payload(lambda r: r.update(predicateType="other")),
    "statement's type": edit_payload(lambda r: r.update(_type="other")),
    "statement not JSON": edit_envelope(lambda r: r.update(payload=base64.b64encode(b"x").decode())),
    "last digit in the statement": edit_payload(
        lambda r: r["predicate"]["ratio_per_accepted_image"].update(
            low=math.nextafter(r["predicate"]["ratio_per_accepted_image"]["low"], 0)
        )
    ),
    "payload spelt otherwise": edit_envelope(lambda r: r.update(payload=spelt_otherwise(r["payload"]))),
    "payload not base64": edit_envelope(lambda r: r.update(payload="*")),
    "payload type": edit_envelope(lambda r: r.update(payloadType="text/plain")),
    "envelope not JSON": write_text(STATEMENT, b""),
}

SIGNATURES = {
    "signature removed": edit_envelope(lambda r: r.update(signatures=[])),
    "signature changed": edit_envelope(
        lambda r: r["signatures"][0].update(sig=base64.b64encode(bytes(64)).decode())
    ),
    "signature cut": edit_envelope(lambda r: r["signatures"][0].update(sig="AAAA")),
    "signed by another, under our key's name": edit_payload(lambda r: r.update(x=1), OTHER_KEY),
    "signed anew by another": lambda f: seal(f, OTHER_KEY),
    "hashes anew without a key": lambda f: seal(f, None),
}

# ---- a sound bundle ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_sound_bundle_is_found_sound(original):
    report = check_bundle(original, KEY.public_key())
    assert report.mismatches == ()
    assert report.notes == ()
    assert report.result["verdict"] == result_of(original)["verdict"]


def test_the_result_is_what_the_world_was_made_for(original):
    """A: 8 images in 1.5 s at 300 W; B: 4 in 7.5 s at 330 W: 11 times the energy per image."""
    result = result_of(original)
    assert result["ratio_per_image"]["ratio"] == pytest.approx(11.0, rel=0.005)
    accepted = {arm: sums["accepted"] / sums["images"] for arm, sums in result["arms"].items()}
    ratio = result["ratio_per_accepted_image"]
    assert ratio["ratio"] == pytest.approx(11.0 * accepted["A"] / accepted["B"], rel=0.005)
    assert ratio["low"] < ratio["ratio"] < ratio["high"]
    assert result["evidence_class"] == "E1"
    assert result["boundary"].startswith("GPU board (")
    assert result["gate"]["passed"]
    assert result["claim"]["outcome"] == "holds"
    assert result["idle_watts"] == pytest.approx([60.0] * 3, rel=0.01)
    assert all(abs(value) < 0.01 for value in result["controls"].values())
    assert result["arms"]["A"]["mj_per_image"] == pytest.approx(1.5 * 300 / 8 * 1000, rel=0.01)


def test_who_signed_is_said_but_not_believed(original, bundle):
    (note,) = check_bundle(original).notes
    assert "not checked" in note
    seal(bundle, None)
    report = check_bundle(bundle)
    assert report.mismatches == ()
    assert "unsigned" in report.notes[0]


def test_images_may_be_left_out(rows, tmp_path):
    folder = tmp_path / "bundle"
    write_bundle(folder, registration(), ENVIRONMENT, dataclasses.replace(rows, pixels=None), KEY)
    report = check_bundle(folder, KEY.public_key())
    assert report.mismatches == ()
    assert "images are not included" in report.notes[0]


def test_a_bundle_is_written_once(original, rows):
    with pytest.raises(InputError, match="not empty"):
        write_bundle(original, registration(), ENVIRONMENT, rows)


# ---- mutations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed_by_recomputation_alone(name, bundle):
    EDITS[name](bundle)
    rehash(bundle)
    assert check_bundle(bundle).mismatches


@pytest.mark.parametrize("name", [*EDITS, *QUIET])
def test_a_naive_edit_is_noticed_by_its_hash(name, bundle, monkeypatch):
    (EDITS | QUIET)[name](bundle)
    monkeypatch.setattr(
        "millijoule.pipeline.comparison.bundle_check.compute_result", lambda *_: {"verdict": None}
    )
    assert any(
        "differ from the manifest" in m or "in the manifest" in m for m in check_bundle(bundle).mismatches
    )


@pytest.mark.parametrize("name", QUIET)
def test_a_quiet_edit_with_new_hashes_is_noticed_by_the_signature_only(name, bundle):
    QUIET[name](bundle)
    rehash(bundle)
    assert check_bundle(bundle).mismatches == ()
    assert any("not signed by the given key" in m for m in check_bundle(bundle, KEY.public_key()).mismatches)


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_edit_around_the_rows_is_noticed(name, bundle):
    ENVELOPES[name](bundle)
    assert check_bundle(bundle).mismatches


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_edited_signature_is_noticed(name, bundle):
    SIGNATURES[name](bundle)
    assert any("not signed by the given key" in m for m in check_bundle(bundle, KEY.public_key()).mismatches)


def half_energy(row):
    """All counters halved from its first value on: consistent, plausible, false."""
    row["energy"] = [{**p, "energy_mj": 5_000_000 + (p["energy_mj"] - 5_000_000) // 2} for p in row["energy"]]


def improve_all(found):
    while any(rejected(r) for r in found):
        row = next(r for r in found if rejected(r))
        improve_reading(found)
        row["accepted"] = True


FORGERIES = {
    "all energies halved": all_reads(half_energy),
    "rejected images accepted": table("judgements", improve_all),
    "a lower factor": both(document(REGISTRATION, lambda r: r.update(factor=2.0)), restamp),
}


@pytest.mark.parametrize("key", [None, OTHER_KEY])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_consistent_forgery_is_noticed_by_the_signature_and_by_nothing_else(name, key, bundle, tmp_path):
    FORGERIES[name](bundle)
    tables = {n.removesuffix(".parquet"): None for n in SCHEMAS}
    for n in SCHEMAS:
        if (bundle / n).exists():
            tables[n.removesuffix(".parquet")] = pq.ParquetFile(bundle / n).read()
    from millijoule.pipeline.comparison.rows import Rows

    forged = tmp_path / "forged"
    plan = Registration.from_json((bundle / REGISTRATION).read_bytes())
    write_bundle(forged, plan, ENVIRONMENT, Rows(**tables), key)
    assert check_bundle(forged).mismatches == ()
    assert any("not signed by the given key" in m for m in check_bundle(forged, KEY.public_key()).mismatches)


def test_the_suite_has_as_many_kinds_as_it_says():
    assert len(EDITS) + len(QUIET) + len(ENVELOPES) + len(SIGNATURES) + len(FORGERIES) >= 150


# ---- what is missing ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_read_without_counter_makes_its_block_missing(tmp_path):
    world = World()
    full = run_comparison(tmp_path / "full")
    index = [r["block_id"] for r in full.reads.to_pylist()].index("0020") + 1
    world.missing_reads = {index}
    folder = tmp_path / "bundle"
    result = write_bundle(folder, registration(), ENVIRONMENT, run_comparison(tmp_path / "parts", world))
    block = next(
        b for b in pq.ParquetFile(folder / "blocks.parquet").read().to_pylist() if b["block_id"] == "0020"
    )
    assert block["energy_mj"] is None
    assert block["estimate_mj"] > 0
    assert result["ratio_per_accepted_image"]["quadruples"] == 4
    assert result["ratio_per_accepted_image"]["low"] is None
    assert result["claim"]["outcome"] == "not established"
    assert "not established" in result["verdict"]
    assert check_bundle(folder).mismatches == ()


def test_without_counters_the_same_protocol_gives_an_estimate(tmp_path):
    folder = tmp_path / "bundle"
    world = World(counters=False)
    result = write_bundle(folder, registration(), ENVIRONMENT, run_comparison(tmp_path / "parts", world))
    assert result["evidence_class"] == "E0"
    assert "evidence class E0 (estimate, or" in result["verdict"]
    assert result["claim"]["outcome"] == "holds for the estimate only"
    assert result["ratio_per_image"]["ratio"] == pytest.approx(11.0, rel=0.01)
    assert {b["energy_mj"] for b in pq.ParquetFile(folder / "blocks.parquet").read().to_pylist()} == {None}
    assert check_bundle(folder).mismatches == ()


def test_an_estimate_of_the_processor_says_nothing_about_a_gpu(tmp_path):
    plan = registration(device="cuda")
    rows = run_comparison(tmp_path / "parts", World(counters=False), plan)
    result = write_bundle(tmp_path / "bundle", plan, ENVIRONMENT, rows)
    assert result["claim"]["outcome"] == "not established"
    assert result["claim"]["reasons"] == ["the device's own energy is not measured"]
    assert "GPU not included" in result["boundary"]


# ---- hashes and keys ---------------------------------------------------------------------------------------------


def test_the_root_depends_on_every_name_and_hash():
    digests = {f"file {i}": f"{i:064x}" for i in range(7)}
    roots = {merkle_root(digests)}
    for name in digests:
        roots.add(merkle_root({**digests, name: "f" * 64}))
        roots.add(merkle_root({n: d for n, d in digests.items() if n != name}))
        roots.add(merkle_root({(n + "x" if n == name else n): d for n, d in digests.items()}))
    assert len(roots) == 22
    assert merkle_root(dict(reversed(digests.items()))) == merkle_root(digests)


def test_the_envelope_is_dsse():
    """The pre-authentication encoding as the specification writes it, checked with the bare key."""
    envelope = sign(b"{}", KEY)
    KEY.public_key().verify(envelope.signatures[0].sig, b"DSSEv1 28 application/vnd.in-toto+json 2 {}")
    assert Envelope.from_json(envelope.to_json()) == envelope


def test_the_statement_is_in_toto_v1(original):
    raw = json.loads((original / STATEMENT).read_bytes())
    said = json.loads(base64.b64decode(raw["payload"]))
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"] for s in said["subject"]} == {p.name for p in original.iterdir()} - {
        MANIFEST,
        STATEMENT,
    }
    manifest = json.loads((original / MANIFEST).read_bytes())
    assert said["predicate"] == predicate(result_of(original), manifest["merkle_root"])


def test_keys_are_read_from_pem():
    private = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert load_private_key(private, where="k").sign(b"x") == KEY.sign(b"x")
    load_public_key(public, where="k").verify(KEY.sign(b"x"), b"x")
    for load, wrong in ((load_private_key, public), (load_public_key, private), (load_public_key, b"")):
        with pytest.raises(InputError, match=r"key\.pem"):
            load(wrong, where="key.pem")
