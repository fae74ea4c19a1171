"""Node meters: what a series says between two times, a controller over a real socket, a tool, a power strip's file."""

import base64
import logging
import os
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.redfish import Controller, own_certificate

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.ipmi import IpmiMeter
from millijoule.workers.node_meters.meter import (
    NodeReading,
    NodeRecorder,
    NodeSeries,
    best_energy,
    parse_amount,
)
from millijoule.workers.node_meters.pdu import read_pdu_csv
from millijoule.workers.node_meters.redfish import MAX_ANSWER_BYTES, RedfishConfig, RedfishMeter

S = 1_000_000_000
KWH = 3_600_000_000


def series(quantity, readings, **options):
    times, values = zip(*readings, strict=True)
    fields = {"quantum": 1, "max_gap_ns": 30 * S, **options}
    return NodeSeries("node", f"test-{quantity}", quantity, [t * S for t in times], values, **fields)


# --- between two times ------------------------------------------------------------------------------------------------


def test_a_cumulative_meter_at_its_readings_is_exact_to_the_last_digit():
    found = series("energy", [(0, 1_000), (10, 8_000), (20, 16_000)], quantum=10).energy_between(0, 20 * S)
    assert (found.energy_mj, found.tolerance_mj) == (15_000, 10)
    assert found.tolerance_share == pytest.approx(10 / 15_000)


def test_between_readings_it_is_interpolated_and_the_readings_around_bound_the_error():
    found = series("energy", [(0, 0), (10, 10_000), (20, 16_000)], quantum=1).energy_between(5 * S, 15 * S)
    assert found.energy_mj == 8_000  # 5,000 before 10 s and 3,000 after
    assert found.tolerance_mj == 8_001  # nothing between 5 and 15 s, or all of it: and the last digit


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 60_000_000)), min_size=3, max_size=40),
    st.data(),
)
def test_the_true_energy_lies_within_the_tolerance(steps, data):
    """Steps of (ms, mJ); the true counter jumps anywhere inside a step, the meter is read now and then."""
    times, energy = [0], [0]
    for ms, mj in steps:
        times.append(times[-1] + ms * 1_000_000)
        energy.append(energy[-1] + mj * ms // 1000)
    n = len(times)
    kept = sorted({0, n - 1, *data.draw(st.lists(st.integers(0, n - 1), max_size=6))})
    quantum = data.draw(st.sampled_from([1, 1_000, 36_000_000]))
    shown = [energy[i] // quantum * quantum for i in kept]
    meter = NodeSeries("n", "s", "energy", [times[i] for i in kept], shown, quantum, 10**18)
    i, j = sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True)))
    found = meter.energy_between(times[i], times[j])
    if found.energy_mj is None:
        assert found.note == "the meter stood still"
        return
    assert abs(found.energy_mj - (energy[j] - energy[i])) <= found.tolerance_mj + 1


@pytest.mark.parametrize(
    ("meter", "note"),
    [
        (series("energy", [(5, 0), (20, 9_000)]), "not read before"),
        (series("energy", [(0, 0), (14, 9_000)]), "not read before and after"),
        (series("energy", [(0, 5_000), (10, 9_000), (20, 200)]), "reset"),
        (series("energy", [(0, 5_000), (20, 5_000)]), "stood still"),
        (series("energy", [(0, 0), (20, 10**13)]), "leapt"),
        (series("power", [(0, 700_000), (31, 700_000)]), "silent for 31 s"),
        (NodeSeries("node", "x", "power", [], [], 1, 1), "not read"),
    ],
)
def test_what_would_need_a_guess_is_missing_and_not_zero(meter, note):
    found = meter.energy_between(1 * S, 15 * S)
    assert (found.energy_mj, found.tolerance_mj, found.tolerance_share) == (None, None, None)
    assert note in found.note


def test_a_reset_elsewhere_does_not_matter():
    meter = series("energy", [(0, 9_000), (10, 100), (20, 4_100), (30, 0)])
    assert meter.energy_between(10 * S, 20 * S).energy_mj == 4_000


