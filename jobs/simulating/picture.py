"""The comparison of policies as a picture: joules against time, a panel per fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLOURS = {"work-stealing": "#444444", "speed": "#d1495b", "energy": "#2e8b57", "cost": "#30638e"}


def draw(fleets: Sequence[dict[str, Any]], path: str) -> None:
    """Draw every fleet of `jobs.bench.fleet.compare`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(1, len(fleets) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(4.2 * columns, 7), squeeze=False)
    for i, fleet in enumerate(fleets):
        axis = axes[i % 2][i // 2]
        stealing = fleet["rows"][0]
        for prefer, colour in _COLOURS.items():
            rows = sorted((r for r in fleet["rows"] if r["prefer"] == prefer), key=lambda r: r["makespan_s"])
            times = [r["makespan_s"] / stealing["makespan_s"] for r in rows]
            joules = [r["joules"] / stealing["joules"] for r in rows]
            axis.plot(times, joules, "o-" if len(rows) > 1 else "s", color=colour, label=prefer, markersize=5)
        axis.axhline(0.85, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(f"fleet '{fleet['mix']}'{', half of it spot' if fleet['spot'] else ''}", fontsize=10)
        axis.set_xlabel("time / work-stealing's")
        axis.set_ylabel("joules / work-stealing's")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
