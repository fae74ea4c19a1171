"""`millijoule models`: what a model is and what it needs, without a GPU and without reading its weights."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from millijoule.jobs.entry import COMPLETE, ERROR, run_command
from millijoule.jobs.evaluate import EvaluateOptions, largest_suite, list_items, mean_operations
from millijoule.jobs.options.model import ModelOptions
from millijoule.workers.errors import InputError, NodeError
from millijoule.workers.generators.protocol import CountsOperations, Generator, known_nouns
from millijoule.workers.scenes.vocabulary import VOCABULARIES
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.visible_text import visible_lines

if TYPE_CHECKING:
    from millijoule.workers.sources.obtain import ObtainedModel


@dataclass(frozen=True)
class ModelsOptions:
    """Say what a model is: its parts, sizes and parameters, operations per image, the memory it will need, which options it
    takes, and what will not work.

    Of what is elsewhere (hub, bucket) the files are fetched as a job would fetch them, into the same caches. Weights are not
    read, only their headers, and no GPU is asked. Exit codes: 0 the model can be used; 1 it cannot, and why.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """What `millijoule generate --model` takes."""

    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    json: bool = False
    """As JSON."""


def run(options: ModelsOptions) -> int:
    described = describe(options.model, options.model_options)
    if options.json:
        print(json.dumps(described, indent=1, ensure_ascii=False))
    else:
        print(visible_lines("\n".join(words_of(described))))
    return ERROR if described["problems"] else COMPLETE


def describe(model: str, options: ModelOptions) -> dict[str, Any]:
    """What is known of `model`, as JSON values; `problems` are words for what will not work, `notes` for what is to be known."""
    said: dict[str, Any] = {"model": model, "problems": [], "notes": []}
    try:
        obtained = options.obtain(model)
    except (InputError, NodeError) as error:
        said["problems"].append(str(error))
        return said
    return said | describe_obtained(obtained)


def describe_obtained(obtained: ObtainedModel) -> dict[str, Any]:
    """The same of a model that is on this machine."""
    from millijoule.workers import factories
    from millijoule.workers.generators.registry import is_pipeline, model_path

    said: dict[str, Any] = {
        "name": obtained.identity.name,
        "sha256": obtained.identity.sha256,
        "commit": obtained.commit,
        "problems": [],
        "notes": [],
    }
    if obtained.model.startswith(factories.PREFIX):
        said |= {"kind": "a function of yours"}
        said["notes"].append("what it draws is known once it has been called")
        return said
    said["path"] = str(model_path(obtained.model))
    try:
        if is_pipeline(model_path(obtained.model)):
            return said | _pipeline(obtained, said["notes"])
        return said | _own(obtained)
    except InputError as error:
        said["problems"].append(str(error))
        return said


def _own(obtained: ObtainedModel) -> dict[str, Any]:
    """A model of ours: small enough to be loaded for its description."""
    import math

    from millijoule.workers.generators.model_files import read_header
    from millijoule.workers.generators.registry import load_generator, model_path

    path = model_path(obtained.model)
    header = read_header(path)
    generator = load_generator(obtained.model)
    size = path.stat().st_size
    return {
        "kind": f"a model of this program ({type(generator).__name__.removesuffix('Generator')})",
        "parameters": sum(map(math.prod, header.shapes.values())),
        "weight_bytes": size,
        "width": generator.info.width,
        "height": generator.info.height,
        "num_inference_steps": generator.info.num_inference_steps,
        "operations_per_image": _mean_operations(generator),
    }


def _mean_operations(generator: Generator) -> dict[str, int] | None:
    """Of an image, by part, over prompts of `millijoule evaluate`; None: it does not say."""
    if not isinstance(generator, CountsOperations):
        return None
    options = EvaluateOptions("", "", images_per_prompt=1)
    items = list_items(options, VOCABULARIES[largest_suite(known_nouns(generator))])
    return mean_operations(
        generator.operations_of([ImageRequest("", 0, item.prompt, item.seed) for item in items])
    )


