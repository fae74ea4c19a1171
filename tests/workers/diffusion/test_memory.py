"""A pipeline's memory: batches of the size that was asked for, savers in their order, weights that are mapped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.local_job import MODEL_SHA256, runner
from support.tiny_pipelines import CALL, SIZES, tiny_pipeline

from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.output.job import JobSpec, open_epoch, publish_job
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers import host_folder
from millijoule.workers.diffusion import memory
from millijoule.workers.diffusion.memory import PipelineMemory
from millijoule.workers.drawing.batch_shapes import BatchShapes
from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.isolate import FittedGenerator, batch_limits
from millijoule.workers.generators.protocol import BatchLimits
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store

diffusers = pytest.importorskip("diffusers")

#: What arithmetic in batches of another size may change, in levels of 255 (float32).
TOLERANCE = 1


@pytest.fixture
def generator():
    """A pipeline of its own for each test: savers change it."""
    return load_generator(str(tiny_pipeline("sd15")))


@pytest.fixture(autouse=True)
def own_host(tmp_path, monkeypatch):
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.setattr(host_folder, "shared_memory_or_temporary", lambda: folder)


def requests(n, **fields):
    return [ImageRequest(f"p{i}", 0, "a red cat", i, num_inference_steps=1, **fields) for i in range(n)]


@pytest.fixture
def calls(generator):
    """Rows of each evaluation of the denoiser."""
    rows = []
    plain = generator.pipeline.unet.forward

    def forward(sample, *args, **kwargs):
        rows.append(len(sample))
        return plain(sample, *args, **kwargs)

    generator.pipeline.unet.forward = forward
    return rows


def drawn(generator, asked, batch_size=None):
    """Images of `asked`, as a worker draws them."""
    keyed = dict(enumerate(asked))
    fitted = FittedGenerator(generator, BatchSizer(batch_limits(generator, batch_size)))
    images = {}
    for batch in fitted.batches(keyed):
        keys = iter(batch)
        for _, outcome in fitted.isolate([keyed[i] for i in batch], lambda: pytest.fail("suspected")):
            assert not isinstance(outcome, Exception), outcome
            images |= {next(keys): image for image in outcome.images}
    return np.stack([images[i] for i in keyed])


def differ(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Batches


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_batch_size_reaches_the_model_and_nothing_is_padded(generator, calls, batch_size):
    asked = requests(7, guidance_scale=0.0)
    images = drawn(generator, asked, batch_size)
    whole, rest = divmod(7, batch_size)
    assert calls == [batch_size] * whole + [rest] * (rest > 0)
    assert differ(images, generator.generate(asked).images) <= TOLERANCE


def test_only_the_last_batch_of_a_compiled_network_is_padded(generator, calls):
    generator.fixed_batch = True
    images = drawn(generator, requests(11, guidance_scale=0.0), 4)
    assert calls == [4, 4, 4]
    generator.fixed_batch = False
    assert differ(images, generator.generate(requests(11, guidance_scale=0.0)).images) <= TOLERANCE


def test_shapes_that_are_known_are_used_and_those_that_failed_are_not():
    shapes = BatchShapes()
    assert shapes.rows_for("512", 3) == 3
    shapes.ran("512", 8)
    shapes.ran("512", 1)
    assert [shapes.rows_for("512", n) for n in (1, 2, 8, 9)] == [1, 8, 8, 9]
    assert shapes.rows_for("1024", 3) == 3
    shapes.failed("512", 8)
    assert shapes.rows_for("512", 4) == 4


def test_a_decoder_that_holds_few_images_costs_no_image(generator, calls):
    asked = requests(9, guidance_scale=0.0)
    true = generator.generate(asked).images
    decode = generator.pipeline.vae.decode

    def small(latents, *args, **kwargs):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.17 GiB")
        return decode(latents, *args, **kwargs)

    generator.pipeline.vae.decode = small
    calls.clear()
    assert differ(drawn(generator, asked), true) <= TOLERANCE
    assert calls == [8, 4, 2, 2, 2, 2, 1]


# Guidance per row


def denoiser_work(folder, generator, calls, scales):
    """(calls of the model, rows of the denoiser) of a job of 300 rows whose guidance scale is drawn from `scales`."""
    folder.mkdir()
    random = np.random.default_rng(1)
    records = [
        {"prompt": "a cat", "guidance_scale": float(random.choice(scales)), "steps": 1} for _ in range(300)
    ]
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    store = open_store(str(folder / "out"))
    made = plan_job(expand_inputs([str(source)]), PlanOptions(shard_size=64), store, {})
    job = publish_job(
        store,
        JobSpec(
            fingerprint=made.fingerprint,
            model="sd15",
            model_name="sd15",
            model_sha256=MODEL_SHA256,
            job_seed=0,
            images_per_prompt=1,
            output_format="parquet",
            shard_size=64,
            duplicate_ids="error",
            prompts=(str(source),),
            rows=made.n_rows,
            images=made.n_images,
            shards=made.n_shards,
            bad_rows=0,
            created_unix=0.0,
            millijoule_version="0",
        ),
    )
    shards = load_job_shards(store, job)
    coordinator = Coordinator(shards, np.zeros(len(shards), bool), 60.0, open_epoch(store, exclusive=True))
    attempts = runner(store, job, 1, generator)
    calls.clear()
    while (lease := coordinator.next_lease("w1", 0.0)) is not None:
        assert attempts.run(lease).outcome == "committed"
        coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
    assert sum(c.images_ok for c in read_commits(store, len(shards))) == 300
    return len(calls), sum(calls)


@pytest.mark.long
def test_three_guidance_scales_in_random_rows_cost_hardly_more_than_one(tmp_path, generator, monkeypatch):
    """Rows of the denoiser are what energy goes with; a call costs something, too, on a GPU. A padded call has 8 rows (16 with
    guidance) whatever is in it. Nothing is computed here: rows are counted."""
    generator.pipeline.vae.decode = lambda latents, **_: (latents.new_zeros(len(latents), 3, 64, 64),)
    calls = []

    def forward(sample, *args, **kwargs):
        calls.append(len(sample))
        return (torch.zeros_like(sample),)

    generator.pipeline.unet.forward = forward
    one_calls, one_rows = denoiser_work(tmp_path / "one", generator, calls, [4.0])
    three_calls, three_rows = denoiser_work(tmp_path / "three", generator, calls, [2.0, 4.0, 7.5])
    assert one_rows == 2 * 300
    assert three_rows == one_rows
    assert three_calls <= 1.1 * one_calls
    generator.fixed_batch = True
    assert denoiser_work(tmp_path / "padded", generator, calls, [2.0, 4.0, 7.5])[1] <= 1.1 * one_rows


# Savers


def names(memory):
    found = []
    while (name := memory.save()) is not None:
        found.append(name)
    return found


def test_savers_come_in_their_order_and_on_a_cpu_nothing_is_moved_to_the_host(generator):
    engine = generator.engine
    engine.release = lambda: True  # as it is where calls were captured
    before = generator.generate(requests(3)).images
    on_gpu = PipelineMemory(generator.pipeline, "cpu", engine, offload_from="cpu")
    assert [name.split(" (")[0] for name in names(on_gpu)] == [
        "the deepspeed engine's graphs are given up",
        "VAE slicing",
        "VAE tiling",
        "offload of text encoders to the host's memory",
        "offload of the denoiser to the host's memory",
    ]
    assert differ(generator.generate(requests(3)).images, before) <= TOLERANCE
    other = load_generator(str(tiny_pipeline("sd15")))
    assert [other.save_memory() for _ in range(3)] == [
        "VAE slicing (images are decoded one by one)",
        "VAE tiling (images are decoded in tiles)",
        None,
    ]


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_no_saver_changes_a_small_image(family):
    """With a processor in the place of the GPU: each layer is moved to where it is."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(tiny_pipeline(family)))
    pipeline.set_progress_bar_config(disable=True)
    saver = PipelineMemory(pipeline, "cpu", offload_from="cpu")

    def draw():
        made = pipeline(
            prompt=["a red cat", "a dog"],
            num_inference_steps=1,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            output_type="np",
            width=SIZES[family],
            height=SIZES[family],
            **CALL.get(family, {}),
        )
        return np.round(made.images * 255).astype(np.uint8)

    before = draw()
    taken = 0
    while (name := saver.save()) is not None:
        taken += 1
        assert differ(draw(), before) <= TOLERANCE, name
    assert taken == 4


