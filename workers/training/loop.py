"""What every training job shares: steps until done or out of time, a log, checkpoints, resuming, moving averages."""

from __future__ import annotations

import json
import math
import pickle
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from millijoule.workers.errors import InputError
from millijoule.workers.scenes.renderer import SceneRenderer
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS
from millijoule.workers.training.step_data import Draw, StepData

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

#: Steps between lines of the log.
REPORT_EVERY = 50

#: Seconds between checkpoints: what is lost at most. On a GPU a minute is some thousand steps.
CHECKPOINT_EVERY_S = 60


class Trainer(Protocol):
    """A model in training. What `train_step` does depends on config and `step` alone, so that a resumed run repeats.

    `config` is a frozen dataclass of plain values, `steps` among them.
    """

    config: Any
    step: int

    def train_step(self) -> Mapping[str, float | Tensor]:
        """Do one step, add one to `step`; returns what to log, "loss" first. Tensors are read when they are logged, so
        that a GPU is not waited for at every step."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `load_state` continues from."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def export(self, folder: Path, name: str) -> Path:
        """Write the weights as model `name`, in the form that they are used in; returns where."""


class GeneratorTrainer:
    """What trainers of generators share: data made ahead, and true images of it drawn where the model trains."""

    step = 0

    def __init__(
        self, config: Any, draw: Draw, device: str, data_processes: int, nouns: int = DEFAULT_NOUNS
    ) -> None:
        """`config` has a `seed`; true images are of the first `nouns`; for the rest see `StepData`."""
        torch.manual_seed(config.seed)
        self.device = device
        self.on_gpu = device.startswith("cuda")
        self.renderer = SceneRenderer(device, nouns)
        self.data = StepData(draw, device, data_processes)
        self.newest_share = torch.ones((), device=device)

    def true_images(self, tokens: Tensor, shade: Tensor, jitter: Tensor) -> Tensor:
        """Renders of what `draw_variation` varied, `[scenes, renders, 3, 64, 64]` in [-1, 1]."""
        return self.renderer.render(tokens, shade, jitter).float() / 127.5 - 1


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Share of the learning rate at `step`: linear warm-up, then cosine to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


def newest_share(decay: float, step: int) -> float:
    """What `update_average` takes of the newest weights: more in the first steps, whose weights are soon outdated."""
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, share: Tensor) -> None:
    """Exponential moving average of the weights, in place; `share` of the newest, a scalar on the CPU or their device."""
    slow: list[Tensor] = list(average.parameters())
    fast: list[Tensor] = list(model.parameters())
    change = list(torch._foreach_sub(fast, slow))
    torch._foreach_mul_(change, share)
    torch._foreach_add_(slow, change)


def save_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Write the checkpoint; an older one is replaced in one move."""
    state = {"config": json.dumps(asdict(trainer.config)), "step": trainer.step, "state": trainer.state()}
    temporary = folder / (CHECKPOINT + ".part")
    torch.save(state, temporary)
    temporary.replace(folder / CHECKPOINT)


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Continue from the checkpoint in `folder`; it is read without unpickling code.

    Raises:
        InputError: it was made with another config, or is damaged.
    """
    try:
        state = torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is cut off"
        raise InputError(f"{folder / CHECKPOINT}: damaged ({reason}); delete it to begin anew") from error
    before, now = json.loads(state["config"]), json.loads(json.dumps(asdict(trainer.config)))
    for field in fields(trainer.config):  # settings that the program which wrote it had not yet
        if field.default is not MISSING:
            before.setdefault(field.name, field.default)
    if before != now:
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        raise InputError(
            f"{folder / CHECKPOINT}: made with other settings ({', '.join(changed)}); give the same, or another --output"
        )
    trainer.load_state(state["state"])
    trainer.step = state["step"]


def run_training(
    trainer: Trainer,
    folder: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    sample: Callable[[int], Any] = lambda step: None,
    sample_every: int = 0,
) -> None:
    """Train to the config's last step, or as far as `minutes` or a SIGTERM allow.

    Every `REPORT_EVERY` steps a line is printed and a JSON row (means since the row before, seconds per step) added to
    log.jsonl. A checkpoint is written every minute and at the end; `sample(step)` is called every
    `sample_every` steps. On SIGTERM (`timeout`, a node that goes away) the step is finished, the checkpoint written, and the
    function returns as when time is out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if resume and (folder / CHECKPOINT).exists():
        load_checkpoint(trainer, folder)
    steps = trainer.config.steps
    began = saved = reported = time.monotonic()
    since: dict[str, list[float | Tensor]] = defaultdict(list)
    with _asked_to_stop() as asked:
        while trainer.step < steps:
            for name, value in trainer.train_step().items():
                since[name].append(value)
            now = time.monotonic()
            out_of_time = asked.is_set() or (minutes is not None and now - began > 60 * minutes)
            last = trainer.step >= steps or out_of_time
            if trainer.step % REPORT_EVERY == 0 or last:
                means = {name: _mean_of_finite(values) for name, values in since.items()}
                now = time.monotonic()  # a GPU may have been behind
                done = len(since["loss"])
                if math.isnan(means["loss"]):
                    raise RuntimeError(
                        f"most losses of steps {trainer.step - done} to {trainer.step} are not finite numbers; "
                        f"{folder / CHECKPOINT} holds the last checkpoint before, if there is one. A lower learning_rate may help"
                    )
                pace = (now - reported) / done
                reported, since = now, defaultdict(list)
                rounded = {k: round(v, 6) for k, v in means.items()}
                row = {"step": trainer.step, **rounded, "s_per_step": round(pace, 4)}
                with (folder / LOG).open("a") as log:
                    log.write(json.dumps(row) + "\n")
                left = f", {pace * (steps - trainer.step) / 60:.0f} min left" if trainer.step < steps else ""
                numbers = " ".join(f"{k} {v:.4f}" for k, v in means.items())
                print(f"step {trainer.step}/{steps} {numbers} ({pace:.2f} s/step{left})", flush=True)
            if now - saved > CHECKPOINT_EVERY_S or last:
                save_checkpoint(trainer, folder)
                saved = now
            if sample_every and trainer.step % sample_every == 0:
                sample(trainer.step)
            if out_of_time:
                break


def _mean_of_finite(values: Sequence[float | Tensor]) -> float:
    """NaN where most are not finite: a bad batch now and then is left out of the training, too (`optimizer.clip_and_step`)."""
    finite = [v for v in map(float, values) if math.isfinite(v)]
    return sum(finite) / len(finite) if 2 * len(finite) > len(values) else math.nan


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM; outside the main thread, which alone may handle signals, never."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
