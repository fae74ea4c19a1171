"""A host whose devices, clock and book are stand-ins, shared by the meters that a test opens."""

import pytest
from support.counters import Clock, FakeNvml, FakePowercap

from millijoule.workers.meters.meter import open_meter


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def nvml():
    return FakeNvml()


@pytest.fixture
def powercap(tmp_path):
    return FakePowercap(tmp_path / "powercap")


@pytest.fixture
def open_fake(tmp_path, clock):
    """Opens meters of workers that share a host; without arguments one that sees nothing."""

    def opened(gpus=None, nvml=None, powercap=None):
        return open_meter(
            gpus,
            nvml=nvml,
            powercap_root=powercap.root if powercap else tmp_path / "none",
            boot_id="boot",
            book_directory=tmp_path,
            clock_ns=clock,
        )

    return opened
