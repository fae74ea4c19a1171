"""Each rung does what it says: counted at the denoiser's door, compared with diffusers' own recipes, never by its batch."""

import diffusers
import numpy as np
import pytest
import torch
from support.tiny_loras import save_lora
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.rungs.apply import ClimbedRungs
from millijoule.workers.rungs.precision import SettledPrecision, settle_precision
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.rungs.weights import quantize, two_of_four
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import obtain_model

STEPS = 6
PROMPTS = ("a red cat", "two blue stars on a white house", "a moon")


def load(family, **rungs):
    return load_generator(str(tiny_pipeline(family)), options=GeneratorOptions(rungs=Rungs(**rungs)))


def requests(count=3, **fields):
    fields = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "width": 64, "height": 64} | fields
    return [ImageRequest(str(i), 0, PROMPTS[i % 3], seed=i, **fields) for i in range(count)]


#: A product of another number of rows may add up in another order.
ROUNDING = 1


def levels_apart(images, others):
    return np.abs(images.astype(int) - others.astype(int)).max()


class Counter:
    """Rows of each call of a network."""

    def __init__(self, network):
        self.rows = []
        forward = network.forward

        def count(*args, **kwargs):
            first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            self.rows.append(len(first))
            return forward(*args, **kwargs)

        network.forward = count


