"""`millijoule convert`: turn a published Un-0 checkpoint into a file that `--model` takes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.workers.errors import InputError

if TYPE_CHECKING:
    from millijoule.workers.generators.un0_checkpoint import Un0Checkpoint
    from millijoule.workers.generators.un0_integers import Un0Integers


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a published Un-0 checkpoint (a .pt file) to safetensors, for `millijoule generate --model`.

    The checkpoint is read as data: a file that holds more than tensors and plain values is refused, and none of its
    code runs. Tensor names, values and the training config are kept as published. What is written has been loaded and
    has drawn images; a model that cannot is refused. Where integers draw what floating point does, the file says so, and CPUs
    then draw it in integers.
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT.pt")]
    """The .pt file."""

    output: Annotated[Positional[str], arg(metavar="OUT.safetensors")]
    """The safetensors file to write."""

    name: str | None = None
    """The model's name, as images will carry it; the output's file name if not given."""

    class_names: str | None = None
    """File with the classes' names in order, a JSON list or one per line. A model with ten classes and 32 pixels has
    CIFAR-10's unless given; any other can be prompted by number only."""

    parameterization: Literal["standard", "mup"] | None = None
    """How the couplings are scaled, for a checkpoint whose config does not say."""

    form: Literal["auto", "float"] = "auto"
    """How CPUs draw it. auto: in integers, several times faster and the same pixels on every processor, if 99.95 % of the values of
    64 test images are within 2 of 255 levels of what floating point makes of them; else, and with float, in floating point."""

    force: bool = False
    """Replace the output if it exists."""


def run(options: ConvertOptions) -> int:
    from millijoule.workers.generators import un0_checkpoint
    from millijoule.workers.generators.un0 import Un0Generator, check_images

    source, target = Path(options.checkpoint), Path(options.output)
    _keep_existing(target, options)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is the checkpoint itself; give the output another name")
    checkpoint = un0_checkpoint.read_checkpoint(source, parameterization=options.parameterization)
    model = checkpoint.architecture
    class_names: tuple[str, ...] = ()
    if options.class_names is not None:
        class_names = un0_checkpoint.read_class_names(Path(options.class_names))
        if len(class_names) != model.classes:
            raise InputError(
                f"--class-names {options.class_names}: has {len(class_names)} names, the model {model.classes} classes"
            )
    elif (model.classes, model.image_size) == (len(un0_checkpoint.CIFAR10_CLASSES), 32):
        class_names = un0_checkpoint.CIFAR10_CLASSES

    def check(file: Path) -> None:
        try:
            check_images(Un0Generator.load(file))
        except (InputError, ValueError, RuntimeError) as error:
            words = str(error).removeprefix(f"{file}: ")
            raise InputError(f"{source}: its model cannot be used: {words}") from error
        _keep_existing(target, options)  # it may have come meanwhile

    name = options.name or target.stem
    integers, words = (
        _integers(checkpoint) if options.form == "auto" else (None, "floating point, as asked for")
    )
    un0_checkpoint.write_safetensors(
        checkpoint,
        target,
        name=name,
        class_names=class_names,
        integers=None if integers is None else asdict(integers),
        check=check,
    )
    print(
        f"{target}: {model.oscillators} oscillators, {model.classes} classes, {model.image_size}x{model.image_size} "
        f"pixels, {model.steps} {model.solver} steps, {model.parameters:,} parameters"
    )
    print(f"on CPUs: {words}")
    return COMPLETE


def _integers(checkpoint: Un0Checkpoint) -> tuple[Un0Integers | None, str]:
    """How the model runs in integers, None where it does not, and words for the user."""
    import torch

    from millijoule.workers.generators.un0 import float_images
    from millijoule.workers.generators.un0_checkpoint import canonical
    from millijoule.workers.generators.un0_integers import NEAR_LEVELS, choose_integers

    tensors = canonical(checkpoint.tensors)
    try:
        with torch.inference_mode():
            found = choose_integers(
                checkpoint.architecture, tensors, float_images(checkpoint.architecture, tensors)
            )
    except ValueError as error:
        return None, f"floating point: {error}"
    return found, (
        f"integers; {100 * found.near:.3f} % of the values of {found.images} images are within {NEAR_LEVELS} levels of "
        f"floating point, all within {found.farthest}"
    )


def _keep_existing(target: Path, options: ConvertOptions) -> None:
    if target.exists() and not options.force:
        raise InputError(f"{target}: exists; give another name, or --force to replace it")


def main(argv: list[str] | None = None) -> int:
    return run_command("convert", ConvertOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
