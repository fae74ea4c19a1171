"""`--node-meter`: a word, a URL, a file; what cannot work is named with its place."""

import pytest

from millijoule.jobs.options.node_meters import parse_node_meters
from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.actor import open_node_meter
from millijoule.workers.node_meters.config import DeclaredRest, find_node_meter
from millijoule.workers.node_meters.ipmi import IpmiMeter
from millijoule.workers.node_meters.redfish import RedfishMeter

CHASSIS = "https://bmc-{host}/redfish/v1/Chassis/1"

FILE = """
[[node]]
nodes = ["gpu-1?", "10.0.0.20"]
meter = "redfish"
url = "https://bmc-{host}/redfish/v1/Chassis/1"
user_variable = "BMC_USER"
password_variable = "BMC_PASSWORD"
ca_file = "/etc/bmc.pem"
check_hostname = false
period_s = 2
accuracy_share = 0.01
rest_watts = 180.5
rest_tolerance_watts = 30

[[node]]
nodes = ["*"]
meter = "ipmi"
"""


@pytest.fixture
def file(tmp_path):
    def made(text):
        path = tmp_path / "meters.toml"
        path.write_text(text)
        return str(path)

    return made


def test_a_word_and_a_url_are_for_every_node():
    (ipmi,) = parse_node_meters("ipmi", "180+-30")
    assert (ipmi.meter, ipmi.rest) == ("ipmi", DeclaredRest(180_000, 30_000))
    assert find_node_meter([ipmi], "any", "10.0.0.1") is ipmi
    assert isinstance(open_node_meter(ipmi, "any"), IpmiMeter)
    (redfish,) = parse_node_meters(f"redfish:{CHASSIS}", None)
    assert redfish.rest is None
    meter = open_node_meter(redfish, "gpu-17")
    assert isinstance(meter, RedfishMeter)
    assert meter.name == "https://bmc-gpu-17/redfish/v1/Chassis/1"
    assert redfish.name_on("gpu-17") == f"redfish {meter.name}"
    assert parse_node_meters(None, None) == ()


def test_a_file_names_a_meter_per_node_and_the_first_that_fits_counts(file):
    configs = parse_node_meters(file(FILE), None)
    assert [
        find_node_meter(configs, host, ip).meter
        for host, ip in [("gpu-17", "10.0.0.17"), ("gpu-170", "10.0.0.18"), ("head", "10.0.0.20")]
    ] == ["redfish", "ipmi", "redfish"]
    first = configs[0]
    assert (first.period_s, first.accuracy_share, first.check_hostname) == (2, 0.01, False)
    assert first.rest == DeclaredRest(180_500, 30_000)
    assert find_node_meter(configs[:1], "cpu-1", "10.0.0.1") is None


def test_the_variables_are_those_of_the_node_and_asked_there(file, monkeypatch):
    configs = parse_node_meters(file(FILE), None)
    monkeypatch.setenv("BMC_USER", "reader")
    monkeypatch.delenv("BMC_PASSWORD", raising=False)
    with pytest.raises(InputError, match="BMC_PASSWORD is not set"):
        open_node_meter(configs[0], "gpu-17")


@pytest.mark.parametrize(
    ("meter", "rest", "words"),
    [
        ("redfish:https://bmc/", None, "--node-meter: https://bmc/: not a chassis"),
        ("redfish:", None, "redfish needs the url"),
        ("redfish:https://a:b@bmc/redfish/v1/Chassis/1", None, "name environment variables"),
        ("redfish:http://[bmc/redfish/v1", None, "cannot be read"),
        ("nowhere.toml", None, "nowhere.toml: no such file, and neither ipmi nor redfish:URL"),
        (None, "25+-5", "--node-rest 25[+]-5: needs --node-meter"),
        ("meters.toml", "25+-5", "say rest_watts and rest_tolerance_watts in meters.toml"),
        ("ipmi", "25", "--node-rest 25: watts and by how much"),
        ("ipmi", "-25+-5", "watts and by how much"),
        ("ipmi", "1000000+-5", "a number of watts"),
    ],
)
def test_options_that_cannot_work_are_refused(meter, rest, words):
    with pytest.raises(InputError, match=words):
        parse_node_meters(meter, rest)


def node(**keys):
    lines = [f"{k} = {v}" for k, v in {"nodes": '["*"]', "meter": '"ipmi"', **keys}.items() if v is not None]
    return "[[node]]\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"needs \[\[node\]\] tables"),
        ("[node]\nmeter = 'ipmi'\n", r"needs \[\[node\]\] tables"),
        ("node = [1]\n", r"\[\[node\]\] 1: .*object.*int"),
        ("[[node]]\nx = \n", "meters.toml: "),
        (node(watts="3"), "no field is named 'watts'"),
        (node(nodes='"*"'), r"array.*str.*\$\.nodes"),
        (node(nodes='[""]'), r"length.*\$\.nodes"),
        (node(nodes="[]"), "nodes: name at least one host"),
        (node(nodes="[1]"), r"str.*int.*\$\.nodes"),
        (node(nodes=None), "missing required field `nodes`"),
        (node(meter='"wattmeter"'), "one of ipmi, redfish"),
        (node(url='"https://bmc/redfish/v1/Chassis/1"'), "url, login and certificate have no meaning"),
        (node(period_s="0.1"), "period_s 0.1: from 1 to 600"),
        (node(period_s='"10"'), r"float.*str.*\$\.period_s"),
        (node(period_s="true"), r"float.*bool.*\$\.period_s"),
        (node(accuracy_share="1.5"), "accuracy_share 1.5: a part of 1"),
        (node(rest_watts="150"), "declared with its tolerance"),
        (node(rest_watts="nan", rest_tolerance_watts="1"), "rest_watts nan"),
        (node(check_hostname="1"), r"bool.*int.*\$\.check_hostname"),
        (node(meter='"redfish"'), "redfish needs the url"),
        (
            node(meter='"redfish"', url='"http://bmc/redfish/v1/Chassis/1"', user_variable='"U"')
            + "password_variable = 'P'\n",
            "in the clear",
        ),
        (node(meter='"redfish"', url=f'"{CHASSIS}"', check_hostname="false"), "ca_file"),
        (node(meter='"redfish"', url=f'"{CHASSIS}"', user_variable='"U"'), "both or neither"),
        (node() + node(meter='"x"'), r"\[\[node\]\] 2: meter 'x'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_table_and_key(file, text, words):
    with pytest.raises(InputError, match=words):
        parse_node_meters(file(text), None)
