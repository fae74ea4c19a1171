"""A device whose counter grows only when an image is drawn, so that what a job spent is known to the millijoule."""

from __future__ import annotations

from support.models import Plain

from millijoule.workers.schemas import CounterRead

IMAGE_MJ = 7


class Counter:
    """A meter whose counter only ever grows when an image is drawn: 7 mJ each. `spent_mj` is the truth."""

    method = "rapl"
    cpu_ns_elsewhere = None

    def __init__(self, boot_id="boot"):
        self.boot_id = boot_id
        self.spent_mj = 0
        self.now_ns = 1_000_000_000

    def read(self):
        self.now_ns += 1_000_000
        return CounterRead(self.boot_id, self.now_ns, self.now_ns, 0, {"cpu:package-0": self.spent_mj})

    read_afresh = read


class Spending(Plain):
    """Each image costs 7 mJ of `counter`, and its prompt is noted in `drawn`."""

    def __init__(self, counter, drawn):
        super().__init__("cpu")
        self.counter, self.drawn = counter, drawn

    def draw(self, request):
        self.counter.spent_mj += IMAGE_MJ
        self.counter.now_ns += 50_000_000
        self.drawn.append(request.prompt_id)
        return super().draw(request)
