"""The dozen functions of NVML that a worker calls, by the names and with the results they have in `pynvml`.

`pynvml` binds all of NVML, a thousand constants and structures: three megabytes in every worker of a node, more than all
else that measuring needs. It can stand in for `NvmlLibrary` anywhere. Source of signatures, structures and constants:
nvml.h 13; a test holds them against `pynvml`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

LIBRARY = "libnvidia-ml.so.1"

#: NVML_DEVICE_UUID_V2_BUFFER_SIZE, NVML_DEVICE_NAME_V2_BUFFER_SIZE: the largest of the texts asked for.
TEXT_BYTES = 96


class NVMLError(Exception):
    """A call failed; `value` is its nvmlReturn_t."""

    def __init__(self, value: int, text: str = "") -> None:
        super().__init__(text or f"NVML error {value}")
        self.value = value


class _Value(ctypes.Union):
    """nvmlValue_t."""

    _fields_ = (
        ("dVal", ctypes.c_double),
        ("siVal", ctypes.c_int),
        ("uiVal", ctypes.c_uint),
        ("ulVal", ctypes.c_ulong),
        ("ullVal", ctypes.c_ulonglong),
        ("sllVal", ctypes.c_longlong),
        ("usVal", ctypes.c_ushort),
    )


class FieldValue(ctypes.Structure):
    """nvmlFieldValue_t; `timestamp` is in microseconds since 1970."""

    _fields_ = (
        ("fieldId", ctypes.c_uint),
        ("scopeId", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latencyUsec", ctypes.c_longlong),
        ("valueType", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", _Value),
    )


class NvmlLibrary:
    """NVML of this host.

    Args:
        path: of the shared library.

    Raises:
        OSError: there is none, so no NVIDIA driver.
    """

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION = 83
    NVML_FI_DEV_POWER_AVERAGE = 185
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_POWER_SCOPE_GPU = 0
    NVML_VALUE_TYPE_UNSIGNED_INT = 1
    NVML_VALUE_TYPE_UNSIGNED_LONG = 2
    NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3
    NVML_VALUE_TYPE_SIGNED_LONG_LONG = 4

    def __init__(self, path: str = LIBRARY) -> None:
        self._lib = ctypes.CDLL(path)
        self._lib.nvmlErrorString.restype = ctypes.c_char_p

    def nvmlInit(self) -> None:
        self._call("nvmlInit_v2")

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._text("nvmlSystemGetDriverVersion")

    def nvmlDeviceGetCount(self) -> int:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return count.value

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p) -> str:
        return self._text("nvmlDeviceGetUUID", handle)

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p) -> str:
        return self._text("nvmlDeviceGetName", handle)

    def nvmlDeviceGetMigMode(self, handle: ctypes.c_void_p) -> list[int]:
        """The current and the pending mode."""
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        return [current.value, pending.value]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p) -> int:
        """Millijoules since the driver was loaded."""
        energy = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(energy))
        return energy.value

    def nvmlDeviceGetFieldValues(
        self, handle: ctypes.c_void_p, fields: Sequence[int | tuple[int, int]]
    ) -> ctypes.Array[FieldValue]:
        """One value per field, each with a return code of its own; a field is its id, or its id and scope."""
        values = (FieldValue * len(fields))()
        for value, field in zip(values, fields, strict=True):
            value.fieldId, value.scopeId = field if isinstance(field, tuple) else (field, 0)
        self._call("nvmlDeviceGetFieldValues", handle, ctypes.c_int(len(fields)), values)
        return values

    def _text(self, function: str, *arguments: object) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        self._call(function, *arguments, buffer, ctypes.c_uint(TEXT_BYTES))
        return buffer.value.decode()

    def _call(self, function: str, *arguments: object) -> None:
        """Raises NVMLError: the call failed. AttributeError: the driver is too old to have the function."""
        result = getattr(self._lib, function)(*arguments)
        if result != self.NVML_SUCCESS:
            raise NVMLError(result, (self._lib.nvmlErrorString(result) or b"").decode(errors="replace"))