def test_an_image_that_was_decoded_in_tiles_says_so(generator):
    assert generator.generate(requests(1)).warnings == ((),)
    for _ in range(2):
        generator.save_memory()
    side = generator.pipeline.vae.tile_sample_min_size
    assert generator.memory.warnings(side, side) == ()
    assert generator.memory.warnings(side + 8, side) == ("decoded in tiles, to save memory",)


# Guesses


def test_a_first_guess_fits_the_free_memory_and_only_a_gpu_may_exceed_it(generator, monkeypatch):
    pipeline = generator.pipeline
    one = generator.memory.image_bytes(512, 512)
    free = int(one / memory.GUESSED_SHARE * 5.5)
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda device: free)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: free)
    assert PipelineMemory(pipeline, "cuda").limits(512, 512) == BatchLimits(4, 16)
    assert PipelineMemory(pipeline, "cuda").limits(64, 64) == BatchLimits(256, 256)
    assert PipelineMemory(pipeline, "cuda").limits(4096, 4096) == BatchLimits(1, 16)
    assert PipelineMemory(pipeline, "cpu").limits(512, 512) == BatchLimits(4, 4)
    assert PipelineMemory(pipeline, "cpu").limits(64, 64) == BatchLimits(8, 8)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: None)
    assert PipelineMemory(pipeline, "cpu").limits(512, 512) == BatchLimits(8, 8)