def climbed(family, rungs):
    """A bare pipeline with rungs, and a count of what reaches its denoiser."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(tiny_pipeline(family)))
    pipeline.set_progress_bar_config(disable=True)
    ladder = ClimbedRungs(pipeline, rungs, SettledPrecision(torch.float32))
    ladder.prepare_weights()
    counter = Counter(ladder.denoiser)
    ladder.skip_work()
    return pipeline, ladder, counter


def call(family, pipeline, **more):
    size = SIZES[family]
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    settings = {"num_inference_steps": STEPS, "width": size, "height": size, "output_type": "np"} | more
    return pipeline(prompt=list(PROMPTS[:2]), generator=seeds, **settings).images


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_after_truncation_the_denoiser_sees_half_the_rows(family):
    pipeline, ladder, counter = climbed(family, Rungs(guidance_until=0.5))
    ladder.begin(2)
    call(family, pipeline, guidance_scale=4.0)
    evaluations = len(pipeline.scheduler.timesteps)
    guided = -(-evaluations // 2)
    assert counter.rows == [4] * guided + [2] * (evaluations - guided)


def test_truncated_guidance_is_diffusers_own_recipe_of_changing_the_scale_in_a_callback():
    pipeline, ladder, _ = climbed("sd15", Rungs(guidance_until=0.5, scheduler="DDIMScheduler"))
    ladder.begin(2)
    images = call("sd15", pipeline, guidance_scale=4.0)

    def end_guidance(pipe, step, timestep, kept):
        if step == STEPS // 2 - 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": kept["prompt_embeds"].chunk(2)[1]}
        return kept

    plain, _, _ = climbed("sd15", Rungs(scheduler="DDIMScheduler"))
    wanted = call(
        "sd15",
        plain,
        guidance_scale=4.0,
        callback_on_step_end=end_guidance,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert np.abs(images - wanted).max() < 1e-5
    assert np.abs(images - call("sd15", plain, guidance_scale=4.0)).max() > 1e-4


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_where_guidance_is_a_second_call_that_call_is_left_out(family):
    more = {"negative_prompt": ["ugly", "ugly"], "true_cfg_scale": 4.0}
    pipeline, ladder, counter = climbed(family, Rungs(guidance_until=0.5))
    ladder.begin(2)
    call(family, pipeline, **more)
    assert counter.rows == [2] * (2 * 3 + 3)


def test_the_deep_cache_computes_inner_blocks_every_other_step_and_outer_ones_always():
    pipeline, ladder, counter = climbed("sd15", Rungs())
    inner, outer = Counter(pipeline.unet.mid_block), Counter(pipeline.unet.down_blocks[0])
    last = Counter(pipeline.unet.up_blocks[-1])
    ladder.rungs = Rungs(step_cache="deep", step_cache_interval=3, scheduler="DDIMScheduler")
    ladder.prepare_weights()
    ladder.skip_work()
    ladder.begin(2)
    call("sd15", pipeline, num_inference_steps=7)
    assert [len(c.rows) for c in (counter, outer, last, inner)] == [7, 7, 7, 3]


def test_a_cache_whose_every_step_is_full_changes_nothing():
    dense = load("sd15").generate(requests(num_inference_steps=1)).images
    cached = load("sd15", step_cache="deep").generate(requests(num_inference_steps=1)).images
    assert np.array_equal(dense, cached)


BY_STEP = {
    "guidance": ("sd15", {"guidance_until": 0.5}),
    "deep": ("sd15", {"step_cache": "deep"}),
    "deep, guidance": ("sd15", {"step_cache": "deep", "step_cache_interval": 3, "guidance_until": 0.4}),
    "pyramid": ("sd15", {"step_cache": "pyramid"}),
    "taylorseer": ("sd3", {"step_cache": "taylorseer"}),
    "int8": ("sd15", {"quantize": "int8"}),
}


@pytest.mark.parametrize(("family", "rungs"), BY_STEP.values(), ids=BY_STEP.keys())
def test_no_rung_makes_an_image_depend_on_its_batch_or_on_the_call_before(family, rungs):
    generator = load(family, **rungs)
    dense = load(family).generate(requests()).images
    images = generator.generate(requests()).images
    assert not np.array_equal(images, dense)
    assert np.array_equal(generator.generate(requests()).images, images)
    assert levels_apart(generator.generate(requests()[::-1]).images[::-1], images) <= ROUNDING
    assert levels_apart(generator.generate(requests()[1:2]).images[0], images[1]) <= ROUNDING


def test_what_a_call_that_failed_left_in_a_cache_is_dropped():
    generator = load("sd15", step_cache="deep", guidance_until=0.5)
    images = generator.generate(requests()).images

    def fail():
        raise KeyboardInterrupt

    generator.on_step = fail
    with pytest.raises(KeyboardInterrupt):
        generator.generate(requests())
    generator.on_step = lambda: None
    assert np.array_equal(generator.generate(requests()).images, images)


def test_the_cache_that_looks_at_images_draws_alone():
    generator = load("flux", step_cache="first-block", step_cache_threshold=0.9)
    counter = Counter(generator.pipeline.transformer)
    images = generator.generate(requests()).images
    assert set(counter.rows) == {1}
    assert np.array_equal(generator.generate(requests()[2:]).images[0], images[2])


def test_what_one_row_is_rounded_to_does_not_depend_on_another():
    network = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert quantize(network, "int8") == 1
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    alone = network(rows[:1])
    assert torch.equal(network(torch.stack([rows[0], 1000 * rows[1]]))[:1], alone)


def test_a_lora_changes_what_runs_with_rungs(tmp_path):
    file = save_lora(tiny_pipeline("sd15"), tmp_path / "ink.safetensors", 2)
    rungs = Rungs(precision="bfloat16", guidance_until=0.5, step_cache="deep", channels_last=True)
    found = obtain_model(
        str(tiny_pipeline("sd15")), GeneratorOptions(rungs=rungs, loras=(LoraChoice(str(file)),))
    )
    generator = load_generator(found.model, options=found.options)
    with_it, without = (generator.generate(requests(1, lora=mix)).images for mix in (None, "none"))
    assert levels_apart(with_it, without) > ROUNDING
    assert np.array_equal(generator.generate(requests(1, lora=None)).images, with_it)


def test_what_is_kept_of_a_call_is_gone_when_its_steps_are():
    pipeline, ladder, _ = climbed("sd15", Rungs(step_cache="deep", scheduler="DDIMScheduler"))
    ladder.begin(2)
    seen = []
    decode = pipeline.vae.decode

    def look(*args, **kwargs):
        seen.append(len(ladder._position.kept))
        return decode(*args, **kwargs)

    pipeline.vae.decode = look
    call("sd15", pipeline)
    assert seen == [0]


def test_operations_follow_what_is_left_out():
    asked = requests(1, num_inference_steps=STEPS)
    dense = load("sd15").operations_of(asked)
    truncated = load("sd15", guidance_until=0.5).operations_of(asked)
    assert truncated["text"] == dense["text"]
    assert 0.7 * dense["denoiser"] < truncated["denoiser"] < 0.8 * dense["denoiser"]


def test_steps_are_for_requests_that_do_not_say():
    generator = load("sd15", steps=3, scheduler="DDIMScheduler")
    counter = Counter(generator.pipeline.unet)
    assert generator.info.num_inference_steps == 3
    generator.generate(requests(1, num_inference_steps=None))
    assert len(counter.rows) == 3
    generator.generate(requests(1, num_inference_steps=5))
    assert len(counter.rows) == 8


def test_another_solver_has_the_models_own_noise_schedule():
    own = load("sd15").pipeline.scheduler.config
    scheduler = load("sd15", scheduler="DPMSolverMultistepScheduler").pipeline.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert scheduler.config[name] == own[name]


@pytest.mark.parametrize(
    "name", ["NoSuchScheduler", "UNet2DConditionModel", "FlowMatchEulerDiscreteScheduler"]
)
def test_a_scheduler_that_is_none_for_this_model_is_refused_with_those_that_are(name):
    with pytest.raises(InputError, match=rf"--scheduler {name}: .*DDIMScheduler"):
        load("sd15", scheduler=name)


def test_weights_are_narrow_and_time_steps_are_not():
    precision = settle_precision("bfloat16", device="cpu", stored_in_float16=False)
    assert precision == SettledPrecision(torch.float32, mixed=True, denoiser=torch.bfloat16)
    generator = load("sd15", precision="bfloat16")
    seen = []
    embed = generator.pipeline.unet.time_proj.forward
    generator.pipeline.unet.time_proj.forward = lambda t: (seen.append(t), embed(t))[1]
    dense = load("sd15", precision="float32").generate(requests()).images
    images = generator.generate(requests()).images
    assert {p.dtype for p in generator.pipeline.unet.parameters()} == {torch.bfloat16}
    wanted = {int(t) for t in generator.pipeline.scheduler.timesteps}
    assert {int(t) for x in seen for t in x} == wanted
    assert 0 < np.abs(images.astype(int) - dense.astype(int)).max() < 24
    assert (
        levels_apart(generator.generate(requests()[1:2]).images[0], images[1]) <= 3 * ROUNDING
    )  # eight bits


@pytest.mark.parametrize(
    "rungs", [{"channels_last": True}, {"fuse_qkv": True}, {"attention_backend": "_native_math"}]
)
def test_layouts_and_kernels_change_images_by_rounding_only(rungs):
    generator = load("sd15", **rungs)
    images, dense = generator.generate(requests()).images, load("sd15").generate(requests()).images
    assert np.abs(images.astype(int) - dense.astype(int)).max() <= 1
    assert generator.loaded.rungs.words


def test_channels_last_is_how_convolutions_are_kept():
    weight = load("sd15", channels_last=True).pipeline.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not load("sd15").pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_two_of_four_keeps_the_two_larger_of_every_four():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    sparse = two_of_four(weight)
    for row, kept in zip(weight.reshape(-1, 4).tolist(), sparse.reshape(-1, 4).tolist(), strict=True):
        larger = set(sorted(range(4), key=lambda i: -abs(row[i]))[:2])
        assert kept == [row[i] if i in larger else 0 for i in range(4)]


def test_no_rung_changes_nothing_and_says_nothing():
    plain, with_none = load_generator(str(tiny_pipeline("sd15"))), load("sd15")
    assert with_none.loaded.rungs.words == []
    assert np.array_equal(plain.generate(requests()).images, with_none.generate(requests()).images)
    assert "step" not in vars(with_none.pipeline.scheduler)
    assert "forward" not in vars(with_none.pipeline.unet)
