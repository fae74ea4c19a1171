"""What `millijoule verify` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from millijoule.workers.judging.image_judge import ICON_JUDGE


@dataclass(frozen=True)
class VerifyOptions:
    """Measure how many times less energy generator A needs than B per accepted image; or check such a measurement.

    What is to be shown and how is written to OUTPUT/registration.json first; publish its printed hash before the
    run (`--register-only` stops there). Blocks alternate as ABBA and BAAB on one device, after warm-up, with idle blocks and
    controls. Every image is judged, and images that are not accepted still cost energy. A run that was interrupted goes
    on where it was when started again with the same options. The result is the folder OUTPUT/bundle, which anyone can
    recompute with `--check`. Exit codes: 0 shown, or bundle sound; 6 measured and not shown; 1 error or mismatch.
    """

    a: str | None = None
    """Generator A, as `millijoule generate --model` takes it: the one that is to need less."""

    b: str | None = None
    """Generator B, the baseline."""

    output: str | None = None
    """Folder for the registration, the blocks and the bundle."""

    check: str | None = None
    """Check this bundle instead, offline; exit code 0 only if all of it can be recomputed."""

    public_key: str | None = None
    """PEM file of the Ed25519 public key that must have signed the bundle that is checked."""

    rejudge: bool = False
    """With --check: read the images again with the packaged verifier (icon scenes only)."""

    register_only: bool = False
    """Write the registration and its hash, and stop."""

    key: str | None = None
    """PEM file of an Ed25519 private key to sign with; without it the bundle is unsigned."""

    factor: float = 100.0
    """What is to be shown: A needs at least this many times less energy."""

    blocks: int = 40
    """Blocks of the comparison, a multiple of 4; the interval needs 20 or more."""

    block_seconds: float = 60.0
    """Length of a block; a batch that has begun is finished. With less than 60 nothing is established."""

    control_quadruples: int = 1
    """Quadruples of each control: A against A, telemetry on against off for A and for B."""

    warmup_cv: float = 0.03
    """Warm-up ends when the speeds of three windows differ by no more than this share. With more than 0.05 nothing is
    established."""

    prompts: str | None = None
    """Text file of prompts, one per line, "family<TAB>prompt" or prompts alone; by default held-out icon scenes."""

    suite: Literal["icons-80", "icons-1000"] | None = None
    """What nouns icon scenes are of, and which verifier reads them; by default the larger one of which both models know every
    noun. With the packaged baseline it is icons-80, all that it knows. Prompts of a file are read with these nouns, too."""

    prompts_per_family: int = 100
    """Icon scenes of each of the six families."""

    images_per_prompt: int = 2
    """Different seeds of each prompt."""

    seed: int = 0
    """Seed of prompts, seeds and the order of blocks."""

    judge: str = ICON_JUDGE
    """Who accepts images: "icon-scene" or "python:MODULE:FACTORY"."""

    metric: tuple[str, ...] = ()
    """Further scores with their margins: "clip:FOLDER=0.2" or "python:MODULE:FACTORY=MARGIN"."""

    score_margin: float = 0.02
    """A's share of accepted images may be lower than B's by this much. With a wider margin than the default nothing is
    established; the same holds for the next two options."""

    frechet_margin: float = 0.05
    """A's Frechet distance may exceed B's by this share of it."""

    min_images: int = 500
    """The quality gate fails with fewer images of an arm."""

    a_batch_size: int | None = None
    """Images per batch of A, in place of the model's own."""

    b_batch_size: int | None = None
    """As above, of B."""

    a_steps: int | None = None
    """Inference steps of A, in place of the model's own."""

    b_steps: int | None = None
    """As above, of B."""

    a_guidance: float | None = None
    """Guidance scale of A, in place of the model's own."""

    b_guidance: float | None = None
    """As above, of B."""

    second_meter: str | None = None
    """CSV file of another meter's energy over the run (source, t_wall_ns, energy_mj; source: node, or power where the
    run could not sample it itself)."""

    rest: Annotated[str | None, tyro.conf.arg(metavar="W+-W")] = None
    """Watts that a node's meter sees and no counter does, and by how much that may be wrong, such as 180+-30. Registered
    before the run; without it a node cannot close."""

    omit_images: bool = False
    """Leave the images out of the bundle; their hashes stay."""

    device: Literal["auto", "gpu", "cpu", "cuda"] = "auto"
    """Where both generators run; gpu is cuda, auto a GPU where there is one."""

    threads: int | None = None
    """CPU threads; PyTorch's default if not given."""
