"""Evidence classes: what energy figures rest on. One scale, for jobs (`closure`) and for comparisons.

A class is computed from what was measured and never stated by hand. Nothing is imported here: who checks a bundle
offline uses it too.
"""

from __future__ import annotations

#: The classes in words. E4 is nothing that a job or a bundle can show about itself, so it is never given.
MEANINGS = {
    "E0": "estimate, or not measured in full",
    "E1": "the devices' own energy counters",
    "E2": "energy counters that agree with integrated power",
    "E3": "energy counters that close against a node meter",
    "E4": "a calibrated external meter and an independent repeat",
}


def evidence_class(*, measured: bool, power_agrees: bool | None, node_closes: bool | None) -> str:
    """The class that measurements support, "E0" to "E3".

    Args:
        measured: every figure comes from energy counters, and what must be exact is.
        power_agrees: whether a second source inside the device agrees; None: there is none.
        node_closes: whether the devices close against a meter of their node; None: there is none.
    """
    if not measured:
        return "E0"
    if not power_agrees:
        return "E1"
    return "E3" if node_closes else "E2"
