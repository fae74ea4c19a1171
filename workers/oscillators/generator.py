"""The product's own generator: prompts to icons, icons to images, in integers to the last pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from millijoule.kernels.native_library import kernel_words
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.fixed_size import check_requests, unused_settings
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.oscillators.config import MAX_STEPS, MIN_STEPS
from millijoule.workers.oscillators.draw import Drawing, Painter
from millijoule.workers.oscillators.model_file import load_model
from millijoule.workers.oscillators.operations import operations
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import IMAGE_SIZE
from millijoule.workers.scenes.settle import SceneRow, scene_row, settle
from millijoule.workers.schemas import ImageRequest

#: Images per call: shapes that they share are drawn once.
BATCH_SIZE, GPU_BATCH_SIZE = 256, 1024


class OscillatorGenerator:
    """A loaded oscillator model. Build with `load`; see `Generator` for the protocol."""

    def __init__(
        self, painter: Painter, name: str, sha256: str, device: str = "cpu", engine: Engine | None = None
    ) -> None:
        self.engine = engine or EagerEngine()
        self.drawing = Drawing(painter, device, engine)
        config = painter.network.config
        self.nouns = config.nouns
        self.info = GeneratorInfo(
            name=name,
            sha256=sha256,
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            num_inference_steps=config.steps,
            batch_size=GPU_BATCH_SIZE if device.startswith("cuda") else BATCH_SIZE,
            max_steps=MAX_STEPS,
            sizes=((IMAGE_SIZE, IMAGE_SIZE),),
        )

    @property
    def kernels(self) -> str:
        """See `NamesKernels`."""
        if self.drawing.kernel is None:
            return "pytorch"
        return "triton" if self.drawing.device.startswith("cuda") else kernel_words()

    @property
    def engine_name(self) -> str | None:
        """See `StatesSettings`."""
        return self.engine.name if self.drawing.kernel is None else None

    @property
    def rungs_words(self) -> str:
        """See `StatesSettings`."""
        return "none"

    @property
    def leaves_no_garbage(self) -> bool:
        """See `LeavesNoGarbage`."""
        return True

    @staticmethod
    def load(path: Path, *, device: str = "cpu", engine: Engine | None = None) -> OscillatorGenerator:
        """Load a model's file; `engine` as in `Drawing`. Raises InputError as `load_model`."""
        painter, name = load_model(path)
        return OscillatorGenerator(painter, name, file_sha256(path), device, engine)

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """See `Generator`; raises RowError for a size or step count this model cannot make."""
        check_requests(requests, self.info, MIN_STEPS)
        tokens, seeds, warnings = self._read(requests)
        images = self.drawing.draw(tokens, seeds, requests[0].num_inference_steps)
        told = tuple(w + unused_settings(r) for w, r in zip(warnings, requests, strict=True))
        return GeneratedBatch(images, told)

    def operations_of(
        self, requests: Sequence[ImageRequest], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        """Operations of each image by part, int64 `[images]`; see `operations.operations`."""
        tokens, _, _ = self._read(requests)
        steps = requests[0].num_inference_steps
        painter = self.drawing.painter
        counted = operations(painter.network.config, painter.ink, tokens, dense=dense, steps=steps)
        return {part: values.numpy() for part, values in counted.items()}

    def _read(
        self, requests: Sequence[ImageRequest]
    ) -> tuple[np.ndarray, np.ndarray, tuple[tuple[str, ...], ...]]:
        """Tokens of the scenes that prompts and seeds say, the seeds, and warnings."""
        scenes, warnings = zip(*(_read_prompt(r.prompt, self.nouns) for r in requests), strict=True)
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        return settle(scenes, seeds), seeds, warnings


@lru_cache(maxsize=4096)  # a prompt's images are drawn together
def _read_prompt(prompt: str, nouns: int) -> tuple[SceneRow, tuple[str, ...]]:
    scene, warnings = parse_prompt(prompt, nouns)
    return scene_row(scene), warnings
