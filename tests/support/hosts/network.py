"""Several hosts on one machine, each alone: own address, processes, name, shared memory and boot, joined by a router.

    with Hosts("head", "w1", "store") as hosts:
        hosts["w1"].run(["ping", "-c1", hosts["head"].address])
        hosts.cut("w1", "store")      # silence both ways, as when a cable is pulled; connections stay open
        hosts.heal()
        hosts.kill_host("w1")         # power off: nothing is said to anybody any more

Made of Linux namespaces without names, which end with the processes in them, so that nothing stays behind whatever kills
a test. The router forwards between point-to-point links; what it is to lose it loses in the middle, where both ends see the
same silence (a blackhole rule, no firewall needed), and what is to be slow passes `slow_link.py`. Needs root.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

#: Files that a host has for itself instead of the machine's.
_OWN_FILES = {
    "hosts": "/etc/hosts",
    "resolv.conf": "/etc/resolv.conf",
    "boot_id": "/proc/sys/kernel/random/boot_id",
}
#: A host's first process adopts what others leave behind, as every first process.
_INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"
_CUT, _SLOW = 100, 200  # priorities of the router's rules
_SLOW_TABLE, _SLOW_DEVICE = 77, "slow"
_START_TIMEOUT_S = 20.0
_CLONE_NEWNET = 0x40000000


@cache
def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    absent = [name for name in ("unshare", "nsenter", "ip", "setpriv", "mount") if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install iproute2 util-linux)"
    namespaces = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(namespaces, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()}"


class Host:
    """One of `Hosts`; its number decides its address. Made and started by them."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.number = number
        self.address = f"10.77.{number}.2"
        self.folder = folder / name
        self.folder.mkdir()
        self.boots = 0
        self._namespaces: subprocess.Popen[str] | None = None

    @property
    def on(self) -> bool:
        return self._namespaces is not None

    @property
    def boot_id(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.folder}/{self.boots}"))

    @property
    def pid(self) -> int:
        """Of a process in the host's network."""
        assert self._namespaces is not None, f"{self.name} is off"
        return self._namespaces.pid

    @property
    def entry(self) -> list[str]:
        """What stands before a command so that it runs on this host."""
        (init,) = psutil.Process(self.pid).children()
        return ["nsenter", "--target", str(init.pid), "--net", "--uts", "--mount", "--pid", "--"]

    def start(self, etc_hosts: str) -> None:
        self.boots += 1
        own = {"hosts": etc_hosts, "resolv.conf": "", "boot_id": f"{self.boot_id}\n"}
        for name, text in own.items():
            (self.folder / name).write_text(text)
        (self.folder / "tmp").mkdir(exist_ok=True)
        binds = [f"mount --bind {self.folder / name} {path}" for name, path in _OWN_FILES.items()]
        lines = [
            "set -e",
            "mount -t tmpfs tmpfs /dev/shm",
            *binds,
            f"hostname {self.name}",
            "ip link set lo up",
        ]
        script = "\n".join([*lines, "echo ready", 'exec "$0" -S -c "$1"'])
        self._namespaces = subprocess.Popen(
            # the kernel ends the host with this process, however that ends
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *(
                    "unshare",
                    "--net",
                    "--uts",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child=KILL",
                    "--mount-proc",
                ),
                *("bash", "-c", script, sys.executable, _INIT),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._namespaces.stdout is not None
        if self._namespaces.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {self.name} did not start")

    def kill(self) -> None:
        """End every process of the host at once."""
        if self._namespaces is not None:
            init = psutil.Process(self._namespaces.pid).children()
            self._namespaces.kill()
            self._namespaces.communicate()
            psutil.wait_procs(init)
            self._namespaces = None

    def run(
        self, command: Sequence[object], env: dict[str, str] | None = None, timeout_s: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; stdout and stderr captured."""
        words = [*self.entry, *map(str, command)]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)

    def spawn(
        self, command: Sequence[object], log: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start and return at once; what it says goes to the end of `log`. It ends with the host."""
        with log.open("a") as out:
            return subprocess.Popen(
                [*self.entry, *map(str, command)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, words: str = "") -> list[psutil.Process]:
        """The host's live processes that have `words` in their command line."""
        (init,) = psutil.Process(self.pid).children()
        here, found = os.readlink(f"/proc/{init.pid}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == here and words in " ".join(
                    process.cmdline()
                ):
                    found.append(process)
            except (OSError, psutil.Error):
                pass
        return [p for p in found if p.pid != init.pid]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and threads it starts meanwhile, use the host's network."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(namespace: int) -> None:
            if libc.setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            enter(there)
            yield
        finally:
            enter(before)
            os.close(before)
            os.close(there)


class Hosts:
    """Hosts of these names, and the router between them. Use as a context manager."""

    def __init__(self, *names: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mj-h-"))  # short: Ray's socket paths have a length limit
        self.by_name = {name: Host(name, i, self.folder) for i, name in enumerate(names, 1)}
        self._router: subprocess.Popen[str] | None = None
        self._slow: subprocess.Popen[str] | None = None
        self._rules: set[tuple[int, str, str]] = set()

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    def start_host(self, name: str) -> None:
        """Switch on a host that is off, with nothing running on it."""
        host, router = self[name], f"10.77.{self[name].number}.1"
        table = [f"{other.address} {other.name}" for other in self.by_name.values()]
        host.start("\n".join(["127.0.0.1 localhost", *table, ""]))
        link = f"r{host.number}"
        self._ip(
            f"link add {link} type veth peer name eth0 netns {host.pid}",
            f"addr add {router}/24 dev {link}",
            f"link set {link} up",
        )
        _ip(
            host.pid,
            f"addr add {host.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {router}",
        )
        self.heal(name)

    def kill_host(self, name: str) -> None:
        """Power off: first nobody hears it any more, then its processes are gone."""
        self.cut(name, *(n for n in self.by_name if n != name))
        self._ip(f"link del r{self[name].number}")  # the kernel would, but takes its time
        self[name].kill()

    def cut(self, name: str, *others: str) -> None:
        """No packet passes between `name` and any of `others`."""
        for other in others:
            for one, two in ((name, other), (other, name)):
                self._add(_CUT, one, two, "blackhole")

    def delay(self, name: str, other: str, seconds: float) -> None:
        """Packets between the two take `seconds` more, each way."""
        self._slow_link(name, other, seconds, 0.0)

    def drop(self, name: str, other: str, share: float) -> None:
        """Of the packets between the two, `share` get lost, each way."""
        self._slow_link(name, other, 0.0, share)

    def heal(self, name: str | None = None, other: str | None = None) -> None:
        """Undo what was done to the link of two, to those of one, or to all."""
        for rule in list(self._rules):
            priority, one, two = rule
            if {name, other} - {None} <= {one, two}:
                self._rules.discard(rule)
                self._ip(f"rule del pref {priority} from {self[one].address} to {self[two].address}")

    def _slow_link(self, name: str, other: str, delay_s: float, drop: float) -> None:
        if self._slow is None:
            command = [
                *_in_network(self._pid),
                sys.executable,
                str(Path(__file__).with_name("slow_link.py")),
                _SLOW_DEVICE,
            ]
            self._slow = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._slow.stdout is not None
            assert self._slow.stdout.readline() == "ready\n"
            self._ip(
                f"link set {_SLOW_DEVICE} up", f"route add default dev {_SLOW_DEVICE} table {_SLOW_TABLE}"
            )
        assert self._slow.stdin is not None
        assert self._slow.stdout is not None
        for one, two in ((name, other), (other, name)):
            link = {"from": self[one].address, "to": self[two].address, "delay_s": delay_s, "drop": drop}
            self._slow.stdin.write(f"{json.dumps(link)}\n")
            self._slow.stdin.flush()
            assert self._slow.stdout.readline() == "set\n"
            # what comes back from there goes on as if nothing had been
            self._add(_SLOW, one, two, f"iif r{self[one].number} lookup {_SLOW_TABLE}")

    def _add(self, priority: int, one: str, two: str, action: str) -> None:
        if (priority, one, two) not in self._rules:
            self._rules.add((priority, one, two))
            self._ip(f"rule add pref {priority} from {self[one].address} to {self[two].address} {action}")

    @property
    def _pid(self) -> int:
        assert self._router is not None
        return self._router.pid

    def _ip(self, *commands: str) -> None:
        _ip(self._pid, *commands)

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        forward = (
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0"
        )
        self._router = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--net"),
                "bash",
                "-c",
                f"{forward} && echo ready && exec sleep inf",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._router.stdout is not None
        if self._router.stdout.readline() != "ready\n":
            raise RuntimeError("the router did not start")
        for name in self.by_name:
            self.start_host(name)

    def __exit__(self, *_: object) -> None:
        for host in self.by_name.values():
            host.kill()
        for process in (self._slow, self._router):
            if process is not None:
                process.kill()
                process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


def _in_network(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--"]


def _ip(pid: int, *commands: str) -> None:
    """Run lines of `ip` in the network of the process `pid`."""
    lines = "".join(f"{line}\n" for line in commands)
    subprocess.run([*_in_network(pid), "ip", "-batch", "-"], input=lines, text=True, check=True)
