"""`--engine eager`: PyTorch as it is."""

from __future__ import annotations

from millijoule.workers.engines.routing import RoutingEngine


class EagerEngine(RoutingEngine):
    """Modules run as they are; imports nothing."""
