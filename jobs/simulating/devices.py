"""Simulated nodes of one device each: kinds with a speed, powers and a price; when they come, are taken away, and cool down.

A node is *held* from the moment a worker asks for it until nobody has used it for `idle_timeout_s`: that is what is paid for
and what draws power. `Node.mj` is its energy counter, and the truth of a simulation.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millijoule.jobs.simulating.clocked_ray import ClockedRay

#: Ray's label of an accelerator's type, by which pools choose.
ACCELERATOR = "ray.io/accelerator-type"
#: Ray's label of how a node was bought: "spot" or "on-demand".
MARKET = "ray.io/market-type"
#: Ray's label that holds a node's id.
NODE_ID = "ray.io/node-id"


@dataclass(frozen=True)
class DeviceKind:
    """What all devices of one kind have in common.

    Attributes:
        images_per_s: while it draws.
        busy_w, idle_w: power while it draws, and while it is held and does not.
        price: per hour held, in any currency.
        load_s: a worker's start: process, model, first image; at `idle_w`.
        boot_s: from the request for a node until it is there.
        preemptions_per_hour: of a held node; 0 for one that is never taken away.
        outage_s: mean time until a node that was taken away can be had again.
        faults_per_hour: a worker's process ends for no reason of the job.
    """

    name: str
    images_per_s: float
    busy_w: float
    idle_w: float
    price: float = 0.0
    market: str = "on-demand"
    load_s: float = 60.0
    boot_s: float = 60.0
    preemptions_per_hour: float = 0.0
    outage_s: float = 0.0
    faults_per_hour: float = 0.0

    @property
    def j_per_image(self) -> float:
        """While it draws."""
        return self.busy_w / self.images_per_s

    @property
    def labels(self) -> dict[str, str]:
        return {ACCELERATOR: self.name, MARKET: self.market}


@dataclass(eq=False)
class Node:
    """One node with one device; after an outage it comes back as a new node with a new boot."""

    number: int
    kind: DeviceKind
    generation: int = 0
    alive: bool = True
    held_since: float | None = None
    held_s: float = 0.0
    watts: float = 0.0
    mj: float = 0.0  # since its boot
    mj_before: float = 0.0  # of earlier boots
    use: int = 0  # grows whenever it is given to a worker
    _since: float = 0.0

    @property
    def node_id(self) -> str:
        return f"{self.number:048x}{self.generation:08x}"

    @property
    def host(self) -> str:
        return f"host-{self.number}"

    @property
    def boot_id(self) -> str:
        return f"{self.number:08x}-0000-4000-8000-{self.generation:012x}"

    @property
    def device(self) -> str:
        return f"GPU-{self.number:08x}-0000-4000-8000-000000000000"

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": 1.0}

    @property
    def all_mj(self) -> float:
        return self.mj_before + self.mj

    def draw(self, watts: float, now: float) -> None:
        """From now on it draws `watts`."""
        self.mj += self.watts * (now - self._since) * 1000
        self.watts, self._since = watts, now


@dataclass
class Fleet:
    """All nodes there can be, as `clocked_ray.Supply`."""

    kinds: Mapping[str, tuple[DeviceKind, int]]
    seed: int
    idle_timeout_s: float = 60.0
    nodes: list[Node] = field(default_factory=list)
    preempted: int = 0
    faults: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ray: ClockedRay = None  # type: ignore[assignment]
        self._free: dict[str, list[Node]] = {}
        for kind, count in self.kinds.values():
            own = [Node(len(self.nodes) + i, kind) for i in range(count)]
            self.nodes += own
            self._free[kind.name + kind.market] = own[::-1]

    def node_for(self, options: Mapping[str, Any]) -> tuple[Node, float] | None:
        if (strategy := options.get("scheduling_strategy")) is not None:  # a reader of counters
            found = next((n for n in self.nodes if n.node_id == strategy.node_id and n.alive), None)
            return None if found is None else (found, 0.0)
        selectors = [options.get("label_selector") or {}]
        selectors += [fallback["label_selector"] for fallback in options.get("fallback_strategy") or ()]
        for selector in selectors:
            if (node := self._matching(selector)) is not None:
                return self._hold(node)
        return None

    def _matching(self, selector: Mapping[str, str]) -> Node | None:
        shunned = selector.get(NODE_ID, "!in()").removeprefix("!in(").removesuffix(")").split(",")
        wanted = {name: value for name, value in selector.items() if name != NODE_ID}
        for free in self._free.values():
            if not free or any(free[0].kind.labels.get(name) != value for name, value in wanted.items()):
                continue
            for i in range(len(free) - 1, -1, -1):
                if free[i].node_id not in shunned:
                    return free.pop(i)
        return None

    def _hold(self, node: Node) -> tuple[Node, float]:
        now, kind = self.ray.now, node.kind
        node.use += 1
        if node.held_since is not None:
            return node, 0.0  # still warm
        node.held_since = now
        node.draw(kind.idle_w, now)
        if kind.preemptions_per_hour:
            boot = node.generation
            after_s = kind.boot_s + self.random.expovariate(kind.preemptions_per_hour / 3600)
            held = node.use
            self.ray.at(after_s, lambda: self._preempt(node, boot, held))
        return node, kind.boot_s

    def released(self, node: Node) -> None:
        if not node.alive:
            return
        node.draw(node.kind.idle_w, self.ray.now)
        self._free[node.kind.name + node.kind.market].append(node)
        use = node.use
        self.ray.at(self.idle_timeout_s, lambda: self._cool(node, use))
        if self.ray.has_requests:
            self.ray.place()

    def _cool(self, node: Node, use: int) -> None:
        if node.use == use and node.alive:
            self._give_up(node)

    def _give_up(self, node: Node) -> None:
        if node.held_since is not None:
            node.held_s += self.ray.now - node.held_since
        node.held_since = None
        node.draw(0.0, self.ray.now)

    def _preempt(self, node: Node, boot: int, held: int) -> None:
        if node.generation != boot or node.held_since is None or node.use < held:
            return
        self.preempted += 1
        node.alive = False
        free = self._free[node.kind.name + node.kind.market]
        if node in free:
            free.remove(node)
        self.ray.lose_node(node, preempted=True)
        self._give_up(node)
        self.ray.at(self.random.expovariate(1 / node.kind.outage_s), lambda: self._come_back(node))

    def _come_back(self, node: Node) -> None:
        node.generation += 1
        node.alive = True
        node.mj_before += node.mj
        node.mj = 0.0
        self._free[node.kind.name + node.kind.market].append(node)
        self.ray.place()

    def close(self) -> None:
        """The job is over and every node is let go: the books of the fleet are complete."""
        for node in self.nodes:
            self._give_up(node)

    def totals(self) -> dict[str, dict[str, float]]:
        """Joules, hours held and money by kind."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for node in self.nodes:
            own = found[node.kind.name]
            own["joules"] += node.all_mj / 1000
            own["hours"] += node.held_s / 3600
            own["money"] += node.held_s / 3600 * node.kind.price
        return {name: dict(own) for name, own in found.items()}
