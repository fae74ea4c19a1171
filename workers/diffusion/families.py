"""What families of pipelines call things, and what they cannot do: the table behind every call of a pipeline.

Most of it can be asked of a pipeline itself (its arguments, its configuration); what cannot stands here by class name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from millijoule.workers.errors import InputError
from millijoule.workers.schemas import ImageRequest

#: The argument that takes a request's guidance scale, the first that a pipeline has. Priors' own stand last: those pipelines
#: guide in their prior, and hardly in their decoder.
GUIDANCE_ARGUMENTS = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")

#: A negative prompt without a guidance scale of its own, in pipelines whose own default of `true_cfg_scale` switches guidance
#: off: Qwen-Image's default.
TRUE_CFG_SCALE = 4.0

#: What stands for "no negative prompt" in guidance that needs one.
NO_NEGATIVE_PROMPT = " "

#: How far the same request's images may be from each other, in batches of other sizes or beside other prompts, computed in
#: float32: sums are rounded otherwise in products of other shapes, so that now and then a value falls to the next of 255
#: levels, in at most this share of an image's values.
LEVELS, PIXELS = 1, 0.05

#: Pipelines that read prompts to a fixed length, whatever stands beside them, or mask their padding: a neighbour is
#: never seen (`tests/workers/diffusion/test_neighbours.py`). Prompts of any others share a batch only where they have
#: equally many tokens.
FIXED_LENGTH = frozenset(
    {
        "AuraFlowPipeline",
        "ChromaPipeline",
        "FluxPipeline",
        "HunyuanDiTPipeline",
        "IFPipeline",
        "KandinskyV22CombinedPipeline",
        "LatentConsistencyModelPipeline",
        "Lumina2Pipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "QwenImagePipeline",
        "SanaPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "WuerstchenCombinedPipeline",
        "ZImagePipeline",
    }
)

#: Pipelines whose `output_type="pt"` gives tensors of pixels from 0 to 1. Others skip something for it (the safety checker, the
#: scaling): they are asked for numpy arrays.
TENSORS = FIXED_LENGTH - {"IFPipeline", "KandinskyV22CombinedPipeline"}

#: Pipelines whose prior draws noise for the negative prompts after that for the prompts, all from the same list of generators.
DRAWS_FOR_NEGATIVES = frozenset({"KandinskyV22CombinedPipeline", "KandinskyCombinedPipeline"})

#: Pipelines that say nowhere but in their code what size they make: width and height in pixels.
SIZES: Mapping[str, tuple[int, int]] = {"ZImagePipeline": (1024, 1024)}

#: Of how many pixels sides have to be a multiple, where neither decoder nor network say it.
MULTIPLES: Mapping[str, int] = {"WuerstchenCombinedPipeline": 128, "StableCascadeCombinedPipeline": 128}

#: `sample_size` of transformers that have published sizes, which their pipelines draw at instead of those asked for
#: (`use_resolution_binning`); with any other, they fail unless that is switched off.
BINNED: Mapping[str, tuple[int, ...]] = {
    "PixArtAlphaPipeline": (32, 64, 128, 256),
    "PixArtSigmaPipeline": (32, 64, 128, 256),
    "PixArtSigmaPAGPipeline": (32, 64, 128, 256),
    "SanaPipeline": (16, 32, 64, 128),
    "SanaPAGPipeline": (16, 32, 64, 128),
    "SanaSprintPipeline": (16, 32, 64, 128),
}

#: Pipelines with which prompts are encoded in chunks (`long_prompts`).
CHUNKED = frozenset(
    {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"}
)

Guidance = Literal["classifier-free", "true", "embedded", "none"]


@dataclass(frozen=True)
class Family:
    """A pipeline's manner.

    Attributes:
        class_name: of the pipeline.
        arguments: names that a call takes.
        width, height: native size in pixels.
        multiple: of which sides have to be, in pixels.
        guidance: "classifier-free": a scale beyond `off` compares prompt and negative prompt. "true": the same, and it
            needs a negative prompt. "embedded": the scale is an input of the network, which knows no negative prompt.
        guidance_argument: takes the scale of a request; None where nothing does.
        default_guidance: what the pipeline takes without one; None: unknown.
        off: the largest scale that compares nothing.
        fixed_length: whether a prompt is read the same beside shorter and longer ones.
        tensors: whether to ask for tensors rather than arrays.
        constants: arguments of every call.
    """

    class_name: str
    arguments: frozenset[str]
    width: int
    height: int
    multiple: int
    guidance: Guidance
    guidance_argument: str | None
    default_guidance: float | None
    off: float
    fixed_length: bool
    tensors: bool
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_size(self) -> bool:
        """Whether it draws at any size."""
        return {"width", "height"} <= self.arguments

    def refused_size(self, width: int, height: int) -> str | None:
        """Why it draws no images of that many pixels; None: it does."""
        if not self.takes_size and (width, height) != (self.width, self.height):
            return f"this model makes {self.width}x{self.height} pixels"
        if width % self.multiple or height % self.multiple:
            return f"this model needs sides that are multiples of {self.multiple}"
        return None

    def guide(self, scale: float | None, negatives: list[str] | None) -> dict[str, Any]:
        """Arguments for guidance at `scale` (None: the default) away from `negatives` (None: nothing)."""
        call: dict[str, Any] = {}
        if self.guidance_argument is not None and scale is not None:
            call[self.guidance_argument] = scale
        if "true_cfg_scale" in self.arguments:
            return call | self._true_guidance(scale, negatives)
        if (
            negatives is not None
            and self.guidance == "classifier-free"
            and "negative_prompt" in self.arguments
        ):
            call["negative_prompt"] = negatives
        return call

    def _true_guidance(self, scale: float | None, negatives: list[str] | None) -> dict[str, Any]:
        asked = scale if self.guidance_argument == "true_cfg_scale" else None
        if negatives is None and (asked is None or asked <= self.off):
            return {}
        return {
            "true_cfg_scale": self.true_scale(scale),
            "negative_prompt": [words or NO_NEGATIVE_PROMPT for words in negatives or ()]
            or NO_NEGATIVE_PROMPT,
        }

    def true_scale(self, scale: float | None) -> float:
        """How strongly a negative prompt works in a pipeline with `true_cfg_scale`, where a row's scale is `scale`."""
        if self.guidance_argument == "true_cfg_scale" and scale is not None:
            return scale
        own = self.default_guidance if self.guidance_argument == "true_cfg_scale" else None
        return own if own is not None and own > self.off else TRUE_CFG_SCALE

    def unused(self, request: ImageRequest, scale: float | None) -> tuple[str, ...]:
        """Words for what `request` asks for and this pipeline does not do at guidance `scale`."""
        words = []
        if request.guidance_scale is not None and self.guidance_argument is None:
            words.append("guidance_scale is not used by this model")
        if not request.negative_prompt:
            return tuple(words)
        if "negative_prompt" not in self.arguments or self.guidance in ("embedded", "none"):
            words.append("negative_prompt is not used by this model")
        else:
            true = "true_cfg_scale" in self.arguments
            strength = self.true_scale(scale) if true else self.default_guidance if scale is None else scale
            if strength is not None and strength <= self.off:
                words.append(f"negative_prompt has no effect at guidance_scale {strength:g}")
        return tuple(words)


