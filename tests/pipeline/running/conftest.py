"""What tests of the pool share."""

import pytest
from support.pool_world import Script, World


@pytest.fixture
def world(monkeypatch):
    def made(script=None, *, shards=6, workers=(0, 2), nodes=2, **options):
        world = World(monkeypatch, script or Script(), shards, workers, **options)
        world.nodes = [world.ray.add_node(f"host-{n + 1}", CPU=1.0) for n in range(nodes)]
        return world

    return made
