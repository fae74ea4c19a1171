"""Un-0 models, for inference: class to drive, coupled oscillators, decoder.

In go requests whose prompts are class names or numbers, out come uint8 images. The files are those `millijoule convert`
writes. A file that says so is drawn in integers (`un0_integers`, on a GPU `un0_gpu`). Else phases and decoder are float32 and run
on padded batches of one fixed size, so that an image does not depend on what else is in its batch.

The model (Un-0; github.com/unconv-ai/Un-0) is N phases theta and M driver phases phi, all uniform at the start:

    d theta_i / dt = omega_i  + sum_j K_ij sin(theta_j - theta_i) + sum_k D[class]_ik sin(phi_k - theta_i)
    d phi_k / dt   = omega'_k + sum_l C_kl sin(phi_l - phi_k)

A sum of that form is cos(theta_i) S_i - sin(theta_i) C_i, where S and C are the matrix times the sines and the cosines
of the sources: the field the oscillator sits in.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from millijoule.kernels.dense_coupling import StepsTooLong
from millijoule.kernels.phase import TURN, random_phases
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.errors import RowError
from millijoule.workers.generators import un0_checkpoint
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.fixed_size import check_requests, padded, unused_settings
from millijoule.workers.generators.model_files import read_own_header, read_settings, refusing_damage
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.generators.un0_checkpoint import STEM, Un0Architecture, canonical
from millijoule.workers.generators.un0_gpu import Un0GpuForm, gpu_form
from millijoule.workers.generators.un0_integers import Un0IntegerForm, Un0Integers
from millijoule.workers.generators.un0_model import Un0Decoder, Un0Dynamics
from millijoule.workers.records import decode
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)

#: Rows the model always sees, the rest being padding. A GPU needs more of them to be busy.
FLOAT_BATCH = {"cpu": 16, "cuda": 64}

#: Images per call that the worker sends; integers on a GPU take more.
BATCH_SIZE, GPU_INTEGERS_BATCH_SIZE = 64, 256

#: Enough to see whether a model draws anything.
TRIAL_STEPS = 10

#: What the model draws for an empty prompt: nothing drives the oscillators, as in a tenth of its training.
NO_CLASS = -1

_CLASS_NUMBER = re.compile(r"(?:class\s*)?([0-9]{1,9})", re.IGNORECASE)


class Un0Generator:
    """A loaded Un-0 model. Build with `load`; see `Generator` for the protocol."""

    def __init__(
        self,
        architecture: Un0Architecture,
        tensors: Mapping[str, Tensor],
        classes: ClassIndex,
        name: str,
        sha256: str,
        device: str,
        engine: Engine | None = None,
        integers: Un0IntegerForm | Un0GpuForm | None = None,
    ) -> None:
        """`engine`: None runs it plainly; `integers`: None draws in floating point."""
        self.architecture = architecture
        self.device = device
        self._classes = classes
        self._kind = "cuda" if device.startswith("cuda") else "cpu"
        self._rows = FLOAT_BATCH[self._kind]
        self._tensors = tensors
        self._integers = integers
        self._float_steps: set[int] = set()  # said in the log
        self.engine = engine or EagerEngine()
        if integers is None:
            self._networks  # noqa: B018 (made now, while it is loaded)
        size = architecture.image_size
        self.info = GeneratorInfo(
            name=name,
            sha256=sha256,
            width=size,
            height=size,
            num_inference_steps=architecture.steps,
            batch_size=GPU_INTEGERS_BATCH_SIZE if isinstance(integers, Un0GpuForm) else BATCH_SIZE,
            max_steps=un0_checkpoint.MAX_STEPS,
            sizes=((size, size),),
        )

    @staticmethod
    def load(
        path: Path,
        *,
        device: str = "cpu",
        engine: Engine | None = None,
        integers: bool = True,
        gpu_kernels: bool = True,
    ) -> Un0Generator:
        """Load a file written by `millijoule convert`; `engine` runs its networks, None: PyTorch as it is.

        Args:
            integers: draw in integers what the file says may be; False: in floating point all the same, for comparing.
            gpu_kernels: on a GPU integers are for its own kernels, which no engine runs; False: the engine is to have something to run.

        Raises:
            InputError: the file is not safetensors, or not a model this version knows, or its numbers would overflow.
        """
        header = read_own_header(path, "Un-0", un0_checkpoint.FORMAT, un0_checkpoint.FORMAT_VERSION)
        with refusing_damage(path):
            architecture = read_settings(Un0Architecture, header.metadata["architecture"])
            names = decode(list[str], header.metadata.get("class_names", "[]"))
            classes = ClassIndex(architecture.classes, names)
            un0_checkpoint.check_shapes(architecture, header.shapes)
            tensors = load_file(path)
            un0_checkpoint.check_values(architecture, tensors)
            tensors = canonical(tensors)
            form: Un0IntegerForm | Un0GpuForm | None = None
            if integers and (said := header.metadata.get("integers")):
                settings = read_settings(Un0Integers, said)
                if not device.startswith("cuda"):
                    form = Un0IntegerForm(architecture, tensors, settings, engine=engine)
                elif gpu_kernels:
                    form = gpu_form(architecture, tensors, settings, device)
                else:
                    log.info("integers on a GPU are for its own kernels, an engine runs floating point")
        log.info(
            "%s: drawn in %s",
            header.metadata.get("name", path.stem),
            "floating point" if form is None else f"integers ({form.kernels})",
        )
        name = header.metadata.get("name", path.stem)
        sha256 = file_sha256(path)
        return Un0Generator(architecture, tensors, classes, name, sha256, device, engine, form)

    @property
    def kernels(self) -> str:
        """See `NamesKernels`."""
        return "pytorch, floating point" if self._integers is None else self._integers.kernels

    @property
    def engine_name(self) -> str:
        """See `StatesSettings`."""
        return self.engine.name

    @property
    def rungs_words(self) -> str:
        """See `StatesSettings`."""
        return "none"

    @cached_property
    def _networks(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
        """The float form: velocity, decoder, and the drive `[classes, n, m]` as stored."""
        weights = {key: value.to(self.device, torch.float32) for key, value in self._tensors.items()}
        velocity = self.engine.prepare(Un0Dynamics(self.architecture, weights, self._kind), "dynamics")
        decoder = self.engine.prepare(Un0Decoder(self.architecture, weights), "decoder")
        return velocity, decoder, weights["dynamics.K_drive"]

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """See `Generator`; raises RowError for a prompt, a size or a step count this model cannot make."""
        check_requests(requests, self.info, 1)
        classes = [self._classes.find(r.prompt) for r in requests]
        images = self._draw(classes, requests)
        empty = ("empty prompt: drawn without a class",)
        warnings = (
            (empty if number == NO_CLASS else ()) + unused_settings(request)
            for number, request in zip(classes, requests, strict=True)
        )
        return GeneratedBatch(images, tuple(warnings))

    @torch.inference_mode()
    def _draw(self, classes: Sequence[int], requests: Sequence[ImageRequest]) -> np.ndarray:
        if self._integers is not None:
            steps = requests[0].num_inference_steps or self.architecture.steps
            try:
                return self._integers.draw(classes, [r.seed for r in requests], steps)
            except StepsTooLong as error:  # which the model and the number of steps alone decide
                if steps not in self._float_steps:
                    log.warning("%d steps are drawn in floating point: %s", steps, error)
                    self._float_steps.add(steps)
        return self.decode(self.relax(classes, requests))

    @torch.inference_mode()
    def relax(self, classes: Sequence[int], requests: Sequence[ImageRequest]) -> Tensor:
        """Final phases in floating point, float32 `[batch, n]` in radians, not wrapped, for the requests' seeds and steps."""
        a = self.architecture
        steps = requests[0].num_inference_steps or a.steps
        advance = _rk4 if a.solver == "rk4" else _euler
        network, _, _ = self._networks
        final = []
        for rows, count in padded(len(requests), self._rows):
            start = start_angles([requests[i].seed for i in rows], a.oscillators + a.drivers)
            state = start.to(self.device)
            velocity = partial(network, drive=self._drive_of([classes[i] for i in rows]))
            for _ in range(steps):
                state = advance(velocity, state, a.horizon / steps)
            final.append(state[:count, : a.oscillators])
        return torch.cat(final)

    def _drive_of(self, classes: Sequence[int]) -> Tensor:
        """`[batch, n, m]`; zero where there is no class."""
        index = torch.tensor(classes, device=self.device)
        scale = (index != NO_CLASS).float() * self.architecture.driver_scale
        return self._networks[2][index.clamp(min=0)] * scale[:, None, None]

    @torch.inference_mode()
    def decode(self, phases: Tensor) -> np.ndarray:
        """uint8 `[batch, size, size, 3]` from final phases `[batch, n]`, in floating point."""
        _, network, _ = self._networks
        images = []
        for rows, count in padded(len(phases), self._rows):
            x = network(readout(phases[rows], self.architecture))
            if not bool(torch.isfinite(x).all()):  # `check_values` rules it out, so it is not the prompt
                raise RuntimeError("the model made pixels that are not finite numbers")
            x = torch.tanh(x)
            pixels = torch.round((x[:count] + 1) * 127.5).clamp_(0, 255).to(torch.uint8)
            images.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)