def test_sdxl_s_decoder_is_estimated_as_it_was_measured():
    """3.17 GB per image of 1024 by 1024 pixels in half precision, by the report of a serving system."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            force_upcast=False,
        ).to(torch.float16)
    pipeline = type("Pipeline", (), {"vae": vae})()
    assert PipelineMemory(pipeline, "cpu").image_bytes(1024, 1024) == pytest.approx(3.17e9, rel=0.1)


def test_a_container_s_limit_counts_and_its_file_cache_does_not(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\n")
    assert memory._cgroup_free_bytes(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_free_bytes(tmp_path) is None
    assert memory._cgroup_free_bytes(tmp_path / "none") is None


# Weights


def mapped_ranges(folder: Path):
    """Address ranges of this process in which files below `folder` are mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(str(folder.resolve())):
            start, end = (int(x, 16) for x in fields[0].split("-"))
            ranges.append((start, end))
    return ranges


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_weights_are_mapped_and_not_copied(family):
    folder = tiny_pipeline(family)
    pipeline = load_generator(str(folder)).pipeline
    ranges = mapped_ranges(folder)
    assert ranges
    copied = [
        f"{name}.{weight}"
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for weight, tensor in model.named_parameters()
        if not any(start <= tensor.data_ptr() < end for start, end in ranges)
    ]
    assert copied == []


@pytest.mark.slow
def test_five_hundred_batches_leave_no_memory_behind(generator):
    """The resident memory after batch 500 is that after batch 100, up to the noise of an allocator."""
    resident = []
    for batch in range(500):
        generator.generate(requests(4, width=64 + 8 * (batch % 3), height=64))
        if batch in (99, 499):
            lines = Path("/proc/self/status").read_text().splitlines()
            resident.append(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")))
    assert resident[1] - resident[0] < 16 * 1024
