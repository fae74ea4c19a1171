"""What a comparison's bundle says about machine, software and models."""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from millijoule.jobs.environment import environment
from millijoule.pipeline.comparison.registration import Registration
from millijoule.workers.generators.protocol import Generator
from millijoule.workers.meters.meter import ESTIMATE_METHOD, EnergyMeter

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_environment(
    registration: Registration,
    generators: Mapping[str, Generator],
    meter: EnergyMeter,
    judge_sha256: str,
    *,
    nvml: Any = None,
) -> dict[str, Any]:
    """Everything an auditor asks for that this machine tells; what it does not tell is null.

    Args:
        registration: of the comparison.
        generators: as loaded, by arm.
        meter: in use.
        judge_sha256: of the judge that was loaded.
        nvml: the NVML binding, default `pynvml`.
    """
    gpus = [d.removeprefix("gpu:") for d in meter.domains if d.startswith("gpu:")]
    return {
        **environment(),
        "device": registration.device,
        "judge_sha256": judge_sha256,
        "meter": meter.method,
        "domains": list(meter.domains),
        "estimate": ESTIMATE_METHOD,
        "models": {
            arm: {
                "model": registration.arm(arm).model,
                "sha256": registration.arm(arm).sha256,
                "loaded_name": generator.info.name,
                "loaded_sha256": generator.info.sha256,
                "num_inference_steps": registration.arm(arm).num_inference_steps
                or generator.info.num_inference_steps,
            }
            for arm, generator in generators.items()
        },
        "gpus": {uuid: describe_gpu(uuid, nvml) for uuid in gpus},
        "kernel": platform.release(),
        "cpu_governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else None,
        "packages_sha256": _packages_sha256(),
    }


def describe_gpu(uuid: str, nvml: Any = None) -> dict[str, Any]:
    """State of one board as NVML tells it; null for what it does not support."""
    nvml = nvml or importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

        def ask(question: Callable[[], Any]) -> Any:
            try:
                answer = question()
            except nvml.NVMLError:
                return None
            return answer.decode() if isinstance(answer, bytes) else answer

        return {
            "name": ask(lambda: nvml.nvmlDeviceGetName(handle)),
            "driver": ask(nvml.nvmlSystemGetDriverVersion),
            "vbios": ask(lambda: nvml.nvmlDeviceGetVbiosVersion(handle)),
            "power_limit_mw": ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle)),
            "sm_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "persistence": ask(lambda: nvml.nvmlDeviceGetPersistenceMode(handle)),
            "ecc": ask(lambda: nvml.nvmlDeviceGetEccMode(handle)[0]),
        }
    finally:
        nvml.nvmlShutdown()


def _packages_sha256() -> str:
    """SHA-256 of "name==version" of every installed package, one per line, sorted."""
    names = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