def describe_family(pipeline: Any, where: str) -> Family:
    """What is to be known of `pipeline` before it is called; `where` names it in messages.

    Raises:
        InputError: it does not say what size of image it makes.
    """
    name = type(pipeline).__name__
    parameters = inspect.signature(pipeline.__call__).parameters
    arguments = frozenset(parameters)
    guidance, argument = _guidance(pipeline, arguments)
    default = parameters[argument].default if argument is not None else None
    width, height = _native_size(pipeline, name, parameters, where)
    constants: dict[str, Any] = {}
    if "clean_caption" in arguments:  # it needs packages, and would draw other images on nodes that have them
        constants["clean_caption"] = False
    if "use_resolution_binning" in arguments and not _is_binned(pipeline, name):
        constants["use_resolution_binning"] = False
    return Family(
        class_name=name,
        arguments=arguments,
        width=width,
        height=height,
        multiple=_multiple(pipeline, name),
        guidance=guidance,
        guidance_argument=argument,
        default_guidance=float(default) if isinstance(default, (int, float)) else None,
        off=0.0 if name.startswith("ZImage") else 1.0,
        fixed_length=name in FIXED_LENGTH,
        tensors=name in TENSORS,
        constants=constants,
    )


def check_long_prompts(class_name: str, long_prompts: str) -> None:
    """Raise InputError, naming the option, where prompts for a pipeline of this class cannot be encoded in chunks."""
    if long_prompts == "chunk" and class_name not in CHUNKED:
        names = ", ".join(sorted(CHUNKED))
        raise InputError(
            f"--long-prompts chunk: {class_name} does not read prompts in chunks (these do: {names}); "
            "take truncate or reject"
        )


