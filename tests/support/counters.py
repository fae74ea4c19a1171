"""Stand-ins for the hardware a meter reads: NVML's library, the powercap folder, the clock."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

import pynvml

SECOND = 1_000_000_000
INTEL_RANGE_UJ = 262_143_328_850
UUIDS = ("GPU-11111111-aaaa-bbbb-cccc-000000000000", "GPU-12222222-aaaa-bbbb-cccc-000000000000")
GPU0 = f"gpu:{UUIDS[0]}"
PACKAGE, DRAM = "cpu:package-0", "dram:package-0"


class Clock:
    """CLOCK_MONOTONIC, moved by hand."""

    def __init__(self):
        self.ns = 1_000 * SECOND

    def __call__(self):
        return self.ns

    def advance(self, seconds):
        self.ns += int(seconds * SECOND)


class FakeNvml:
    """The part of pynvml we call, with counters and faults to set from a test. Any other call is an AttributeError."""

    def __init__(self, uuids=UUIDS, names=None):
        self.uuids = uuids
        self.names = names or ["NVIDIA H200"] * len(uuids)
        self.energy_mj = dict.fromkeys(uuids, 5_000_000)
        self.mig = {}
        self.error = None  # of every energy read
        self.field_error = 0  # nvmlReturn of the field value
        self.latency = lambda: None
        self.sample_age_ns = 0
        self.reads = 0
        self.power_mw = dict.fromkeys(uuids, (650_000, 700_000))  # fields 185 and 186
        self.power_error = None
        self.power_field_errors = (0, 0)
        self.power_reads = 0

    def __getattr__(self, name):
        if not name.startswith("NVML"):  # constants and exceptions do
            raise AttributeError(name)
        return getattr(pynvml, name)

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        pass

    def nvmlDeviceGetCount(self):
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, i):
        return self.uuids[i]

    def nvmlDeviceGetUUID(self, handle):
        return handle

    def nvmlDeviceGetName(self, handle):
        return self.names[self.uuids.index(handle)]

    def nvmlSystemGetDriverVersion(self):
        return "570.1"

    def nvmlDeviceGetMigMode(self, handle):
        if handle not in self.mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.mig[handle]

    def nvmlDeviceGetFieldValues(self, handle, fields):
        if fields == [83]:
            self._fail()
            return [self._value(self.field_error, "ULL", self.energy_mj[handle])]
        assert fields == [(185, 0), (186, 0)], "only the fields we say, for the GPU itself"
        self.power_reads += 1
        self.latency()
        if self.power_error is not None:
            raise pynvml.NVMLError(self.power_error)
        average, instant = self.power_mw[handle]
        return [
            self._value(error, "U", mw)
            for error, mw in zip(self.power_field_errors, (average, instant), strict=True)
        ]

    def _value(self, error, kind, number):
        value = pynvml.c_nvmlFieldValue_t()
        value.nvmlReturn = error
        if kind == "ULL":
            value.valueType, value.value.ullVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, number
        else:
            value.valueType, value.value.uiVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, number
        value.timestamp = (time.time_ns() - self.sample_age_ns) // 1000 if self.sample_age_ns else 0
        return value

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._fail()
        return self.energy_mj[handle]

    def _fail(self):
        self.reads += 1
        self.latency()
        if self.error is not None:
            raise pynvml.NVMLError(self.error)


class FakePowercap:
    """A powercap folder as Linux shows it on a two-package host."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        self.add("intel-rapl:0", "package-0", 1_000_000)
        self.add("intel-rapl:0:0", "core", 1)
        self.add("intel-rapl:0:1", "dram", 500_000)
        self.add("intel-rapl:1", "psys", 9_000_000)
        self.add("intel-rapl-mmio:0", "package-0", 1_000_000)
        (root / "intel-rapl").mkdir()
        (root / "dtpm").mkdir()

    def add(self, zone, name, energy_uj):
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{INTEL_RANGE_UJ}\n")
        self.set(zone, energy_uj)

    def set(self, zone, energy_uj):
        (self.root / "next").write_text(f"{energy_uj}\n")
        os.replace(self.root / "next", self.root / zone / "energy_uj")

    @contextmanager
    def counting(self, *zones):
        """The counters of `zones` run within this block, a joule every few milliseconds."""
        ended = threading.Event()

        def count():
            while not ended.wait(0.005):
                for zone in zones:
                    self.set(zone, int((self.root / zone / "energy_uj").read_text()) + 1_000_000)

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
