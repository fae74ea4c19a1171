"""Any text-to-image pipeline that was saved as a diffusers directory (`pipeline_folder`), behind the `Generator` protocol.

Drawing needs the `diffusers` extra.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from millijoule.workers.diffusion.engine_modules import prepare_pipeline
from millijoule.workers.diffusion.families import describe_family
from millijoule.workers.diffusion.loading import LoadedPipeline, load_pipeline
from millijoule.workers.diffusion.memory import PipelineMemory
from millijoule.workers.diffusion.operations import count_operations
from millijoule.workers.diffusion.pipeline_call import Drawn, PipelineCall, Row, Settings
from millijoule.workers.diffusion.pipeline_folder import ICON_SCENES
from millijoule.workers.diffusion.precision import is_narrow
from millijoule.workers.diffusion.prompt_chunks import count_chunks
from millijoule.workers.diffusion.prompt_tokens import open_prompt_reader
from millijoule.workers.drawing.batch_shapes import BatchShapes
from millijoule.workers.drawing.out_of_memory import is_out_of_memory, release_memory
from millijoule.workers.engines.open import open_engine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import BatchLimits, GeneratedBatch, GeneratorInfo, Rejection
from millijoule.workers.loras.switch import LoraSwitch
from millijoule.workers.pipeline_parts.model_files import read_model
from millijoule.workers.ranks.group import RankGroup
from millijoule.workers.scenes.prompts import parse_prompt, write_caption
from millijoule.workers.scenes.scenes import complete
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)


class DiffusersGenerator:
    """A loaded pipeline. Build with `load`; see `Generator`, `ReportsSteps`, `SizesBatches`, `SavesMemory`, `GroupsRequests`
    and `HoldsProcesses` for the protocols.

    Attributes:
        fixed_batch: whether a call of another number of rows costs a compilation or a capture: then a smaller batch is padded
            to a number of rows that was called before.
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        options: GeneratorOptions,
        engine: Engine,
        group: RankGroup | None = None,
    ) -> None:
        """`engine` runs the modules of the pipeline from now on; `group`: the other ranks that hold a part of it."""
        folder = loaded.folder
        self.group = group
        self.loaded = loaded
        self.pipeline = loaded.pipeline
        self.options = options
        self.loras = LoraSwitch(self.pipeline, options.loras)
        self.engine = engine
        prepare_pipeline(self.pipeline, engine)
        self.pipeline.to(loaded.device)
        loaded.rungs.skip_work(captured=engine.fixed_shapes)
        if loaded.rungs.words:
            log.info("%s: %s", folder.name, "; ".join(loaded.rungs.words))
        self.on_step: Callable[[], None] = lambda: None
        self.guidance_scale = folder.defaults.guidance_scale
        self.prompts = folder.defaults.prompts
        self.family = family = describe_family(self.pipeline, str(folder.path))
        self.reader = open_prompt_reader(self.pipeline)
        self.call = PipelineCall(loaded, family, lambda: self.on_step(), group)
        self._apart: set[str] = set()
        self.memory = PipelineMemory(self.pipeline, loaded.device, engine)
        self.fixed_batch = engine.fixed_shapes
        self._shapes = BatchShapes()
        width, height = options.width or family.width, options.height or family.height
        if why := family.refused_size(width, height):
            raise InputError(f"--width {width} --height {height}: {why}")
        self.info = GeneratorInfo(
            name=folder.name,
            sha256=loaded.sha256,
            width=width,
            height=height,
            num_inference_steps=options.rungs.steps or folder.num_inference_steps,
            batch_size=options.batch_size or self.memory.limits(width, height).first,
        )

    @staticmethod
    def load(
        path: Path,
        *,
        device: str = "cpu",
        options: GeneratorOptions = GeneratorOptions(),  # noqa: B008 (frozen)
    ) -> DiffusersGenerator:
        """Load the pipeline in directory `path` (see `load_pipeline`).

        Raises:
            InputError: diffusers is not installed, the directory is not a pipeline that can be used (see
                `read_model`), or the options ask for what it cannot do.
        """
        folder = read_model(path, options)
        engine = open_engine(options, device)  # what it lacks is said before minutes are spent on loading
        if options.ranks == 1:
            return DiffusersGenerator(load_pipeline(folder, device, options), options, engine)
        group = RankGroup.start(str(path), device, options)
        try:
            loaded = load_pipeline(folder, device, options)
            generator = DiffusersGenerator(loaded, options, engine, group)
            log.info("rank 0 of %d: %s", options.ranks, loaded.spread_words)
            group.join()
        except BaseException:
            group.close()
            raise
        return generator

    @property
    def engine_name(self) -> str:
        """See `StatesSettings`."""
        return self.engine.name

    @property
    def rungs_words(self) -> str:
        """See `StatesSettings`."""
        return self.options.rungs.words()

    @property
    def cpu_ns(self) -> int:
        """See `HoldsProcesses`."""
        return self.group.cpu_ns if self.group is not None else 0

    def close(self) -> None:
        """See `HoldsProcesses`."""
        if self.group is not None:
            self.group.close()

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """See `Generator`; raises RowError for a size or a number of steps this model cannot make."""
        for request in requests:
            self._check(request)
        images: list[np.ndarray] = [np.zeros(self._shape(r), np.uint8) for r in requests]
        warnings = [self._warnings(r) for r in requests]
        rejected: list[Rejection | None] = [self._too_long(r) for r in requests]
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            if rejected[i] is None:
                groups[self.call_group(request)].append(i)
        for places in groups.values():
            drawn, settings = self._draw([requests[i] for i in places])
            for k, i in enumerate(places):
                images[i], words, rejected[i] = self._judge(requests[i], settings, drawn, k)
                warnings[i] += words
        return GeneratedBatch(np.stack(images), tuple(warnings), tuple(rejected))

    def batch_limits(self, width: int, height: int) -> BatchLimits:
        """See `SizesBatches`."""
        return self.memory.limits(width, height)

    def save_memory(self) -> str | None:
        """See `SavesMemory`."""
        return self.group.together(self.memory.save) if self.group is not None else self.memory.save()

    def operations_of(
        self, requests: Sequence[ImageRequest], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        """See `CountsOperations`; those of the first request's steps and guidance, by `operations.count_operations`, as no
        image takes others. Rungs that save some are part of the model."""
        steps = requests[0].num_inference_steps or self.info.num_inference_steps
        counted = steps if self.options.rungs.by_step else 1
        settings = self._settings(replace(requests[0], num_inference_steps=counted))
        call = self.call.arguments([Row("", None, 0)], settings)
        self.loaded.rungs.begin(1)
        with self.engine.plain():
            counts = count_operations(self.pipeline, lambda: self.pipeline(**call), steps, counted)
        return {part: np.full(len(requests), count, np.int64) for part, count in counts.items()}

    def _draw(self, requests: Sequence[ImageRequest]) -> tuple[Drawn, Settings]:
        """A batch of requests of one group; where the batch is fixed, rows after them fill it up."""
        settings = self._settings(requests[0])
        switches = self.loras.switches
        self.loras.use(requests[0].lora)
        if self.loras.switches != switches:
            self.engine.renew()
        rows = [self._row(r) for r in requests]
        if not self.fixed_batch:
            return self.call.draw(rows, settings), settings
        height, width, _ = self._shape(requests[0])
        wanted = self._shapes.rows_for((width, height), len(rows))
        try:
            drawn = self.call.draw([*rows, *[rows[0]] * (wanted - len(rows))], settings)
        except Exception:
            self._shapes.failed((width, height), wanted)
            raise
        self._shapes.ran((width, height), wanted)
        return drawn, settings

    def _judge(
        self, request: ImageRequest, settings: Settings, drawn: Drawn, k: int
    ) -> tuple[np.ndarray, tuple[str, ...], Rejection | None]:
        """Row `k` of what was drawn: its image, words for the user, and why it is no image after all."""
        words: tuple[str, ...] = ()
        if not drawn.finite[k]:
            again = self._in_float32(request, settings)
            if isinstance(again, Rejection):
                return drawn.images[k], (), again
            words = ("pixels were not finite numbers, drawn again in float32",)
            drawn, k = again, 0
        if drawn.hidden[k]:
            return drawn.images[k], words, Rejection("filtered", "the model's safety checker hid this image")
        if not drawn.images[k].any():
            words += ("the image is all black",)
        return drawn.images[k], words, None

    def _in_float32(self, request: ImageRequest, settings: Settings) -> Drawn | Rejection:
        """One more try for a row whose pixels were not finite numbers."""
        where = request.source or request.prompt_id
        if not (self.loaded.mixed_precision or is_narrow(self.pipeline)):
            return Rejection("quarantined", "pixels are not finite numbers")
        log.warning("%s: pixels are not finite numbers; the image is drawn again in float32", where)
        try:
            with self.engine.plain():
                drawn = self.call.draw([self._row(request)], settings, float32=True)
        except Exception as error:
            # of a network that knows no other precision; or no memory: this row is none in the job's precision, and a worker
            # with more memory is asked, but the job's other rows need neither savers nor another node for it
            if is_out_of_memory(error):
                release_memory()
            why = f"pixels are not finite numbers, and cannot be drawn in float32: {error}"
            return Rejection("quarantined", why[:500])
        if not drawn.finite[0]:
            return Rejection("quarantined", "pixels are not finite numbers, not in float32 either")
        return drawn

    def call_group(self, request: ImageRequest) -> Hashable:
        """See `GroupsRequests`: a call has one guidance scale, one mix of LoRAs, negative prompts for all its rows or for none,
        prompts of one length where the pipeline does not hide padding, and one image where a rung would look at neighbours."""
        if self.loaded.rungs.draws_alone:
            return request.prompt_id, request.image_index
        settings = self._settings(request)
        alike = (request.guidance_scale, request.negative_prompt is None, request.lora, settings.chunks)
        if self.family.fixed_length:
            return alike
        self._say_apart()
        prompts = (self._prompt(request), request.negative_prompt or "")
        return (*alike, *(self.reader.lengths(text) for text in prompts))

    def _say_apart(self) -> None:
        if not self._apart:
            self._apart.add(self.family.class_name)
            log.info(
                "%s: a prompt's image would depend on how long its neighbours are; only prompts of as many tokens "
                "share a batch",
                self.family.class_name,
            )

    def _settings(self, request: ImageRequest) -> Settings:
        guidance = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        height, width, _ = self._shape(request)
        steps = request.num_inference_steps or self.info.num_inference_steps
        return Settings(width, height, steps, guidance, self._chunks(request))

    def _chunks(self, request: ImageRequest) -> int:
        if self.options.long_prompts != "chunk":
            return 1
        texts = (self._prompt(request), request.negative_prompt or "")
        return max(count_chunks(self.pipeline, text) for text in texts)

    def _shape(self, request: ImageRequest) -> tuple[int, int, int]:
        return request.height or self.info.height, request.width or self.info.width, 3

    def _row(self, request: ImageRequest) -> Row:
        return Row(self._prompt(request), request.negative_prompt, request.seed)

    def _prompt(self, request: ImageRequest) -> str:
        if self.prompts == ICON_SCENES:
            return write_caption(complete(parse_prompt(request.prompt)[0], request.seed))
        return request.prompt

    def _check(self, request: ImageRequest) -> None:
        height, width, _ = self._shape(request)
        if why := self.family.refused_size(width, height):
            raise RowError(f"{width}x{height}: {why}")

    def _too_long(self, request: ImageRequest) -> Rejection | None:
        if self.options.long_prompts != "reject":
            return None
        for what, text in self._texts(request):
            if self.reader.lost(text):
                return Rejection("quarantined", self.reader.warnings(text, what)[0], certain=True)
        return None

    def _texts(self, request: ImageRequest) -> list[tuple[str, str]]:
        negative = [("negative prompt", request.negative_prompt)] if request.negative_prompt else []
        return [("prompt", self._prompt(request)), *negative]

    def _warnings(self, request: ImageRequest) -> tuple[str, ...]:
        """What of the request the model cannot read or does not use."""
        words: list[str] = []
        if self.prompts == ICON_SCENES:
            words += parse_prompt(request.prompt)[1]
        else:
            words += (f"unknown word: {word!r}" for word in self.reader.unknown_words(request.prompt))
        if self.options.long_prompts != "chunk":
            for what, text in self._texts(request):
                words += self.reader.warnings(text, what)
        scale = self._settings(request).guidance_scale
        size = request.width or self.info.width, request.height or self.info.height
        return (*words, *self.family.unused(request, scale), *self.memory.warnings(*size))
