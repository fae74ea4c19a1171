"""One call of a pipeline: requests that agree in all settings go in, uint8 pixels and what is wrong with any come out."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from millijoule.workers.diffusion.families import DRAWS_FOR_NEGATIVES, Family
from millijoule.workers.diffusion.libraries import quiet_libraries
from millijoule.workers.diffusion.loading import LoadedPipeline
from millijoule.workers.diffusion.noise import GlobalNoise, noise_per_row, seeded
from millijoule.workers.diffusion.precision import in_float32, quantised, watch_decoded
from millijoule.workers.diffusion.prompt_chunks import encode_chunks
from millijoule.workers.errors import RowError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What one image is drawn from, as the pipeline gets it."""

    prompt: str
    negative_prompt: str | None
    seed: int


@dataclass(frozen=True)
class Settings:
    """What rows of one call have in common.

    Attributes:
        guidance_scale: None: the pipeline's own.
        chunks: pieces that each prompt is read in; 1: the pipeline reads prompts itself.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None = None
    chunks: int = 1


@dataclass(frozen=True)
class Drawn:
    """`images` is uint8 `[rows, height, width, 3]`; by row, whether all its pixels were finite, and whether they were hidden."""

    images: np.ndarray
    finite: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class OneCall:
    """One call of a pipeline: all that its result depends on.

    Attributes:
        float32: compute in it, whatever precision the pipeline was loaded in.
        seed: that torch's global generators start from.
    """

    rows: tuple[Row, ...]
    settings: Settings
    float32: bool = False
    seed: int = 0


class DrawsAlong(Protocol):
    """Other processes that compute a part of each call of this one's pipeline (`workers.ranks`)."""

    def drawing(self, call: OneCall) -> AbstractContextManager[None]:
        """The time in which this process draws `call`: the others do, too."""
        ...

    def agree(self, step: Callable[[], None]) -> None:
        """Call `step`, which may raise; then nobody goes on."""
        ...


class _Nobody:
    """See `DrawsAlong`."""

    @contextmanager
    def drawing(self, call: OneCall) -> Iterator[None]:
        yield

    def agree(self, step: Callable[[], None]) -> None:
        step()


