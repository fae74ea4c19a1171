"""A power strip's file."""

from itertools import pairwise

import pytest

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.pdu import read_pdu_csv

S = 1_000_000_000


@pytest.fixture
def csv_file(tmp_path):
    def made(text):
        path = tmp_path / "pdu.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return made


def test_watts_and_kwh_of_a_power_strip(csv_file):
    path = csv_file(
        "\ufeffTime, Outlet, Watts, kWh\n"
        "2026-03-01T13:00:00+01:00,7,800,10.00\n"
        "2026-03-01T12:01:00Z,7,,10.02\n"
        "2026-03-01 12:02:00+00:00,7,820,10.03\n"
        "2026-03-01T12:03:00Z,7,820,10.05\n"
    )
    energy, power = read_pdu_csv(path, clock_error_s=2, accuracy_share=0.01)
    assert [b - a for a, b in pairwise(energy.t_wall_ns)] == [60 * S] * 3
    assert list(energy.values) == [36_000_000_000, 36_072_000_000, 36_108_000_000, 36_180_000_000]
    assert (energy.quantum, energy.max_gap_ns) == (36_000_000, 180 * S)
    assert (energy.source, energy.clock_error_ns) == ("pdu-csv-energy", 2 * S)
    assert list(power.values) == [800_000, 820_000, 820_000]
    found = energy.energy_between(energy.t_wall_ns[0], energy.t_wall_ns[3])
    assert found.energy_mj == 180_000_000


def test_local_times_need_their_zone(csv_file):
    path = csv_file("time,watts\n2026-03-01 13:00:00,800\n2026-03-01 13:00:10,800\n")
    with pytest.raises(InputError, match=r"pdu\.csv:2: .*no offset"):
        read_pdu_csv(path)
    (berlin,) = read_pdu_csv(path, time_zone="Europe/Berlin")
    (utc,) = read_pdu_csv(path, time_zone="UTC")
    assert utc.t_wall_ns[0] - berlin.t_wall_ns[0] == 3600 * S
    with pytest.raises(InputError, match="Mars/Phobos"):
        read_pdu_csv(path, time_zone="Mars/Phobos")


@pytest.mark.parametrize("time_", ["2026-10-25 02:30:00", "2026-03-29 02:30:00"])
def test_a_local_time_that_is_twice_or_never_is_refused(csv_file, time_):
    path = csv_file(f"time,watts\n2026-01-01 00:00:00,1\n{time_},800\n")
    with pytest.raises(InputError, match=r"pdu\.csv:3: .*ambiguous or skipped in Europe/Berlin"):
        read_pdu_csv(path, time_zone="Europe/Berlin")


def test_a_gap_in_the_file_is_missing_and_a_short_silence_is_not(csv_file):
    rows = [f"2026-03-01T12:{m:02d}:00Z,600" for m in (0, 1, 2, 4, 5, 6, 7, 15, 16)]
    (power,) = read_pdu_csv(csv_file("time,watts\n" + "\n".join(rows)))
    at = power.t_wall_ns
    assert power.energy_between(at[0], at[6]).energy_mj == 7 * 60 * 600_000
    assert power.energy_between(at[0], at[8]).note == "the meter was silent for 480 s"


def test_a_meter_that_was_set_back_is_reported_and_not_counted_across(csv_file, caplog):
    path = csv_file("time,kwh\n2026-03-01T12:00:00Z,10\n2026-03-01T12:01:00Z,0.5\n2026-03-01T12:02:00Z,0.6\n")
    (energy,) = read_pdu_csv(path)
    assert "pdu.csv:3" in caplog.text
    at = energy.t_wall_ns
    assert energy.energy_between(at[0], at[2]).energy_mj is None
    assert energy.energy_between(at[1], at[2]).energy_mj == 360_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pdu.csv:1: found columns (none)"),
        ("time;watts\n", "pdu.csv:1: found columns time;watts"),
        ("time,amps\n", "needs"),
        ("time,watts,watts\n", "each once"),
        ("time,watts\n2026-03-01T12:00:00Z,800\n", "fewer than two readings"),
        ("time,watts\nyesterday,800\n", "pdu.csv:2: time 'yesterday'"),
        ("time,watts\n9999-12-31T23:59:59Z,800\n", "pdu.csv:2: time"),
        ("time,watts\n2026-03-01T12:00:00Z,800,1\n", "pdu.csv:2: has 3 cells"),
        ("time,watts\n2026-03-01T12:00:00Z,-1\n", "pdu.csv:2: watts '-1'"),
        ("time,watts\n2026-03-01T12:00:00Z,nan\n", "pdu.csv:2: watts 'nan'"),
        ("time,watts\n2026-03-01T12:00:00Z,1_000\n", "pdu.csv:2: watts"),
        ("time,kwh\n2026-03-01T12:00:00Z,1e15\n", "pdu.csv:2: kwh"),
        ('time,watts\n2026-03-01T12:00:00Z,"8\n', "pdu.csv:2: not CSV"),
        ("time,watts\n2026-03-01T12:00:01Z,1\n\n2026-03-01T12:00:01Z,2\n", "pdu.csv:4: .*not later"),
        (b"time,watts\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(csv_file, text, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_pdu_csv(csv_file(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv"):
        read_pdu_csv(tmp_path / "none.csv")