def float_images(
    architecture: Un0Architecture, tensors: Mapping[str, Tensor]
) -> Callable[[Sequence[int], Sequence[int]], np.ndarray]:
    """What draws classes and seeds in floating point on this CPU, in the default number of steps."""
    generator = Un0Generator(architecture, tensors, ClassIndex(architecture.classes), "", "", "cpu")

    def draw(classes: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        requests = [ImageRequest("trial", i, "", seed=seed) for i, seed in enumerate(seeds)]
        return generator.decode(generator.relax(classes, requests))

    return draw


def check_images(generator: Un0Generator) -> None:
    """Draw a few images to see that there is something on them.

    Raises:
        ValueError: they are all of one flat colour, or all the same.
    """
    classes, count = generator.architecture.classes, FLOAT_BATCH["cpu"]
    steps = min(generator.architecture.steps, TRIAL_STEPS)
    requests = [
        ImageRequest("trial", i, str(i * classes // count), seed=i, num_inference_steps=steps)
        for i in range(count)
    ]
    images = generator.generate(requests).images
    if (images == images[:, :1, :1]).all():
        raise ValueError("it draws flat colour only: its decoder's weights are far too small or too large")
    if (images == images[:1]).all():
        raise ValueError("it draws the same image for every seed and class")


class ClassIndex:
    """Finds the class a prompt means: its number ("7", "class 7") or its name, whatever the case.

    A name with commas, as ImageNet's have ("tench, Tinca tinca"), is found whole and by each of its parts.
    """

    def __init__(self, classes: int, names: Sequence[str] = ()) -> None:
        if names and len(names) != classes:
            raise ValueError(f"{len(names)} class names for {classes} classes")
        self.classes = classes
        self.names = tuple(names)
        self._numbers: dict[str, set[int]] = defaultdict(set)
        for number, name in enumerate(names):
            for form in (name, *name.split(",")):
                self._numbers[_simplified(form)].add(number)

    def find(self, prompt: str) -> int:
        """The class's number, `NO_CLASS` for an empty prompt.

        Raises:
            RowError: the prompt is no class of this model, or a name that several classes share.
        """
        word = _simplified(prompt)
        if not word:
            return NO_CLASS
        if number := _CLASS_NUMBER.fullmatch(word):
            if int(number[1]) < self.classes:
                return int(number[1])
            raise RowError(f"{prompt!r}: this model has classes 0 to {self.classes - 1}")
        found = sorted(self._numbers.get(word, ()))
        if len(found) == 1:
            return found[0]
        if found:
            raise RowError(
                f"{prompt!r} names classes {', '.join(map(str, found))}: write the number of the one you mean"
            )
        known = f"one of {', '.join(self.names[:10])}" if self.names else f"0 to {self.classes - 1}"
        more = f" ({len(self.names)} in all)" if len(self.names) > 10 else ""
        raise RowError(f"{prompt[:100]!r} is no class of this model; a prompt is {known}{more}")


def start_angles(seeds: Sequence[int], n: int) -> Tensor:
    """Start phases in radians from the images' seeds: float32 `[batch, n]` in [-pi, pi)."""
    phases = random_phases(np.array(seeds, dtype=np.uint64), n + -n % 4)[:, :n]
    return (phases - TURN // 2).float() * (2 * math.pi / TURN)


def readout(phases: Tensor, architecture: Un0Architecture) -> Tensor:
    """Decoder features `[batch, channels, 4, 4]` from phases `[batch, n]`."""
    if architecture.relativization == "mean_relative":
        phases = phases - phases.mean(dim=1, keepdim=True)
    elif architecture.relativization == "ref_oscillator":
        phases = phases - phases[:, :1]
    if architecture.encoding == "sin_cos":
        features = torch.cat([torch.sin(phases), torch.cos(phases)], dim=1)
    else:
        features = torch.sin(phases) if architecture.encoding == "sin" else phases
    return features.reshape(len(phases), -1, STEM, STEM)


Velocity = Callable[[Tensor], Tensor]


def _euler(velocity: Velocity, state: Tensor, dt: float) -> Tensor:
    return state + dt * velocity(state)


def _rk4(velocity: Velocity, state: Tensor, dt: float) -> Tensor:
    """Kutta's 3/8 rule (1901), which is what torchdiffeq, and so Un-0, means by "rk4"."""
    a = velocity(state)
    b = velocity(state + dt / 3 * a)
    c = velocity(state + dt * (b - a / 3))
    d = velocity(state + dt * (a - b + c))
    return state + dt / 8 * (a + 3 * (b + c) + d)


def _simplified(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())