class PipelineCall:
    """Draws rows with a loaded pipeline, the noise of each from a generator of its own on the CPU.

    Args:
        after_step: called after each step of the pipelines that tell.
        others: have their part in each call.
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        family: Family,
        after_step: Callable[[], None],
        others: DrawsAlong | None = None,
    ) -> None:
        self.loaded = loaded
        self.pipeline = loaded.pipeline
        self.family = family
        self.after_step = after_step
        self.others = others or _Nobody()
        self.alone = False

    def draw(self, rows: Sequence[Row], settings: Settings, *, float32: bool = False) -> Drawn:
        """Draw `rows` in one call, or in one each where the pipeline would mix their noise.

        Args:
            rows: all with a negative prompt, or none.
            settings: of all.
            float32: compute in it, whatever precision the pipeline was loaded in.

        Raises:
            RowError: the scheduler cannot be used in so many steps.
        """
        if not self.alone:
            drawn, mixed = self._draw(OneCall(tuple(rows), settings, float32))
            if not mixed:
                return drawn
            log.warning(
                "%s draws noise from a generator that all images share: each image is drawn alone from here on",
                self.family.class_name,
            )
            self.alone = True
        one_by_one = [self._draw(OneCall((row,), settings, float32, row.seed))[0] for row in rows]
        return Drawn(
            *(
                np.concatenate([getattr(d, name) for d in one_by_one])
                for name in ("images", "finite", "hidden")
            )
        )

    def draw_along(self, one: OneCall) -> None:
        """Compute what rank 0 does in `one`, up to where the latents are decoded."""
        self._result_of(one, {**self.arguments(one.rows, one.settings), "output_type": "latent"}, [])

    def _draw(self, one: OneCall) -> tuple[Drawn, bool]:
        """What was drawn, and whether the global generators had a part in it."""
        rows, decoded = one.rows, list[torch.Tensor]()
        with self.others.drawing(one):
            result, mixed = self._result_of(one, self.arguments(rows, one.settings), decoded)
        images, finite = quantised(result.images)
        for mask in decoded:
            if len(mask) == len(finite):
                finite &= mask.cpu().numpy()
        hidden = np.zeros(len(rows), bool)
        for name in ("nsfw_content_detected", "nsfw_detected"):
            if (found := getattr(result, name, None)) is not None:
                hidden |= np.array([bool(each) for each in found])
        return Drawn(images, finite, hidden), mixed

    def _result_of(self, one: OneCall, call: dict[str, Any], decoded: list[torch.Tensor]) -> tuple[Any, bool]:
        """What the pipeline returns for the arguments `call`, and whether the global generators had a part in it."""
        self.loaded.rungs.begin(len(one.rows))
        with (
            quiet_libraries(),
            GlobalNoise(self.loaded.device, one.seed) as noise,
            noise_per_row(self.pipeline, call["generator"], [row.seed for row in one.rows]),
            watch_decoded(self.pipeline, decoded),
        ):
            result = self._run(call, one.settings, one.float32)
        return result, noise.used

    def _run(self, call: dict[str, Any], settings: Settings, float32: bool) -> Any:
        try:
            if float32:
                with in_float32(self.pipeline):
                    return self.pipeline(**call)
            with self.loaded.precision():
                return self.pipeline(**call)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            NotImplementedError,
            TypeError,
            ValueError,
        ) as error:
            if scheduler := self._scheduler_at_fault(error):
                raise RowError(
                    f"num_inference_steps {settings.num_inference_steps}: {scheduler} does not draw in so many steps "
                    f"with {self.family.class_name}: {error}"
                ) from error
            raise

    def _scheduler_at_fault(self, error: BaseException) -> str | None:
        """The class of the scheduler that `error` comes from, or speaks of, or whose answer the pipeline did not expect."""
        classes = [type(part) for part in self.pipeline.components.values() if hasattr(part, "set_timesteps")]
        modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        named = (c.__name__ for c in classes if c.__module__ in modules or c.__name__ in str(error))
        asked = "self.scheduler." in (traceback.extract_tb(error.__traceback__)[-1].line or "")
        return next(named, type(self.pipeline.scheduler).__name__ if asked else None)

    def arguments(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """Arguments of the call."""
        family = self.family
        negatives = [row.negative_prompt or "" for row in rows]
        has_negatives = rows[0].negative_prompt is not None
        generators = [seeded(row.seed) for row in rows]
        if has_negatives and family.class_name in DRAWS_FOR_NEGATIVES:
            generators = generators * 2  # a row's second noise comes from the row's generator, too
        call: dict[str, Any] = {
            "prompt": [row.prompt for row in rows],
            "generator": generators,
            "num_inference_steps": settings.num_inference_steps,
            "output_type": "pt" if family.tensors else "np",
            **family.constants,
            **family.guide(settings.guidance_scale, negatives if has_negatives else None),
        }
        if family.takes_size:
            call |= {"width": settings.width, "height": settings.height}
        if isinstance(call.get("negative_prompt"), str):  # the same for all
            call["negative_prompt"] = [call["negative_prompt"]] * len(rows)
        if settings.chunks > 1:
            negative = call.pop("negative_prompt", None)
            prompts = call.pop("prompt")
            takes = "negative_prompt_embeds" in family.arguments
            with torch.no_grad():
                call |= encode_chunks(self.pipeline, prompts, negative, settings.chunks, takes)
        if "callback_on_step_end" in family.arguments:
            call["callback_on_step_end"] = self._after_step
        return call

    def _after_step(self, pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        self.others.agree(self.after_step)
        return kept  # nothing is changed