def test_power_is_integrated_by_trapezoids():
    found = series("power", [(0, 500_000), (10, 700_000), (20, 700_000)], quantum=1_000).energy_between(
        5 * S, 20 * S
    )
    assert found.energy_mj == 5 * 650_000 + 10 * 700_000
    assert (
        found.tolerance_mj == 5 * 100_000 + 15 * 500
    )  # the rise might have come at once; half a watt throughout


def test_a_clock_that_is_off_and_an_instrument_that_is_off_widen_the_tolerance():
    readings = [(t, 1_000_000 * t) for t in range(0, 101, 10)]  # 1 kW
    exact = series("energy", readings).energy_between(10 * S, 90 * S)
    late = series("energy", readings, clock_error_ns=S).energy_between(10 * S, 90 * S)
    rough = series("energy", readings, accuracy_share=0.01).energy_between(10 * S, 90 * S)
    assert (late.energy_mj, late.tolerance_mj - exact.tolerance_mj) == (exact.energy_mj, 2_000_000)
    assert rough.tolerance_mj - exact.tolerance_mj == 800_000
    assert "not stated" in exact.note
    assert "0.01" in rough.note


def test_a_counter_is_preferred_to_power_unless_it_is_too_coarse():
    fine = series("energy", [(t, 1_000_000 * t) for t in range(101)])
    coarse = series("energy", [(0, 0), (100, 36_000_000 * 3)], quantum=36_000_000)
    power = series("power", [(t, 1_000_000) for t in range(0, 101, 10)])
    assert best_energy([power, fine], 5 * S, 95 * S).source == "test-energy"
    assert best_energy([coarse, power], 5 * S, 95 * S).source == "test-power"
    assert best_energy([coarse, power], 5 * S, 200 * S).energy_mj is None
    assert best_energy([], 0, 1) is None


@pytest.mark.parametrize("amount", ["-1", "NaN", "Infinity", "1e16", "1e18", "999999999999999"])
def test_what_no_meter_can_mean_is_refused(amount):
    from decimal import Decimal

    with pytest.raises(ValueError, match="not an amount"):
        parse_amount(Decimal(amount), KWH)


def test_an_amount_keeps_its_digits():
    from decimal import Decimal

    assert parse_amount(Decimal("10433.52"), KWH) == (37_560_672_000_000, 36_000_000)
    assert parse_amount(812, 1000) == (812_000, 1000)


# --- Redfish, over a real socket --------------------------------------------------------------------------------------


@pytest.fixture
def controller():
    server = Controller()
    yield server
    server.shutdown()
    server.server_close()


def read(controller, **config):
    return {
        r.source: (r.value, r.quantum) for r in RedfishMeter(RedfishConfig(controller.url, **config)).read()
    }


def test_energy_in_kwh_keeps_its_digits_and_power_comes_beside(controller):
    controller.environment(EnergykWh={"Reading": 10433.52}, PowerWatts={"Reading": 811.5})
    before = time.time_ns()
    readings = RedfishMeter(RedfishConfig(controller.url)).read()
    assert {(r.source, r.quantity, r.value, r.quantum) for r in readings} == {
        ("redfish-energy", "energy", 37_560_672_000_000, 36_000_000),
        ("redfish-power", "power", 811_500, 100),
    }
    assert all(before <= r.t_wall_ns <= time.time_ns() and r.t_error_ns < S for r in readings)


def test_a_lifetime_reading_and_joules_come_first(controller):
    controller.environment(EnergykWh={"Reading": 1.0, "LifetimeReading": 500.25})
    assert read(controller)["redfish-energy"] == (round(500.25 * KWH), 36_000_000)
    controller.environment(EnergykWh={"Reading": 1.0}, EnergyJoules={"Reading": 3600123.4})
    assert read(controller)["redfish-energy"] == (3_600_123_400, 100)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"EnergykWh": None, "PowerWatts": []},
        {"EnergykWh": {"Reading": None}, "PowerWatts": {"Reading": 0}},
        {"EnergykWh": {"Reading": True}, "PowerWatts": {"Reading": "812"}},
    ],
)
def test_where_environment_metrics_have_nothing_the_older_resource_is_read(controller, metrics):
    controller.environment(**metrics)
    assert read(controller) == {"redfish-power": (590_000, 1000)}


