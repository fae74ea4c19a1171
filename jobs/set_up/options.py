"""The options of `millijoule generate`, and of the function of the same name: one class says both."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from typing import Annotated, Any, Literal

import tyro

from millijoule.jobs.entry import OnUnlessNo
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.options.rates import RateOptions
from millijoule.workers.errors import InputError
from millijoule.workers.records import convert


@dataclass(frozen=True)
class GenerateOptions:
    """Make images from prompt files on a Ray cluster, and account for the energy.

    Run the same command again to resume: finished shards are kept, whatever was killed. Inside `ray job submit` (or
    with --ray-address) the job runs on that cluster; otherwise Ray starts on this machine for the length of the job.

    Prompt files may have these columns (aliases in brackets): prompt [prompts, text, caption], prompt_id [id,
    custom_id], negative_prompt, seed (-1: none), num_images [n], width, height, size (1024x768), num_inference_steps
    [steps, step], guidance_scale [cfg_scale, cfg, cfgs]; case, spaces, _ and - do not matter. Other columns are passed
    through. In a .txt file each line is a prompt. docs/prompt-files.md has the details.

    Exit codes: 0 complete (images that the model's own safety checker hid are counted in the last lines); 1 error; 2 a
    command line that does not parse or means nothing; 3 complete, but some rows were quarantined; 4 a cap was reached; 5 interrupted,
    resumable; 7 another run has taken over.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|URL ...")]
    """Prompt files: txt, csv, tsv, json, jsonl (also .gz), parquet; paths, folders, globs, s3:// URLs and prefixes."""

    output: Annotated[str, tyro.conf.arg(metavar="DIR|URL")]
    """Output folder, or s3://bucket/prefix. All nodes must see it."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|PATH|ID|URL")] = "default"
    """`default`, `coupled` or `baseline` (models in the package), a .safetensors file (one of ours, or a checkpoint with --config), a
    diffusers directory, a hub id (owner/name), s3://bucket/prefix, or python:MODULE:FACTORY for your own generator.
    `millijoule models MODEL` says what one is and needs."""

    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    format: Literal["parquet", "webdataset", "files"] = "parquet"
    """How images are stored: parquet files, webdataset tars, or plain image files named by prompt id."""

    image_format: Literal["png", "jpeg", "webp"] = "png"
    """What each image is encoded as. png loses nothing; jpeg of photographs is half its size; webp is smallest and takes
    longest, many times png's time. Each carries prompt, seed and model."""

    quality: Annotated[int | None, tyro.conf.arg(metavar="1-100")] = None
    """Of jpeg (default 95) and webp (default 90)."""

    images_per_prompt: int = 1
    """For rows without a num_images column."""

    seed: int = 0
    """Job seed; an image's own seed follows from it, the prompt id and the image index."""

    shard_size: Annotated[str, tyro.conf.arg(metavar="auto|N|SECONDSs")] = "auto"
    """Images per shard, or a target duration such as 60s (a short calibration then sets the number). auto: 4096 of the
    oscillator models, which draw thousands in a second, 256 of others; a job that was begun keeps its own."""

    workers: Annotated[str, tyro.conf.arg(metavar="N|MIN:MAX")] = "auto"
    """Number of workers, or a range for autoscaling: 0:8 holds nothing while nothing waits, and asks for nodes only as
    far as there is work for them. auto: one per device; where all devices are yet to come, one for each that the cluster
    says may come, or 0:8 if it does not say."""

    pool: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME:LABEL=VALUE,...:workers=MIN:MAX ...")] = ()
    """Pools of unlike workers, by labels of Ray nodes: l4:ray.io/accelerator-type=L4:workers=0:8 (label=first|else: the second
    where nodes of the first do not come; no label: any node). Further parts, each after a colon: batch=N, engine=NAME,
    optimize=PRESET or its file, gpus=X (0 to 1; default 1 where an accelerator is named), cpus=X, price=X (an hour of a device),
    images_per_s=X and joules=X per image (until they are measured). docs/pools.md has more. Several pools, in place of --workers
    and --device."""

    prefer: Literal["energy", "speed", "cost"] | None = None
    """What choosing between pools saves: joules, time, or money (price=X of each pool, and --price-per-kwh). With --deadline:
    the devices that finish in time for the fewest joules, or the least money. Default: energy with --deadline, else speed."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    """What workers run on. auto: GPUs where the cluster has some, or where its autoscaler can start a node with one
    (asked when there is work to do); else CPUs, except for a diffusers pipeline too heavy for them. The log says what was
    decided and why. gpu: GPUs, or an error where none can come. cpu: never a GPU."""

    gpus_per_worker: float | None = None
    """GPUs each worker asks for, may be fractional. Default: --ranks-per-worker, or 0 on CPUs. 2 or more, for models too large
    for one: the denoiser of a diffusers pipeline is spread over them."""

    ranks_per_worker: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes of each worker, one per GPU (on CPUs, one per CPU it asks for), that draw each image together: the weights of a
    diffusers pipeline's denoiser are spread over them. Changes images by rounding. Default: --gpus-per-worker, or 1."""

    cpus_per_worker: float = 1.0
    """CPUs each worker asks for, and threads it computes with."""

    resources: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=AMOUNT ...")] = ()
    """Custom Ray resources each worker asks for."""

    lease_seconds: float = 120.0
    """A worker without progress (a step or batch of images, a part of a file stored) for this long loses its shard to
    another; after twice as long it is replaced."""

    part_seconds: float = 10.0
    """A shard that takes a worker longer is sealed in parts, so that a death costs at most this many seconds of drawing, or a
    batch and storing twice where they take longer: whoever goes on draws the rest. 0: no parts."""

    speculate: OnUnlessNo = True
    """At the end of the job idle workers race stragglers for their shards. --no-speculate: they do not."""

    prompt_column: str | None = None
    """Exact name of the prompt column where it is none of the known ones, or one of several."""

    delimiter: Annotated[str | None, tyro.conf.arg(metavar="CHAR|comma|semicolon|pipe|tab")] = None
    """What stands between the fields of csv and tsv files. Default: what the header shows."""

    duplicate_ids: Literal["error", "keep-first", "suffix"] = "error"
    """What to do with a prompt id that stands twice: refuse, keep the first row, or add ~2, ~3 to the later ones."""

    max_prompt_chars: int = 10_000
    """Longer prompts are rejected, row by row."""

    dry_run: bool = False
    """Plan, draw a few images, and print what the whole job would take in time, energy, money and bytes."""

    max_kwh: float | None = None
    """Stop leasing when the job, earlier runs included, will have used this much: shards at work are finished, exit
    code 4, resumable. Counted by the energy counters; a worker without one counts by its estimate, and that is said."""

    max_cost: float | None = None
    """The same in your currency, for electricity; needs --price-per-kwh."""

    max_gco2: float | None = None
    """The same in grams of CO2e; needs --gco2-per-kwh."""

    deadline: str | None = None
    """The same in time: a duration of this run such as 90m or 2h, or a time with its zone (2026-03-01T18:00+01:00)."""

    rates: Annotated[RateOptions, tyro.conf.arg(name="")] = field(default_factory=RateOptions)

    node_meter: Annotated[str | None, tyro.conf.arg(metavar="ipmi|redfish:URL|FILE")] = None
    """Read the nodes' own meters while the job runs, to check the devices' counters (C3): ipmi (ipmitool as root, on
    every node), redfish:https://bmc-{host}/redfish/v1/Chassis/1, or a TOML file that names a meter per node, with
    login and certificate (docs/meters.md). A meter that cannot be read is missing and never ends the job."""

    node_rest: Annotated[str | None, tyro.conf.arg(metavar="W+-W")] = None
    """Watts of a node that no counter sees (fans, board, network cards, losses), and by how much that may be wrong, such
    as 180+-30; without it nodes cannot close. In a FILE: rest_watts and rest_tolerance_watts."""

    telemetry: OnUnlessNo = True
    """Read energy counters, sample power, write live tables and metrics. --no-telemetry: nothing of it; energy is
    missing, and the finished tables say so."""

    otlp: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Also send metrics (hw.energy, hw.power, images) to the OpenTelemetry collector at this address, such as
    http://collector:4318; headers with secrets in OTEL_EXPORTER_OTLP_HEADERS. Needs the `otel` extra."""

    retry_failed: bool = False
    """Give quarantined rows of a finished job one more try, as new shards; a job or a retry that is not finished is gone on with
    first, and this does nothing else. Filtered images stay as they are."""

    ray_address: str | None = None
    """Ray cluster to join, e.g. auto or ray-head:6379. Default: RAY_ADDRESS, else a local one."""

    quiet: bool = False
    """No progress, only warnings and the result."""


#: Options that are text because a number is one of several forms; as keyword arguments numbers are welcome.
_ALSO_NUMBERS = ("workers", "shard_size", "price_per_kwh", "gco2_per_kwh")
_SEQUENCES = ("prompts", "resources", "pool", "lora")
#: Classes whose options stand among those of the command, by the field that holds one.
_GROUPS: dict[str, type] = {"model_options": ModelOptions, "rates": RateOptions}
_GROUP_OF = {f.name: group for group, kind in _GROUPS.items() for f in fields(kind)}


def options_of(keywords: Mapping[str, Any]) -> GenerateOptions:
    """Keyword arguments, named like the options with `_` for `-`, as options.

    Raises:
        TypeError: one has an unknown name, or `prompts` or `output` is missing.
        InputError: one has a value of a wrong type.
    """
    known = [parameter.name for parameter in parameters()]
    for name in keywords:
        if name not in known:
            near = [k for k in known if name in k] or difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"generate() has no option {name!r}; {hint}")
    if missing := [name for name in ("prompts", "output") if name not in keywords]:
        raise TypeError(f"generate() needs {' and '.join(missing)}")
    raw: dict[str, Any] = {group: {} for group in _GROUPS}
    for name, value in keywords.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if name in _ALSO_NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if name in _SEQUENCES:
            value = [value] if isinstance(value, str) else [os.fspath(v) for v in value]
        (raw[_GROUP_OF[name]] if name in _GROUP_OF else raw)[name] = value
    try:
        return convert(GenerateOptions, raw)
    except ValueError as error:
        raise InputError(f"generate(): {error}") from error


def parameters() -> list[inspect.Parameter]:
    """The options as keyword parameters of a function, those of `_GROUPS` among them."""
    found = []
    for f in (f for kind in (GenerateOptions, *_GROUPS.values()) for f in fields(kind)):
        if f.name not in _GROUPS:
            default = inspect.Parameter.empty if f.default is MISSING else f.default
            found.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default))
    return found


def option_words() -> dict[str, str]:
    """What the options' classes say of each option, by name."""
    found = {}
    for kind in (GenerateOptions, *_GROUPS.values()):
        (parsed,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(parsed, ast.ClassDef)
        for option, words in pairwise(parsed.body):
            if isinstance(option, ast.AnnAssign) and isinstance(words, ast.Expr):
                assert isinstance(option.target, ast.Name)
                found[option.target.id] = " ".join(ast.literal_eval(words.value).split())
    return found
