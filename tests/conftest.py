"""Fixtures for all tests: S3 servers, started once per run, and the proxy that makes them fail."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest
from s3_servers import CephGateway, FaultProxy, MotoServer, RcloneS3, S3Endpoint
from support.cluster import RayCluster
from support.tools import say_what_was_skipped

#: Before PyTorch is imported. The tests' tensors are small: beside other processes, a second thread mostly waits for the first,
#: and a training step takes six times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


#: Fixtures behind which real servers stand.
SERVERS = {"moto_s3", "rclone_s3", "ceph", "ceph_gateway", "ray_cluster", "ray_address"}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays until the end: millions of objects that no look for garbage walks through again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray or an S3 server: `make test-fast` leaves it out."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        kinds = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if (
            fixtures & SERVERS
            or item.path.parent.name in ("integration", "chaos", "hosts")
            or any(kind in ("moto", "rclone", "ceph") for kind in kinds if isinstance(kind, str))
        ):
            item.add_marker("servers")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, on CI."""
    say_what_was_skipped(terminalreporter)


def _skip_or_fail(missing: str | None) -> None:
    """Skip where a server is not installed; on CI everything must be there, or nothing would ever test it."""
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    """No file that this process writes must survive a power cut, and waiting for a disk is most of the time of a small job. Drivers and
    workers in processes of their own do wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def imports_stay_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that releases memory looks for garbage among what tests make: among all that was imported it takes half a second."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Endpoint]:
    with MotoServer() as server:
        yield server.endpoint


@pytest.fixture(scope="session")
def rclone_s3() -> Iterator[S3Endpoint]:
    _skip_or_fail(RcloneS3.missing())
    with RcloneS3() as server:
        yield server.endpoint


@pytest.fixture(scope="session")
def ceph_gateway() -> Iterator[CephGateway]:
    _skip_or_fail(CephGateway.missing())
    with CephGateway() as server:
        yield server


@pytest.fixture(scope="session")
def ceph(ceph_gateway: CephGateway) -> S3Endpoint:
    return ceph_gateway.endpoint


@pytest.fixture
def fault_proxy() -> Iterator[Callable[[S3Endpoint], FaultProxy]]:
    """`fault_proxy(endpoint)` starts a proxy in front of a server; all are stopped with the test."""
    started: list[FaultProxy] = []

    def start(upstream: S3Endpoint) -> FaultProxy:
        proxy = FaultProxy(upstream)
        started.append(proxy)
        proxy.start()
        return proxy

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture
def s3_env(monkeypatch: pytest.MonkeyPatch) -> Callable[[S3Endpoint], None]:
    """`s3_env(endpoint)` points the AWS_* variables of this process at a server until the test ends."""

    def use(endpoint: S3Endpoint) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in endpoint.env().items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A head with two CPUs, for tests that leave it as they found it. Each start costs ten seconds; share it."""
    with RayCluster(head_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ray_address(ray_cluster: RayCluster) -> str:
    return ray_cluster.address