@pytest.mark.parametrize(
    "answer",
    [
        b"no json",
        b"[]",
        b'{"PowerWatts": {"Reading": NaN}}',
        b'{"PowerWatts": {"Reading": -4}}',
        b'{"PowerWatts": {"Reading": 1e999999999999999999999}}',
        b'{"PowerWatts": {"Reading": 1e400}}',
        b"[" * 100_000,
        b'{"x": "' + b"x" * MAX_ANSWER_BYTES + b'"}',
    ],
)
def test_an_answer_that_is_none_is_missing_and_ends_nothing(controller, answer, caplog):
    controller.answers["/redfish/v1/Chassis/1/EnvironmentMetrics"] = answer
    assert read(controller) == {}
    assert "missing" in caplog.text


def test_links_that_lead_elsewhere_are_not_followed(controller):
    controller.answers["/redfish/v1/Chassis/1"] = {
        "EnvironmentMetrics": {"@odata.id": "//evil.example/redfish/v1"},
        "Power": {"@odata.id": "@evil.example/redfish/v1"},
    }
    assert read(controller) == {}
    assert [path for path, _ in controller.headers_seen] == ["/redfish/v1/Chassis/1"]


def test_redirects_are_not_followed(controller, caplog):
    controller.status = 302
    assert read(controller) == {}
    assert "HTTP 302" in caplog.text
    assert [path for path, _ in controller.headers_seen] == ["/redfish/v1/Chassis/1"]


