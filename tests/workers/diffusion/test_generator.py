"""A diffusers directory as a model: it draws, repeats itself, and is refused where it is not safe or not whole."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.diffusion.noise import seeded
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.scenes.prompts import parse_prompt, write_caption
from millijoule.workers.scenes.scenes import complete
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training.diffusion import DiffusionTrainer
from millijoule.workers.training.diffusion_networks import DiffusionConfig

diffusers = pytest.importorskip("diffusers")

SMALL = DiffusionConfig(
    decoder_width=8,
    decoder_blocks=(1, 1, 1),
    unet_widths=(16, 16),
    attention_levels=(False, True),
    head_width=8,
    text_width=16,
    text_layers=1,
    text_heads=2,
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROMPTS = ("a red apple", "two blue stars", "a cat on a blue background", "a heart and a moon")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = DiffusionTrainer(SMALL).export(folder)
    defaults = json.loads((made / "millijoule.json").read_text())
    few = defaults | {"guidance_scale": 3.0, "num_inference_steps": 2}
    (made / "millijoule.json").write_text(json.dumps(few))
    return made.rename(folder / "small")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "small")


@pytest.fixture(scope="module")
def generator(exported):
    return load_generator(str(exported))


def requests(count, **fields):
    return [ImageRequest("p", i, PROMPTS[i % 4], 2**64 - 1 - i, **fields) for i in range(count)]


@pytest.mark.long
def test_an_exported_model_loads_and_draws(generator):
    info = generator.info
    assert isinstance(generator, DiffusersGenerator)
    assert (info.name, info.width, info.height, info.num_inference_steps) == ("small", 64, 64, 2)
    batch = generator.generate(requests(3))
    assert batch.images.shape == (3, 64, 64, 3)
    assert batch.images.dtype == np.uint8
    assert batch.images.std() > 0
    assert batch.warnings == ((), (), ())


def test_prompts_of_icon_scenes_are_said_in_full(generator, folder):
    """What a prompt leaves open is settled from the seed, before the pipeline reads it."""
    open_prompt = ImageRequest("p", 0, "a red apple", seed=3)
    scene = complete(parse_prompt(open_prompt.prompt)[0], 3)
    settings = json.loads((folder / "millijoule.json").read_text())
    (folder / "millijoule.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "prompts"}))
    plain = load_generator(str(folder))
    said = replace(open_prompt, prompt=write_caption(scene))
    assert np.array_equal(generator.generate([open_prompt]).images, plain.generate([said]).images)
    asked = replace(open_prompt, prompt="a red unicorn")
    assert any("unicorn" in w for w in generator.generate([asked]).warnings[0])
    (folder / "millijoule.json").write_text(json.dumps({**settings, "prompts": "poems"}))
    with pytest.raises(InputError, match="'poems'"):
        load_generator(str(folder))


@pytest.mark.long
def test_an_image_does_not_depend_on_its_batch(generator):
    asked = requests(11)
    images = generator.generate(asked).images
    for i in (0, 1, 7, 8, 10):
        assert np.array_equal(generator.generate([asked[i]]).images[0], images[i]), i
    assert np.array_equal(generator.generate(asked[::-1]).images[::-1], images)


@pytest.mark.long
def test_each_step_of_a_batch_is_reported_and_changes_nothing(generator, monkeypatch):
    steps = []
    asked = [ImageRequest("p", 0, "a red cat", seed=1, num_inference_steps=4)]
    before = generator.generate(asked).images
    monkeypatch.setattr(generator, "on_step", lambda: steps.append(1))
    assert np.array_equal(generator.generate(asked).images, before)
    assert len(steps) == 4
    # a pipeline that cannot tell is not asked
    family = generator.call.family
    silent = replace(family, arguments=family.arguments - {"callback_on_step_end"})
    monkeypatch.setattr(generator.call, "family", silent)
    assert np.array_equal(generator.generate(asked).images, before)
    assert len(steps) == 4


@pytest.mark.long
def test_seed_prompt_guidance_and_negative_prompt_matter(generator):
    plain = ImageRequest("p", 0, "a red apple", 5)
    other = [
        replace(plain, seed=5 + 2**40),
        replace(plain, prompt="a blue star"),
        replace(plain, guidance_scale=7.0),
        replace(plain, guidance_scale=0.0),
        replace(plain, negative_prompt="a blue star"),
        plain,
    ]
    images = generator.generate([plain, *other]).images
    differ = [not np.array_equal(image, images[0]) for image in images[1:]]
    assert differ == [True, True, True, True, True, False]
    for asked, image in zip(other, images[1:], strict=True):
        assert np.array_equal(generator.generate([asked]).images[0], image)
    assert np.array_equal(generator.generate([replace(plain, guidance_scale=3.0)]).images[0], images[0])


def test_noise_depends_on_all_bits_of_the_seed_and_small_seeds_are_torchs():
    def noise(seed):
        return torch.randn(4096, generator=seeded(seed))

    seeds = [7, 7 + 2**32, 7 + 2**33, 7 + 2**63, 8 + 2**63]
    drawn = [noise(seed) for seed in seeds]
    assert torch.equal(drawn[0], torch.randn(4096, generator=torch.Generator().manual_seed(7)))
    correlation = np.corrcoef(np.stack(drawn)) - np.eye(len(seeds))
    assert np.abs(correlation).max() < 0.08
    assert all(abs(x.mean()) < 0.08 and abs(x.std() - 1) < 0.06 for x in drawn)
    assert torch.equal(noise(2**64 - 1), noise(2**64 - 1))


def test_a_request_may_ask_for_size_and_steps(generator):
    batch = generator.generate(requests(2, width=96, height=64, num_inference_steps=1))
    assert batch.images.shape == (2, 64, 96, 3)
    with pytest.raises(InputError, match="multiples of 8"):
        generator.generate(requests(1, width=63))


def test_unknown_words_and_long_prompts_are_named(folder):
    settings = json.loads((folder / "millijoule.json").read_text())
    (folder / "millijoule.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "prompts"}))
    prompts = ["zorgon, red Apple.", "red apple", "apple " * 40]
    batch = load_generator(str(folder)).generate([ImageRequest("p", i, p, i) for i, p in enumerate(prompts)])
    assert batch.warnings[0] == ("unknown word: 'zorgon'",)
    assert batch.warnings[1] == ()
    words = "the prompt is 42 tokens long, this model reads the first 20: lost are "
    assert batch.warnings[2] == (words + repr(" ".join(["apple"] * 22)),)


def test_describe_model_gives_the_loaded_models_hash_without_torch(exported, generator):
    program = (
        "import sys; from millijoule.workers.generators.registry import describe_model\n"
        f"print(describe_model({str(exported)!r}).sha256, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [generator.info.sha256, "False", "False"]


def test_the_hash_follows_the_weights_and_not_the_place(folder, exported):
    assert describe_model(str(folder)) == describe_model(str(exported))
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert describe_model(str(folder)).sha256 != describe_model(str(exported)).sha256


def test_name_and_defaults_come_from_millijoule_json(folder):
    (folder / "millijoule.json").write_text(json.dumps({"name": "mine"}))
    info = load_generator(str(folder)).info
    assert (info.name, info.num_inference_steps) == ("mine", 50)
    (folder / "millijoule.json").write_text(json.dumps({"num_inference_steps": "many"}))
    with pytest.raises(InputError, match=r"millijoule\.json: Expected `int \| null`.*num_inference_steps"):
        describe_model(str(folder))


def set_index(folder, **values):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **values}))


def pickle_unet(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")


def add_code(folder):
    (folder / "unet/mine.py").write_text("raise SystemExit('ran')")
    set_index(folder, unet=["mine", "Net"])


def pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 132735\n"
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "weights left in Git LFS": (pointer(WEIGHTS), r"unet/.*\.safetensors: a Git LFS pointer.*git lfs pull"),
    "vocabulary left in Git LFS": (
        pointer("tokenizer/vocab.txt"),
        r"tokenizer/vocab\.txt: a Git LFS pointer",
    ),
    "index left in Git LFS": (pointer("model_index.json"), r"model_index\.json: a Git LFS pointer"),
    "pickled": (pickle_unet, r"unet/diffusion_pytorch_model\.bin: a pickled file"),
    "renamed pickle": (
        lambda f: torch.save({}, f / WEIGHTS),
        r"unet/diffusion_pytorch_model\.safetensors: a pickled checkpoint",
    ),
    "code": (add_code, r"unet/mine\.py: code .* never run"),
    "custom pipeline": (
        lambda f: set_index(f, _class_name=["mine", "Pipe"]),
        r"model_index\.json: _class_name",
    ),
    "module path": (lambda f: set_index(f, unet=["os.path", "join"]), r"model_index\.json: unet"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"unet: has no \.safetensors"),
    "no config": (lambda f: (f / "vae/config.json").unlink(), r"vae/config\.json: no such file"),
    "no component": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler: missing"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json: no such file"),
    "not JSON": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json: not JSON"),
    "config not JSON": (lambda f: (f / "unet/config.json").write_text("{"), r"unet/config\.json: not JSON"),
    "no shard": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "y.safetensors"}}'),
        r"unet/y\.safetensors: no such file",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_unsafe_and_broken_directories_are_refused_by_the_files_name(folder, damage):
    do, message = BROKEN[damage]
    do(folder)
    with pytest.raises(InputError, match=message):
        describe_model(str(folder))
    with pytest.raises(InputError, match=message):
        load_generator(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unet": ["os", "path"]}, r"model_index\.json: unet is of os"),
        ({"unet": ["diffusers", "NoSuchNet"]}, r"model_index\.json: unet is a NoSuchNet"),
        ({"_class_name": "NoSuchPipeline"}, r"model_index\.json: diffusers .* has no NoSuchPipeline"),
        ({"_class_name": "UNet2DModel"}, r"model_index\.json: diffusers .* has no UNet2DModel"),
        ({"_class_name": "StableDiffusionImg2ImgPipeline"}, r"is made for strength"),
    ],
)
def test_classes_that_cannot_be_used_are_refused(folder, values, message):
    set_index(folder, **values)
    with pytest.raises(InputError, match=message):
        load_generator(str(folder))


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "cross_attention_dim": 24}))
    with pytest.raises(InputError, match="small: diffusers cannot load it"):
        load_generator(str(folder))


def test_a_pipeline_without_a_prompt_is_refused(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(InputError, match="DDPMPipeline takes no prompt"):
        load_generator(str(tmp_path / "ddpm"))


def test_without_diffusers_the_extra_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'millijoule\[diffusers\]'"):
        load_generator(str(exported))


def operations(generator, steps=None, **fields):
    """Of an image, by part."""
    asked = [ImageRequest(str(i), 0, "a red cat", i, num_inference_steps=steps, **fields) for i in range(2)]
    counted = generator.operations_of(asked)
    assert all(first == second for first, second in counted.values())
    return {part: int(first) for part, (first, _) in counted.items()}


def test_operations_are_those_of_a_hand_count(generator):
    counts = operations(generator, 5)
    pipeline = generator.pipeline
    unguided = pipeline(prompt="a", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert tuple(unguided.images.shape) == (1, SMALL.latent_channels, 16, 16)
    words = torch.zeros(1, SMALL.max_length, SMALL.text_width)
    unet = hand_count(pipeline.unet, lambda: pipeline.unet(unguided.images, 3, words))
    text = hand_count(
        pipeline.text_encoder, lambda: pipeline.text_encoder(torch.zeros(1, SMALL.max_length).long())
    )
    decoder = hand_count(pipeline.vae, lambda: pipeline.vae.decode(unguided.images))
    assert counts == {"text": 2 * text, "denoiser": 2 * 5 * unet, "decoder": decoder}
    assert operations(generator) == {**counts, "denoiser": 2 * 2 * unet}
    assert operations(generator, guidance_scale=1.0)["denoiser"] == 2 * unet
    assert pipeline.unet.forward.__func__ is type(pipeline.unet).forward  # nothing is left patched


def test_guidance_of_one_halves_the_count(folder, generator):
    (folder / "millijoule.json").write_text(json.dumps({"guidance_scale": 1.0, "num_inference_steps": 2}))
    alone, guided = operations(load_generator(str(folder))), operations(generator)
    assert guided == {
        "text": 2 * alone["text"],
        "denoiser": 2 * alone["denoiser"],
        "decoder": alone["decoder"],
    }


def test_evaluations_beyond_the_steps_are_counted(folder):
    set_index(folder, scheduler=["diffusers", "PNDMScheduler"])
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    model = load_generator(str(folder))
    assert operations(model, 10)["denoiser"] * 21 == operations(model, 20)["denoiser"] * 11


def hand_count(model, run):
    """Two per multiply-accumulate of convolutions, linear layers and attention, seen through forward hooks."""
    total, lengths = 0, {}

    def count(name):
        def hook(module, inputs, output):
            nonlocal total
            if isinstance(module, torch.nn.Conv2d):
                per_output = module.weight[0].numel()
                total += 2 * output.numel() * per_output
            else:
                total += 2 * output.numel() * module.in_features
                parent, _, leaf = name.rpartition(".")
                lengths.setdefault(parent, {})[leaf] = output.shape

        return hook

    hooks = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for shapes in lengths.values():
        query = shapes.get("to_q", shapes.get("q_proj"))
        key = shapes.get("to_k", shapes.get("k_proj"))
        if query is not None:  # scores and weighted sum, each query length x key length x width
            total += 2 * 2 * query[1] * key[1] * query[2]
    return total


@pytest.mark.long
def test_float16_weights_are_multiplied_in_bfloat16_where_the_processor_does(monkeypatch):
    """The shipped baseline: nearly the images of float32, and still none depends on its batch."""
    narrow = load_generator("baseline")
    monkeypatch.setattr("millijoule.workers.rungs.precision.multiplies_bfloat16", lambda device="cpu": False)
    exact = load_generator("baseline")
    assert not exact.loaded.mixed_precision
    wanted = [
        ImageRequest(str(i), 0, f"a red cat left of {i} blue stars", i, num_inference_steps=4)
        for i in (1, 2, 3)
    ]
    images = narrow.generate(wanted).images
    apart = np.abs(images.astype(int) - exact.generate(wanted).images.astype(int)).mean()
    assert apart < 3
    assert (apart > 0) == narrow.loaded.mixed_precision
    assert np.array_equal(narrow.generate(wanted[1:]).images, images[1:])
