"""What is asked of NVML by way of the real `pynvml`: of a C library with NVML's signatures, and where there is none."""

import json
import os
import shutil
import subprocess
import sys

import pytest

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
nvmlReturn_t nvmlInitWithFlags(unsigned int flags) { up = 1; return 0; }
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


ASK_TWO_BOARDS = """
import json
from millijoule.workers.meters.nvml import installed_gpus, open_gpus

gpus = open_gpus(["GPU-11111111-aaaa", "GPU-2222"])
first, second = gpus.counters
try:
    second.read()
except Exception as error:
    refused = str(error)
said = [gpus.uuids, gpus.names, gpus.driver_version, first.read()[0], refused, gpus.powers[0].read()[:2]]
gpus.close()
print(json.dumps([*said, installed_gpus()]))
"""


def ask(script, library_folder):
    env = {**os.environ, "LD_LIBRARY_PATH": str(library_folder)}
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def test_boards_are_found_by_uuid_and_read(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "nvml.c").write_text(SOURCE)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    uuids = ["GPU-11111111-aaaa", "GPU-22222222-aaaa"]
    assert ask(ASK_TWO_BOARDS, tmp_path) == [
        uuids,
        ["NVIDIA H200", "NVIDIA H200"],
        "580.65.06",
        9876543210987,
        "Not Supported",
        [None, 654321],
        uuids,
    ]


ASK_NOBODY = """
import json, sys
from millijoule.workers.meters.meter import open_meter

open_meter().close()
before = "pynvml" in sys.modules
from millijoule.workers.meters.nvml import installed_gpus, open_gpus

gpus = open_gpus(["0"])
print(json.dumps([before, gpus.uuids, gpus.unreadable, installed_gpus()]))
"""


def test_a_host_without_a_driver_has_no_boards_and_a_worker_without_one_does_not_load_pynvml(tmp_path):
    # a file that is no library, so that the test holds on a host with a driver, too
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert ask(ASK_NOBODY, tmp_path) == [False, [], ["0"], []]
