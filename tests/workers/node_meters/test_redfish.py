"""A management controller, over a real socket."""

import base64
import logging
import time

import pytest
from support.redfish import Controller, own_certificate

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.node_meters.meter import MeterFailure
from millijoule.workers.node_meters.redfish import MAX_ANSWER_BYTES, RedfishMeter

S = 1_000_000_000
KWH = 3_600_000_000
PATH = "/redfish/v1/Chassis/1"
BMC = f"https://bmc{PATH}"


@pytest.fixture
def controller():
    server = Controller()
    yield server
    server.shutdown()
    server.server_close()


def opened(url, timeout_s=10.0, **config):
    config = NodeMeterConfig(("*",), "redfish", url, **config)
    config.check()
    return RedfishMeter(config, "host", timeout_s)


def read(controller, **config):
    return {r.source: (r.value, r.quantum) for r in opened(controller.url, **config).read()}


def test_energy_in_kwh_keeps_its_digits_and_power_comes_beside(controller):
    controller.environment(EnergykWh={"Reading": 10433.52}, PowerWatts={"Reading": 811.5})
    before = time.time_ns()
    readings = opened(controller.url).read()
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
def test_an_answer_that_is_none_is_missing_and_ends_nothing(controller, answer):
    controller.answers["/redfish/v1/Chassis/1/EnvironmentMetrics"] = answer
    with pytest.raises(MeterFailure):
        read(controller)


def test_links_that_lead_elsewhere_are_not_followed(controller):
    controller.answers["/redfish/v1/Chassis/1"] = {
        "EnvironmentMetrics": {"@odata.id": "//evil.example/redfish/v1"},
        "Power": {"@odata.id": "@evil.example/redfish/v1"},
    }
    with pytest.raises(MeterFailure, match="no energy or power"):
        read(controller)
    assert [path for path, _ in controller.headers_seen] == ["/redfish/v1/Chassis/1"]


def test_redirects_are_not_followed(controller):
    controller.status = 302
    with pytest.raises(MeterFailure, match="HTTP 302"):
        read(controller)
    assert [path for path, _ in controller.headers_seen] == ["/redfish/v1/Chassis/1"]


def test_the_login_comes_from_the_environment_and_never_into_the_log(controller, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("BMC_USER", "reader")
    monkeypatch.setenv("BMC_PASSWORD", "s3cret-pass")
    controller.login = "Basic " + base64.b64encode(b"reader:s3cret-pass").decode()
    login = {"user_variable": "BMC_USER", "password_variable": "BMC_PASSWORD"}
    assert read(controller, **login) == {"redfish-power": (590_000, 1000)}
    controller.login = "Basic another"
    meter = opened(controller.url, **login)
    with pytest.raises(MeterFailure, match="HTTP 401") as failure:
        meter.read()
    for secret in ("s3cret", controller.headers_seen[0][1][6:]):
        assert secret not in caplog.text + meter.name + str(failure.value)


@pytest.mark.parametrize(
    ("url", "config", "message"),
    [
        ("ftp://bmc/redfish/v1/Chassis/1", {}, "not a chassis"),
        ("https://bmc/", {}, "not a chassis"),
        ("http://bmc" + PATH, {"user_variable": "HOME", "password_variable": "HOME"}, "in the clear"),
        (BMC, {"user_variable": "HOME"}, "for user or password"),
        (BMC, {"user_variable": "HOME", "password_variable": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        (BMC, {"check_hostname": False}, "ca_file"),
        (BMC, {"ca_file": "/nowhere.pem"}, "/nowhere.pem"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(url, config, message):
    with pytest.raises(InputError, match=message):
        opened(url, **config)


def test_a_password_in_the_url_is_refused_without_repeating_it():
    with pytest.raises(InputError) as refused:
        opened("https://root:calvin@bmc" + PATH)
    assert "calvin" not in str(refused.value)


def test_a_controller_that_hangs_or_is_gone_is_missing(controller):
    controller.delay_s = 0.5
    with pytest.raises(MeterFailure, match="timed out"):
        read(controller, timeout_s=0.1)
    controller.shutdown()
    controller.server_close()
    with pytest.raises(MeterFailure, match="refused"):
        read(controller)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return own_certificate(tmp_path_factory.mktemp("tls") / "bmc.pem")


def test_a_certificate_is_checked_unless_it_is_named(certificate, monkeypatch):
    monkeypatch.setenv("BMC", "x")
    server = Controller(certificate)
    try:
        login = {"user_variable": "BMC", "password_variable": "BMC"}
        with pytest.raises(MeterFailure, match="CERTIFICATE_VERIFY_FAILED"):
            read(server, **login)
        with pytest.raises(
            MeterFailure, match="CERTIFICATE_VERIFY_FAILED"
        ):  # trusted, but names another host
            read(server, ca_file=str(certificate), **login)
        assert server.headers_seen == []  # the password did not leave
        assert read(server, ca_file=str(certificate), check_hostname=False, **login) == {
            "redfish-power": (590_000, 1000)
        }
    finally:
        server.shutdown()
        server.server_close()
