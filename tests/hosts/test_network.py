"""The network that other tests cut: what passes between hosts, and what each has for itself."""

import sys

import pytest
from support.hosts.network import Hosts, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 7))
print("ready", flush=True)
while True:
    s.sendto(*s.recvfrom(100))
"""
#: How many of so many packets come back, and the least seconds that takes.
PING = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.3)
took = []
for i in range(int(sys.argv[2])):
    began = time.monotonic()
    s.sendto(b"%d" % i, (sys.argv[1], 7))
    try:
        while s.recv(100) != b"%d" % i:
            pass
        took.append(time.monotonic() - began)
    except TimeoutError:
        pass
print(len(took), min(took, default=0))
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts("a", "b", "c") as hosts:
        yield hosts


@pytest.fixture
def ping(hosts, tmp_path):
    """`ping("a", "b", packets)`: how many came back, and the least seconds."""

    def answers(name, other, packets=2):
        done = hosts[name].run([sys.executable, "-S", "-c", PING, hosts[other].address, packets])
        assert done.returncode == 0, done.stderr
        came, seconds = done.stdout.split()
        return int(came), float(seconds)

    for name, host in hosts.by_name.items():
        if not host.processes("sendto"):
            log = tmp_path / f"{name}.log"
            host.spawn([sys.executable, "-S", "-c", ECHO], log)
            while "ready" not in log.read_text():
                pass
    yield answers
    hosts.heal()


def test_a_cut_is_between_two_and_silent_both_ways(hosts, ping):
    assert ping("a", "b")[0] == 2
    hosts.cut("a", "b")
    assert (ping("a", "b")[0], ping("b", "a")[0], ping("a", "c")[0]) == (0, 0, 2)
    hosts.cut("a", "c")
    hosts.heal("a", "b")
    assert (ping("a", "b")[0], ping("a", "c")[0]) == (2, 0)


def test_delayed_packets_come_later_and_dropped_ones_in_part(hosts, ping):
    hosts.delay("a", "b", 0.04)
    came, seconds = ping("b", "a", 5)
    assert came == 5
    assert seconds >= 0.08
    hosts.drop("a", "b", 0.4)
    assert 0 < ping("a", "b", 20)[0] < 20
    assert ping("a", "c", 5)[0] == 5


def test_a_host_is_alone_with_its_name_its_processes_and_its_boot(hosts):
    words = "hostname; cat /proc/sys/kernel/random/boot_id; ls /proc | grep -c '^[0-9]'; ls /dev/shm | wc -l"
    seen = [hosts[name].run(["bash", "-c", words]).stdout.split() for name in "ab"]
    (name_a, boot_a, processes, in_shared_memory), (name_b, boot_b, *_) = seen
    assert (name_a, name_b) == ("a", "b")
    assert boot_a != boot_b
    assert int(processes) < 10
    assert in_shared_memory == "0"


def test_a_host_that_is_killed_is_silent_and_comes_back_as_another_boot(hosts, ping, tmp_path):
    before = hosts["c"].boot_id
    (echo,) = hosts["c"].processes("sendto")
    hosts.kill_host("c")
    assert not echo.is_running()
    assert ping("a", "c")[0] == 0
    hosts.start_host("c")
    assert hosts["c"].boot_id != before
    assert hosts["c"].processes("sendto") == []