def _guidance(pipeline: Any, arguments: frozenset[str]) -> tuple[Guidance, str | None]:
    """How a pipeline is guided, and by which argument."""
    argument = next((name for name in GUIDANCE_ARGUMENTS if name in arguments), None)
    transformer = getattr(getattr(pipeline, "transformer", None), "config", None)
    if "true_cfg_scale" in arguments:
        embeds = bool(getattr(transformer, "guidance_embeds", False)) and "guidance_scale" in arguments
        return "true", "guidance_scale" if embeds else "true_cfg_scale"
    if argument is None:
        return "none", None
    unet = getattr(getattr(pipeline, "unet", None), "config", None)
    if getattr(unet, "time_cond_proj_dim", None) is not None or "negative_prompt" not in arguments:
        return "embedded", argument
    return "classifier-free", argument


def _scale_factor(pipeline: Any) -> int:
    """Pixels per latent along a side."""
    movq = getattr(getattr(pipeline, "movq", None), "config", None)
    if movq is not None:
        return int(2 ** (len(movq.block_out_channels) - 1))
    return int(getattr(pipeline, "vae_scale_factor", 1))


def _multiple(pipeline: Any, name: str) -> int:
    """Of how many pixels sides have to be a multiple, lest the pipeline refuses or draws another size."""
    if name in MULTIPLES:
        return MULTIPLES[name]
    scale = _scale_factor(pipeline)
    if name.startswith("Kandinsky"):
        return scale * scale
    transformer = getattr(getattr(pipeline, "transformer", None), "config", None)
    if name.startswith("Sana"):
        return max(scale, 32)
    if name.startswith("IF"):
        return int(2 ** (len(pipeline.unet.config.block_out_channels) - 1))
    if transformer is None:
        # Stable Diffusion's pipelines want multiples of 8 pixels, however small the decoder is
        return max(scale, 8) if name.startswith("StableDiffusion") else scale
    patch = getattr(transformer, "patch_size", None)
    packed = name.startswith(("Flux", "Chroma", "QwenImage", "ZImage", "Bria"))
    return scale * (2 if packed else patch if isinstance(patch, int) else 1)


def _is_binned(pipeline: Any, name: str) -> bool:
    """Whether it has published sizes to draw at, and resizes what it drew to what was asked for."""
    size = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "sample_size", None)
    return size in BINNED.get(name, ())


def _native_size(
    pipeline: Any, name: str, parameters: Mapping[str, inspect.Parameter], where: str
) -> tuple[int, int]:
    """Width and height in pixels of what the pipeline makes when not told."""
    scale = _scale_factor(pipeline)
    configs = [getattr(getattr(pipeline, n, None), "config", None) for n in ("unet", "transformer")]
    found = [getattr(config, "sample_size", None) for config in configs]
    for size in (*found, getattr(pipeline, "default_sample_size", None)):
        if isinstance(size, int):
            return size * scale, size * scale
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[1]) * scale, int(size[0]) * scale
    if name in SIZES:
        return SIZES[name]
    width, height = (parameters[n].default if n in parameters else None for n in ("width", "height"))
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    raise InputError(f"{where}: {name} does not say what size of image it makes")
