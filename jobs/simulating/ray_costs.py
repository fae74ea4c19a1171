"""What Ray's own calls cost a driver: processor time of its process, which a simulated Ray leaves out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

#: Calls that are out while others are counted, as of a thousand workers with two leases each.
OUT = 2000
CALLS, WAITS, GATHERS = 1000, 50, 20
#: How long a driver of a thousand workers gathers answers.
GATHER_S = 0.05


class _Answers:
    def now(self, value: int) -> int:
        return value

    async def later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def measure_ray_calls() -> dict[str, Any]:
    """Microseconds of the driver's processor time per call there and back, and per look at `OUT` calls, on a Ray of its own."""
    import ray

    from millijoule.jobs.set_up.ray_cluster import connected

    with connected(None):
        kind: Any = ray.remote(_Answers)
        quick = kind.options(num_cpus=0).remote()
        slow = kind.options(num_cpus=0, max_concurrency=OUT + 1).remote()
        ray.get(quick.now.remote(0))
        out = [slow.later.remote(600.0) for _ in range(OUT)]
        time.sleep(2.0)

        def cpu_us(times: int, act: Any) -> float:
            began = time.process_time()
            for number in range(times):
                act(number)
            return round((time.process_time() - began) / times * 1e6, 1)

        return {
            "calls_out": OUT,
            "us_per_call": cpu_us(CALLS, lambda n: ray.get(quick.now.remote(n))),
            "us_per_look": cpu_us(
                WAITS, lambda n: ray.wait(out, num_returns=1, timeout=0, fetch_local=False)
            ),
            "us_per_gathering": cpu_us(
                GATHERS,
                lambda n: ray.wait(out, num_returns=OUT, timeout=GATHER_S, fetch_local=False),
            ),
        }