def _pipeline(obtained: ObtainedModel, notes: list[str]) -> dict[str, Any]:
    from millijoule.workers.diffusion.outline import outline
    from millijoule.workers.generators.registry import CPU_WEIGHTS_BYTES, model_path
    from millijoule.workers.pipeline_parts.model_files import read_model
    from millijoule.workers.pipeline_parts.weight_table import list_parts

    folder = read_model(model_path(obtained.model), obtained.options)
    parts = list_parts(folder)
    said: dict[str, Any] = {
        "kind": folder.class_name,
        "parts": [asdict(part) for part in parts],
        "absent": list(folder.absent),
        "parameters": sum(part.parameters for part in parts),
        "weight_bytes": sum(part.size_bytes for part in parts),
    }
    if said["weight_bytes"] > CPU_WEIGHTS_BYTES:
        notes.append("needs a GPU in practice: --device cpu runs it anyway, slowly")
    try:
        found = outline(folder, obtained.options)
    except InputError as error:
        return said | {"problems": [str(error)]}
    family = found.family
    takes = (
        ["negative_prompt"] if "negative_prompt" in family.arguments and family.guidance != "embedded" else []
    )
    takes += ["guidance_scale"] if family.guidance_argument else []
    takes += ["width", "height"] if family.takes_size else []
    if not found.takes_loras:
        notes.append("takes no LoRA")
    if "callback_on_step_end" not in family.arguments:
        notes.append("reports no steps: a batch has to end within twice --lease-seconds")
    if not family.fixed_length:
        notes.append(
            "an image depends on its neighbours' prompts: only prompts of as many tokens share a batch"
        )
    return said | {
        "problems": list(found.misfits),
        "width": family.width,
        "height": family.height,
        "num_inference_steps": found.num_inference_steps,
        "guidance_scale": found.guidance_scale,
        "operations_per_image": found.operations,
        "operations_not_counted": found.not_counted,
        "gpu_weight_bytes_estimate": found.weight_bytes,
        "bytes_per_image_estimate": found.image_bytes,
        "row_columns": [*takes, "num_inference_steps", "seed"],
        "sides_are_multiples_of": family.multiple,
        "schedulers": list(found.schedulers),
        "loras": found.takes_loras,
        "long_prompts": list(found.long_prompts),
    }


def words_of(said: dict[str, Any]) -> list[str]:
    """The description as lines for people."""
    if "name" not in said:
        return [f"problem     {text}" for text in said["problems"]]
    lines = [
        f"model       {said['name']} ({said['sha256'][:12]})",
        f"kind        {said.get('kind', 'unknown')}",
    ]
    if said.get("commit"):
        lines.append(f"commit      {said['commit']}")
    for part in said.get("parts", ()):
        weights = f"{_count(part['parameters'])} parameters, {part['dtype']}, {_bytes(part['size_bytes'])}"
        variant = f", variant {part['variant']}" if part["variant"] else ""
        lines.append(
            f"  {part['name']:<18}{part['class_name']}{f': {weights}{variant}' if part['dtype'] else ''}"
        )
    if said.get("absent"):
        lines.append(f"left out    {', '.join(said['absent'])}")
    if "parameters" in said:
        lines.append(
            f"weights     {_count(said['parameters'])} parameters, {_bytes(said['weight_bytes'])} stored"
        )
    if "width" in said:
        guidance = said.get("guidance_scale")
        scale = f", guidance {guidance:g}" if guidance is not None else ""
        lines.append(
            f"draws       {said['width']}x{said['height']} pixels in {said['num_inference_steps']} steps{scale} by default"
        )
    if operations := said.get("operations_per_image"):
        of_parts = ", ".join(f"{name} {_count(n)}" for name, n in operations.items())
        lines.append(f"operations  {_count(sum(operations.values()))} per image ({of_parts})")
    elif why := said.get("operations_not_counted"):
        lines.append(f"operations  not counted: {why}")
    if "gpu_weight_bytes_estimate" in said:
        weights, image = said["gpu_weight_bytes_estimate"], said["bytes_per_image_estimate"]
        lines.append(
            f"memory      about {_bytes(weights + image)} on a GPU for one image, {_bytes(image)} for each one more "
            "(an estimate: weights and the decoder's peak)"
        )
    if "row_columns" in said:
        lines += [
            f"rows        {', '.join(said['row_columns'])}; sides are multiples of {said['sides_are_multiples_of']} pixels",
            f"options     --lora: {'yes' if said['loras'] else 'no'}; --long-prompts: {', '.join(said['long_prompts'])}",
            f"schedulers  {', '.join(said['schedulers'])}",
        ]
    lines += [f"note        {text}" for text in said["notes"]]
    lines += [f"problem     {text}" for text in said["problems"]]
    return lines


def _count(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def main(argv: list[str] | None = None) -> int:
    return run_command("models", ModelsOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
