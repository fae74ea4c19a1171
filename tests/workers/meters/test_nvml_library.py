"""Our binding of NVML against `pynvml`'s structures and constants, and against a C library with NVML's signatures."""

import ctypes
import shutil
import subprocess

import pynvml
import pytest

from millijoule.workers.meters import nvml_library
from millijoule.workers.meters.nvml import GpuCounter, GpuPower, open_gpus
from millijoule.workers.meters.nvml_library import FieldValue, NVMLError, NvmlLibrary

# Declarations as in nvml.h 13. Two boards; the second one refuses the energy counter, and field 185 everywhere.
SOURCE = r"""
#include <string.h>
typedef int nvmlReturn_t;
typedef struct { int n; } *nvmlDevice_t;
typedef union { double dVal; int siVal; unsigned int uiVal; unsigned long ulVal; unsigned long long ullVal;
                signed long long sllVal; unsigned short usVal; } nvmlValue_t;
typedef enum { T_DOUBLE = 0, T_UINT = 1, T_ULONG = 2, T_ULL = 3 } nvmlValueType_t;
typedef struct { unsigned int fieldId; unsigned int scopeId; long long timestamp; long long latencyUsec;
                 nvmlValueType_t valueType; nvmlReturn_t nvmlReturn; nvmlValue_t value; } nvmlFieldValue_t;
static struct { int n; } boards[2] = {{0}, {1}};
static int up;
nvmlReturn_t nvmlInit_v2(void) { up = 1; return 0; }
nvmlReturn_t nvmlShutdown(void) { int was = up; up = 0; return was ? 0 : 1; }
const char *nvmlErrorString(nvmlReturn_t r) { return r == 3 ? "Not Supported" : "Uninitialized"; }
nvmlReturn_t nvmlSystemGetDriverVersion(char *s, unsigned int n) { strncpy(s, "580.65.06", n); return 0; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *n) { *n = 2; return up ? 0 : 1; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int i, nvmlDevice_t *d) { *d = (nvmlDevice_t)&boards[i]; return 0; }
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *s, unsigned int n) {
  strncpy(s, d->n ? "GPU-22222222-aaaa" : "GPU-11111111-aaaa", n); return 0; }
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t d, char *s, unsigned int n) { strncpy(s, "NVIDIA H200", n); return 0; }
nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t d, unsigned int *c, unsigned int *p) { *c = 0; *p = 1; return d->n ? 3 : 0; }
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t d, unsigned long long *e) {
  *e = 1234567890123ULL; return d->n ? 3 : 0; }
nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t d, int n, nvmlFieldValue_t *v) {
  for (int i = 0; i < n; i++) {
    v[i].timestamp = 1700000000000000LL; v[i].latencyUsec = 25; v[i].nvmlReturn = 0;
    if (v[i].fieldId == 83) { v[i].valueType = T_ULL; v[i].value.ullVal = 9876543210987ULL; v[i].nvmlReturn = d->n ? 3 : 0; }
    else if (v[i].fieldId == 186 && v[i].scopeId == 0) { v[i].valueType = T_UINT; v[i].value.uiVal = 654321; }
    else v[i].nvmlReturn = 3;
  }
  return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libnvml.so", folder / "nvml.c"],
        check=True,
    )
    return NvmlLibrary(str(folder / "libnvml.so"))


def test_constants_are_those_of_pynvml():
    names = [name for name in vars(NvmlLibrary) if name.startswith("NVML_")]
    assert len(names) == 9
    assert {n: getattr(NvmlLibrary, n) for n in names} == {n: getattr(pynvml, n) for n in names}


def test_the_field_value_lies_in_memory_as_in_pynvml():
    theirs = pynvml.c_nvmlFieldValue_t
    assert ctypes.sizeof(FieldValue) == ctypes.sizeof(theirs)
    for name, _ in FieldValue._fields_:
        assert getattr(FieldValue, name).offset == getattr(theirs, name).offset
        assert getattr(FieldValue, name).size == getattr(theirs, name).size


def test_every_function_has_the_name_it_has_in_pynvml():
    functions = [name for name in vars(NvmlLibrary) if name.startswith("nvml")]
    assert functions
    assert all(callable(getattr(pynvml, name)) for name in functions)


def test_boards_are_found_by_uuid_and_read(library):
    gpus = open_gpus(["GPU-11111111-aaaa", "GPU-2222"], library)
    assert gpus.uuids == ("GPU-11111111-aaaa", "GPU-22222222-aaaa")
    assert gpus.names == ("NVIDIA H200", "NVIDIA H200")
    assert gpus.driver_version == "580.65.06"
    first, second = gpus.counters
    assert isinstance(first, GpuCounter)
    assert first.read()[0] == 9876543210987
    with pytest.raises(NVMLError, match="Not Supported"):
        second.read()
    power = gpus.powers[0]
    assert isinstance(power, GpuPower)
    assert power.read()[:2] == (None, 654321)
    gpus.close()


def test_what_a_function_writes_arrives(library):
    library.nvmlInit()
    first, second = (library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount()))
    assert library.nvmlDeviceGetTotalEnergyConsumption(first) == 1234567890123
    assert library.nvmlDeviceGetMigMode(first) == [0, 1]
    with pytest.raises(NVMLError) as error:
        library.nvmlDeviceGetMigMode(second)
    assert error.value.value == 3
    (value,) = library.nvmlDeviceGetFieldValues(first, [83])
    assert (value.timestamp, value.latencyUsec) == (1700000000000000, 25)
    library.nvmlShutdown()
    with pytest.raises(NVMLError, match="Uninitialized"):
        library.nvmlShutdown()


def test_a_host_without_a_driver_has_no_boards():
    with pytest.raises(OSError, match="no-such-nvml"):
        NvmlLibrary("libno-such-nvml.so.1")
    if nvml_library.LIBRARY == "libnvidia-ml.so.1" and not shutil.which("nvidia-smi"):
        assert open_gpus(["0"]).uuids == ()