def test_the_login_comes_from_the_environment_and_never_into_the_log(controller, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("BMC_USER", "reader")
    monkeypatch.setenv("BMC_PASSWORD", "s3cret-pass")
    controller.login = "Basic " + base64.b64encode(b"reader:s3cret-pass").decode()
    login = {"user_variable": "BMC_USER", "password_variable": "BMC_PASSWORD"}
    assert read(controller, **login) == {"redfish-power": (590_000, 1000)}
    controller.login = "Basic another"
    meter = RedfishMeter(RedfishConfig(controller.url, **login))
    assert meter.read() == meter.read() == ()
    assert caplog.text.count("HTTP 401") == 1
    for secret in ("s3cret", controller.headers_seen[0][1][6:]):
        assert secret not in caplog.text + repr(vars(meter)["name"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RedfishConfig("ftp://bmc/redfish/v1/Chassis/1"), "not a chassis"),
        (RedfishConfig("https://bmc/"), "not a chassis"),
        (RedfishConfig("http://bmc/redfish/v1/Chassis/1", "HOME", "HOME"), "in the clear"),
        (RedfishConfig("https://bmc/redfish/v1/Chassis/1", "HOME"), "for user or password"),
        (RedfishConfig("https://bmc/redfish/v1/Chassis/1", "HOME", "NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE"),
        (RedfishConfig("https://bmc/redfish/v1/Chassis/1", check_hostname=False), "ca_file"),
        (RedfishConfig("https://bmc/redfish/v1/Chassis/1", ca_file="/nowhere.pem"), "/nowhere.pem"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(config, message):
    with pytest.raises(InputError, match=message):
        RedfishMeter(config)


def test_a_password_in_the_url_is_refused_without_repeating_it():
    with pytest.raises(InputError) as refused:
        RedfishMeter(RedfishConfig("https://root:calvin@bmc/redfish/v1/Chassis/1"))
    assert "calvin" not in str(refused.value)


def test_a_controller_that_hangs_or_is_gone_is_missing(controller, caplog):
    controller.delay_s = 0.5
    assert read(controller, timeout_s=0.1) == {}
    controller.shutdown()
    controller.server_close()
    assert read(controller) == {}
    assert caplog.text.count("missing") == 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return own_certificate(tmp_path_factory.mktemp("tls") / "bmc.pem")


def test_a_certificate_is_checked_unless_it_is_named(certificate, monkeypatch):
    monkeypatch.setenv("BMC", "x")
    server = Controller(certificate)
    try:
        login = {"user_variable": "BMC", "password_variable": "BMC"}
        assert read(server, **login) == {}
        assert read(server, ca_file=certificate, **login) == {}  # trusted, but names another host
        assert server.headers_seen == []  # the password did not leave
        assert read(server, ca_file=certificate, check_hostname=False, **login) == {
            "redfish-power": (590_000, 1000)
        }
    finally:
        server.shutdown()
        server.server_close()


# --- IPMI, with a stand-in on PATH ------------------------------------------------------------------------------------

DCMI = """
    Instantaneous power reading:                   %s Watts
    Minimum during sampling period:                 18 Watts
    Maximum during sampling period:               1318 Watts
    Average power reading over sample period:      402 Watts
    IPMI timestamp:                           Sat Nov 21 12:00:00 2026
    Sampling period:                          00000010 Seconds.
    Power reading state is:                   %s
"""


@pytest.fixture
def ipmitool(tmp_path, monkeypatch):
    """Puts a program named ipmitool on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def made(body):
        path = tmp_path / "ipmitool"
        path.write_text(f"#!{sys.executable} -S\nimport sys, time\n{body}\n")
        path.chmod(0o755)

    return made


def test_the_instantaneous_power_is_read_and_not_the_average(ipmitool):
    ipmitool(f"assert sys.argv[1:] == ['dcmi', 'power', 'reading']; print({DCMI % (655, 'activated')!r})")
    (reading,) = IpmiMeter().read()
    assert (reading.source, reading.quantity) == ("ipmi-dcmi-power", "power")
    assert (reading.value, reading.quantum) == (655_000, 1_000)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"print({DCMI % (655, 'deactivated')!r})", "deactivated"),
        (f"print({DCMI % (0, 'activated')!r})", "0 watts"),
        ("print('DCMI not supported')", "no instantaneous power"),
        ("sys.exit('Could not open device at /dev/ipmi0')", "Could not open device"),
        ("sys.stdout.buffer.write(bytes(range(256)))", "no instantaneous power"),
        ("time.sleep(20)", "timed out"),
    ],
)
def test_a_tool_that_does_not_answer_is_missing_and_says_why_once(ipmitool, body, reason, caplog):
    ipmitool(body)
    meter = IpmiMeter(timeout_s=0.5)
    assert meter.read() == meter.read() == ()
    assert caplog.text.count(reason) == 1


def test_without_the_tool_power_is_missing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert IpmiMeter().read() == ()
    assert "ipmitool" in caplog.text


# --- a power strip's file ---------------------------------------------------------------------------------------------


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
    energy, power = read_pdu_csv(path, "node-3", clock_error_s=2, accuracy_share=0.01)
    assert [b - a for a, b in pairwise(energy.t_wall_ns)] == [60 * S] * 3
    assert list(energy.values) == [36_000_000_000, 36_072_000_000, 36_108_000_000, 36_180_000_000]
    assert (energy.quantum, energy.max_gap_ns) == (36_000_000, 180 * S)
    assert (energy.host, energy.source, energy.clock_error_ns) == ("node-3", "pdu-csv-energy", 2 * S)
    assert list(power.values) == [800_000, 820_000, 820_000]
    found = energy.energy_between(energy.t_wall_ns[0], energy.t_wall_ns[3])
    assert found.energy_mj == 180_000_000


def test_local_times_need_their_zone(csv_file):
    path = csv_file("time,watts\n2026-03-01 13:00:00,800\n2026-03-01 13:00:10,800\n")
    with pytest.raises(InputError, match=r"pdu\.csv:2: .*no offset"):
        read_pdu_csv(path, "n")
    (berlin,) = read_pdu_csv(path, "n", time_zone="Europe/Berlin")
    (utc,) = read_pdu_csv(path, "n", time_zone="UTC")
    assert utc.t_wall_ns[0] - berlin.t_wall_ns[0] == 3600 * S
    with pytest.raises(InputError, match="Mars/Phobos"):
        read_pdu_csv(path, "n", time_zone="Mars/Phobos")


@pytest.mark.parametrize("time_", ["2026-10-25 02:30:00", "2026-03-29 02:30:00"])
def test_a_local_time_that_is_twice_or_never_is_refused(csv_file, time_):
    path = csv_file(f"time,watts\n2026-01-01 00:00:00,1\n{time_},800\n")
    with pytest.raises(InputError, match=r"pdu\.csv:3: .*ambiguous or skipped in Europe/Berlin"):
        read_pdu_csv(path, "n", time_zone="Europe/Berlin")


def test_a_gap_in_the_file_is_missing_and_a_short_silence_is_not(csv_file):
    rows = [f"2026-03-01T12:{m:02d}:00Z,600" for m in (0, 1, 2, 4, 5, 6, 7, 15, 16)]
    (power,) = read_pdu_csv(csv_file("time,watts\n" + "\n".join(rows)), "n")
    at = power.t_wall_ns
    assert power.energy_between(at[0], at[6]).energy_mj == 7 * 60 * 600_000
    assert power.energy_between(at[0], at[8]).note == "the meter was silent for 480 s"


def test_a_meter_that_was_set_back_is_reported_and_not_counted_across(csv_file, caplog):
    path = csv_file("time,kwh\n2026-03-01T12:00:00Z,10\n2026-03-01T12:01:00Z,0.5\n2026-03-01T12:02:00Z,0.6\n")
    (energy,) = read_pdu_csv(path, "n")
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
        read_pdu_csv(csv_file(text), "n")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv"):
        read_pdu_csv(tmp_path / "none.csv", "n")


# --- recording --------------------------------------------------------------------------------------------------------


class Scripted:
    """A meter that gives prepared readings; after the last one it fails."""

    name, failure = "scripted", ""

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self):
        found = self.readings.pop(0) if self.readings else "worn out"
        self.failure = found if isinstance(found, str) else ""
        return () if self.failure else found


def reading(seconds, value, source="redfish-energy", quantity="energy", quantum=100, t_error_ns=0):
    return NodeReading(source, quantity, seconds * S, value, quantum, t_error_ns)


def test_readings_wait_until_they_are_taken_and_are_taken_once():
    power = {"source": "redfish-power", "quantity": "power"}
    both = (reading(0, 100), reading(0, 700_000, **power))
    recorder = NodeRecorder(Scripted(both, (reading(20, 14_000_105),)))
    recorder.look()
    assert recorder.take() == both
    recorder.look()
    assert recorder.take() == (reading(20, 14_000_105),)
    assert recorder.take() == ()


def test_a_failure_is_told_once_and_again_after_it_had_ended():
    recorder = NodeRecorder(Scripted((reading(0, 1),), "HTTP 500", "HTTP 500", (reading(9, 2),), "HTTP 500"))
    for _ in range(6):
        recorder.look()
    taken = recorder.take()
    assert [getattr(t, "reason", None) for t in taken] == [None, "HTTP 500", None, "HTTP 500", "worn out"]
    assert [t.value for t in taken if isinstance(t, NodeReading)] == [1, 2]


def test_a_reading_from_before_the_last_one_is_left_out():
    recorder = NodeRecorder(Scripted((reading(10, 5),), (reading(9, 6),), (reading(11, 7),)))
    for _ in range(3):
        recorder.look()
    assert [r.value for r in recorder.take()] == [5, 7]


def test_a_recorder_nobody_asks_keeps_the_newest(monkeypatch):
    monkeypatch.setattr("millijoule.workers.node_meters.meter.MAX_WAITING", 3)
    recorder = NodeRecorder(Scripted(*[(reading(t, t),) for t in range(9)]))
    for _ in range(9):
        recorder.look()
    assert [r.value for r in recorder.take()] == [6, 7, 8]


def test_the_thread_reads_first_and_last_so_that_a_job_lies_between(controller):
    controller.environment(EnergykWh={"Reading": 1.0001})
    recorder = NodeRecorder(RedfishMeter(RedfishConfig(controller.url)), period_s=60)
    recorder.start()
    deadline = time.monotonic() + 20
    while not recorder._waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.time_ns()
    controller.environment(EnergykWh={"Reading": 1.0002})
    ended = time.time_ns()
    recorder.stop()
    assert not recorder._thread.is_alive()
    first, last = recorder.take()
    assert first.t_wall_ns <= began
    assert ended <= last.t_wall_ns
    assert last.value - first.value == 360_000
