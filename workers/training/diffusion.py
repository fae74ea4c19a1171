"""The conventional baseline: a small Stable Diffusion, in diffusers' own classes, trained on icon scenes.

Three phases in one run. First the text encoder learns to read captions (`scenes.prompts.write_caption`): where a noun
stands, its code must tell the icon's place, size, colour and noun. Then the decoder of the autoencoder, which writes a
64-pixel render as a 16x16 grid of latents; its encoder is not trained: it holds the principal components of patches of
four pixels, which keep all that the verifier sees; a trained one lost half of the small icons. After that text encoder and
U-Net learn together to predict the velocity (Salimans and Ho 2022) of noised latents, on a schedule that ends in pure
noise (Lin et al. 2024), with some captions dropped for classifier-free guidance (Ho and Salimans 2022). `export` writes the
averaged weights as a directory that `DiffusionPipeline.from_pretrained` loads, and `--model`. Needs the `diffusers` and
`train` extras.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.errors import InputError
from millijoule.workers.generators.diffusers_model import import_diffusers
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.generators.pipeline_folder import DEFAULTS, ICON_SCENES
from millijoule.workers.scenes.prompts import CAPTION_WORDS, CAPTION_WORDS_PER_ICON, write_caption
from millijoule.workers.scenes.renderer import draw_variation, render_scenes
from millijoule.workers.scenes.scenes import (
    COLOURS,
    IMAGE_SIZE,
    MAX_COUNT,
    NOUNS,
    SIZES,
    WINDOWS,
    Scene,
    sample_training_scenes,
    scene_tokens,
)
from millijoule.workers.training.graphed_step import GraphedStep
from millijoule.workers.training.loop import GeneratorTrainer, newest_share, schedule, update_average
from millijoule.workers.training.optimizer import adamw, clip_and_step, load_optimizer, set_learning_rate

#: Factor on the words' initial embeddings.
EMBEDDING_SCALE = 40.0

#: Where the decoder's input is still nearly linear.
LATENT_REACH = 2.0

#: Renders whose patches the encoder's principal components are found from.
PRINCIPAL_IMAGES = 2048

UNKNOWN, START, END = "<unk>", "<s>", "</s>"

#: Token of each word.
VOCABULARY = {word: i for i, word in enumerate((UNKNOWN, START, END, *CAPTION_WORDS))}


#: What the text encoder learns to tell of an icon, in the order of its scene tokens, and how many of each there are.
ICON_PARTS = (len(NOUNS), len(COLOURS), len(SIZES), len(WINDOWS))


@dataclass(frozen=True)
class DiffusionConfig:
    """One training run; with the same config, the same steps follow, on a CPU bit for bit on one machine.

    `steps` counts all three phases; each has its own learning-rate schedule, warm-up and then cosine to zero.
    """

    steps: int = 15000
    text_steps: int = 600
    autoencoder_steps: int = 4000  # 0 with the autoencoder of another run (`start_from`)
    batch: int = 32
    text_batch: int = 64
    autoencoder_batch: int = 8
    learning_rate: float = 1e-3
    text_learning_rate: float = 2e-3
    autoencoder_learning_rate: float = 2e-3
    warm_up: int = 200
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    prompt_dropout: float = 0.1
    latent_noise: float = 0.05  # of the decoder's training; latents reach to about `LATENT_REACH`
    seed: int = 0
    latent_channels: int = 16
    decoder_width: int = 32
    decoder_blocks: tuple[int, ...] = (2, 1, 1)  # each level after the first doubles the sides
    unet_widths: tuple[int, ...] = (64, 128, 192)
    attention_levels: tuple[bool, ...] = (False, True, False)
    layers_per_block: int = 1
    head_width: int = 64
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    max_length: int = 2 + CAPTION_WORDS_PER_ICON * MAX_COUNT + 2  # tokens, start and end included


@dataclass(frozen=True)
class DiffusionData:
    """What a step of `config` needs, whichever phase it lies in; see `StepData`."""

    config: DiffusionConfig

    def __call__(self, step: int) -> dict[str, Tensor]:
        config = self.config
        rng = np.random.default_rng((config.seed, step))
        if step < config.text_steps:
            scenes = draw_scenes(config.text_batch, rng)
            return {"tokens": torch.from_numpy(scene_tokens(scenes)), "ids": caption_ids(scenes, config)}
        if step < config.text_steps + config.autoencoder_steps:
            return self._scenes(config.autoencoder_batch, rng)[1] | _noise_seed(rng)
        scenes, made = self._scenes(config.batch, rng)
        ids = caption_ids(scenes, config)
        dropped = torch.from_numpy(rng.random(config.batch) < config.prompt_dropout)
        ids[dropped, 1:] = VOCABULARY[END]
        # stratified: one time from each of `batch` equal slices, for less variance
        times = (np.arange(config.batch) + rng.random(config.batch)) / config.batch
        return made | {"ids": ids, "times": torch.from_numpy(times)} | _noise_seed(rng)

    def _scenes(self, count: int, rng: np.random.Generator) -> tuple[list[Scene], dict[str, Tensor]]:
        """Scenes, and what their renders are drawn from."""
        scenes = draw_scenes(count, rng)
        variation = draw_variation(count, 1, int(rng.integers(2**62)))
        return scenes, {"tokens": torch.from_numpy(scene_tokens(scenes)), **variation}


def _noise_seed(rng: np.random.Generator) -> dict[str, Tensor]:
    return {"noise_seed": torch.tensor(int(rng.integers(2**62)))}


class DiffusionTrainer(GeneratorTrainer):
    """Autoencoder, text encoder and U-Net with their moving averages; a `loop.Trainer`."""

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        device: str = "cpu",
        compiled: bool = False,
        data_processes: int = 0,
    ) -> None:
        diffusers, transformers = import_diffusers()
        super().__init__(config, DiffusionData(config), device, data_processes)
        self.config = config
        self.tokenizer = build_tokenizer(config)
        self.scheduler = _build_scheduler()
        levels = len(config.decoder_blocks)
        # without normalisation layers: those of the usual autoencoder take the colour out of flat images
        self.autoencoder: Any = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(3 * 4 ** (levels - 1),) * levels,
            decoder_block_out_channels=(config.decoder_width,) * levels,
            num_encoder_blocks=(0,) * levels,
            num_decoder_blocks=config.decoder_blocks,
            latent_channels=config.latent_channels,
        )
        set_principal_encoder(self.autoencoder, draw_images(PRINCIPAL_IMAGES, config.seed))
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                projection_dim=config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                max_position_embeddings=config.max_length,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        with torch.no_grad():
            # CLIP's 0.02 drowns in the layers' biases: after 3,200 steps all prompts still looked the same to the U-Net
            text.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)]
        unet = diffusers.UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 2 ** (levels - 1),
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.unet_widths,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=config.layers_per_block,
            # diffusers' misnomer: this is the number of heads
            attention_head_dim=tuple(max(1, w // config.head_width) for w in config.unet_widths),
            cross_attention_dim=config.text_width,
            # the prompt also reaches every layer, by the path of the noise level: colours and nouns are learned sooner
            addition_embed_type="text",
            addition_embed_type_num_heads=config.text_heads,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=16,
        )
        self.denoiser = nn.ModuleDict({"text": text, "unet": unet})
        self.reader = nn.Linear(config.text_width, sum(ICON_PARTS))
        layout = torch.channels_last if self.on_gpu else torch.preserve_format
        for model in (self.autoencoder, self.denoiser, self.reader):
            model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.average = nn.ModuleDict({"autoencoder": self.autoencoder, "denoiser": self.denoiser})
        self.average = deepcopy(self.average).requires_grad_(False).eval()
        self.optimizers = {
            name: adamw(
                model.parameters(),
                device,
                lr=config.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=config.weight_decay,
            )
            for name, model in (
                ("text", nn.ModuleList([text, self.reader])),
                ("autoencoder", self.autoencoder.decoder),
                ("denoiser", self.denoiser),
            )
        }
        self._predict = torch.compile(self._velocity) if compiled else self._velocity
        self._denoise = GraphedStep(self._compute_denoiser) if self.on_gpu else self._compute_denoiser
        signal = self.scheduler.alphas_cumprod
        self._signal, self._noise = (x.sqrt().to(device) for x in (signal, 1 - signal))

    def start_from(self, folder: Path) -> None:
        """Take over the autoencoder of a finished run; with `text_steps = 0`, text encoder and U-Net as well.

        Raises:
            InputError: not a diffusers directory, or what is to be taken has other sizes than this config.
        """
        try:
            scaling = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
            self.autoencoder.load_state_dict(_read_weights(folder / "vae"))
            self.autoencoder.register_to_config(scaling_factor=float(scaling))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: no autoencoder of this recipe's sizes: {error}") from error
        self.average["autoencoder"] = deepcopy(self.autoencoder).requires_grad_(False).eval()
        if self.config.text_steps == 0:
            try:
                self.denoiser["text"].load_state_dict(_read_weights(folder / "text_encoder"))
                self.denoiser["unet"].load_state_dict(_read_weights(folder / "unet"))
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{folder}: with text_steps = 0, text encoder and U-Net are taken from there too, and do not fit: {error}"
                ) from error
            self.average["denoiser"] = deepcopy(self.denoiser).requires_grad_(False).eval()

    def train_step(self) -> dict[str, Tensor]:
        """One step of the phase that `step` lies in; "loss" means another thing in each."""
        config = self.config
        made = self.data.get(self.step)
        if self.step < config.text_steps:
            terms = self._text_step(**made)
        elif self.step < config.text_steps + config.autoencoder_steps:
            terms = self._autoencoder_step(**made)
        else:
            terms = self._denoiser_step(**made)
        self.step += 1
        return terms

    def state(self) -> dict[str, Any]:
        return {
            "autoencoder": self.autoencoder.state_dict(),
            "scaling_factor": self.autoencoder.config.scaling_factor,
            "denoiser": self.denoiser.state_dict(),
            "reader": self.reader.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.denoiser.load_state_dict(state["denoiser"])
        self.reader.load_state_dict(state["reader"])
        averaged: Any = self.average["autoencoder"]
        for autoencoder in (self.autoencoder, averaged):
            autoencoder.register_to_config(scaling_factor=state["scaling_factor"])
        self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name], self.device)

    def export(
        self, folder: Path, name: str = "", *, guidance_scale: float = 4.0, num_inference_steps: int = 50
    ) -> Path:
        """Write the averaged weights as diffusers directory `model`, in half precision, with our defaults in millijoule.json."""
        diffusers, _ = import_diffusers()
        average = deepcopy(self.average).to("cpu", torch.float16)
        denoiser: Any = average["denoiser"]
        pipeline = diffusers.StableDiffusionPipeline(
            vae=average["autoencoder"],
            text_encoder=denoiser["text"],
            tokenizer=self.tokenizer,
            unet=denoiser["unet"],
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder / "model", safe_serialization=True)
        defaults = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "prompts": ICON_SCENES,
            "training": {**asdict(self.config), "steps_done": self.step},
        }
        (folder / "model" / DEFAULTS).write_text(json.dumps(defaults, indent=2) + "\n")
        return folder / "model"

    def _text_step(self, tokens: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """From the code of each noun in a caption, the parts of its icon; cross entropies."""
        config = self.config
        text: Any = self.denoiser["text"]
        with self._autocast():
            codes = text(ids)[0]
        nouns = codes[:, CAPTION_WORDS_PER_ICON::CAPTION_WORDS_PER_ICON][
            :, :MAX_COUNT
        ]  # after the start token
        parts = tokens[:, :-1].unflatten(1, (MAX_COUNT, -1))
        there = parts[:, :, 0] > 0
        told = self.reader(nouns[there].float()).split(ICON_PARTS, 1)
        wanted = parts[there].sub(1).unbind(1)
        loss = torch.stack([F.cross_entropy(t, w) for t, w in zip(told, wanted, strict=True)]).sum()
        share = schedule(self.step, config.text_steps, min(config.warm_up, config.text_steps // 10))
        set_learning_rate(self.optimizers["text"], config.text_learning_rate * share)
        self._update("text", text, loss)
        averaged: Any = self.average["denoiser"]
        averaged["text"].load_state_dict(text.state_dict())  # what the denoiser's phase begins with
        return {"loss": loss.detach()}

    def _autoencoder_step(self, noise_seed: Tensor, **made: Tensor) -> dict[str, Tensor]:
        config = self.config
        first = self.step - config.text_steps
        images = self.true_images(**made)[:, 0]
        with self._autocast():
            latents = self.autoencoder.encode(images).latents.float()
            noise = self._normal(latents.shape, noise_seed)
            decoded = self.autoencoder.decode(latents + config.latent_noise * noise).sample.float()
        squared = F.mse_loss(decoded, images)
        loss = F.l1_loss(decoded, images) + squared
        share = schedule(first, config.autoencoder_steps, config.warm_up)
        set_learning_rate(self.optimizers["autoencoder"], config.autoencoder_learning_rate * share)
        self.newest_share.fill_(newest_share(config.ema, first))
        self._update("autoencoder", self.autoencoder, loss)
        update_average(self.average["autoencoder"], self.autoencoder, self.newest_share)
        return {"loss": loss.detach(), "squared_error": squared.detach()}

    def _denoiser_step(self, noise_seed: Tensor, **made: Tensor) -> dict[str, Tensor]:
        config = self.config
        before = config.text_steps + config.autoencoder_steps
        first = self.step - before
        share = schedule(first, config.steps - before, config.warm_up)
        set_learning_rate(self.optimizers["denoiser"], config.learning_rate * share)
        self.newest_share.fill_(newest_share(config.ema, first))
        side = IMAGE_SIZE // 2 ** (len(config.decoder_blocks) - 1)
        noise = self._normal((config.batch, config.latent_channels, side, side), noise_seed)
        return self._denoise(noise=noise, **made)

    def _compute_denoiser(
        self, noise: Tensor, ids: Tensor, times: Tensor, **made: Tensor
    ) -> dict[str, Tensor]:
        """The step itself, on what `DiffusionData` made."""
        latents = self._encode(self.true_images(**made)[:, 0])
        steps = len(self._signal)
        at = (times * steps).long().clamp_(max=steps - 1)
        signal, share = (x[at].float()[:, None, None, None] for x in (self._signal, self._noise))
        velocity = self._predict(signal * latents + share * noise, at, ids)
        loss = F.mse_loss(velocity, signal * noise - share * latents)
        taken = self._update("denoiser", self.denoiser, loss)
        update_average(self.average["denoiser"], self.denoiser, self.newest_share)
        return {"loss": loss.detach(), **taken}

    def _velocity(self, noisy: Tensor, at: Tensor, ids: Tensor) -> Tensor:
        text: Any = self.denoiser["text"]
        unet: Any = self.denoiser["unet"]
        with self._autocast():
            return unet(noisy, at, text(ids)[0]).sample.float()

    def _update(self, name: str, model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return clip_and_step(optimizer, model.parameters(), self.config.clip)

    def _normal(self, shape: tuple[int, ...], seed: Tensor) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(int(seed))
        return torch.randn(shape, generator=generator, device=self.device)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        autoencoder: Any = self.average["autoencoder"]
        with self._autocast():
            return autoencoder.encode(images).latents.float() * autoencoder.config.scaling_factor

    def _autocast(self) -> ExitStack:
        """bfloat16 where the processor multiplies it, without the cache of cast weights, which would outlive the capture of a
        graph. On a CPU, attention as plain products, whose gradients take a fraction of the time of the fused kernel's at
        64 positions."""
        narrow = multiplies_bfloat16(self.device)
        kind = "cuda" if self.on_gpu else "cpu"
        stack = ExitStack()
        stack.enter_context(
            torch.autocast(kind, torch.bfloat16, enabled=narrow, cache_enabled=not self.on_gpu)
        )
        if not self.on_gpu:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of one component of a diffusers directory, float32."""
    from safetensors.torch import load_file

    (file,) = sorted(folder.glob("*.safetensors")) or (folder / "model.safetensors",)
    read_header(file)
    return {key: value.float() for key, value in load_file(file).items()}


@torch.no_grad()
def set_principal_encoder(autoencoder: Any, images: Tensor) -> None:
    """Make the encoder of an `AutoencoderTiny` without blocks project patches on their principal components.

    Its strided convolutions gather each patch's pixels into channels; the last convolution projects. Latents have
    mean 0, and all but one in a thousand lie within the decoder's linear range (it takes tanh(z / 3)): few patches show an
    edge, so in units of their standard deviation the fine components' largest values are far out. The `scaling_factor`
    brings the mean variance to 1 for the denoiser.

    Args:
        autoencoder: its encoder's widths are the values of a patch.
        images: `[count, 3, size, size]` in [-1, 1], to find the components from.
    """
    first, *gathering, last = autoencoder.encoder.layers
    for layer in autoencoder.encoder.layers:
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    first.weight[range(3), range(3), 1, 1] = 2.0  # the encoder is given [0, 1]; back to [-1, 1]
    first.bias[:3] = -1.0
    channels = 3
    for layer in gathering:
        for k in range(4):  # pixel (k // 2, k % 2) of each two by two
            block = torch.arange(channels)
            layer.weight[k * channels + block, block, 1 + k // 2, 1 + k % 2] = 1.0
        channels *= 4
    x = images
    for _ in gathering:  # what those layers do, without their sums of which all but one term are zero
        x = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
    values = x.transpose(0, 1).flatten(1).double()
    mean = values.mean(1)
    _, components = torch.linalg.eigh(torch.cov(values))
    kept = slice(-last.out_channels, None)
    components = components[:, kept].t()
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()  # a component's sign is arbitrary, and libraries differ
    latents = components @ (values - mean[:, None])
    reach = latents.abs().kthvalue(int(0.999 * latents.shape[1]), 1, keepdim=True).values
    components, latents = LATENT_REACH * components / reach, LATENT_REACH * latents / reach
    autoencoder.register_to_config(scaling_factor=float(latents.var(1).mean() ** -0.5))
    last.weight[:, :, 1, 1] = components.float()
    last.bias.copy_(-components @ mean)
    autoencoder.encoder.requires_grad_(False)


def draw_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    return [completed for _, completed in sample_training_scenes(rng, count)]


def draw_images(count: int, seed: int) -> Tensor:
    """Renders of training scenes, float32 `[count, 3, 64, 64]` in [-1, 1]."""
    scenes = draw_scenes(count, np.random.default_rng(seed))
    renders = torch.from_numpy(render_scenes(scenes, 1, seed)[:, 0])
    return renders.permute(0, 3, 1, 2).float() / 127.5 - 1


def caption_ids(scenes: Sequence[Scene], config: DiffusionConfig) -> Tensor:
    """Tokens of the scenes' captions, int64 `[scenes, max_length]`, as the tokenizer of `build_tokenizer` gives them."""
    ids = np.full((len(scenes), config.max_length), VOCABULARY[END], np.int64)
    for row, scene in zip(ids, scenes, strict=True):
        words = [START, *write_caption(scene).split()]
        row[: len(words)] = [VOCABULARY[word] for word in words]
    return torch.from_numpy(ids)


def build_tokenizer(config: DiffusionConfig) -> Any:
    """One token per word of `CAPTION_WORDS`, lower case, punctuation dropped; any other word is `UNKNOWN`."""
    _, transformers = import_diffusers()
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\W_]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, VOCABULARY[START]), (END, VOCABULARY[END])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=config.max_length,
    )


def _build_scheduler() -> Any:
    """DDIM on a schedule whose last step is pure noise, so that flat backgrounds can take any colour."""
    diffusers, _ = import_diffusers()
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # has no effect with trailing spacing; pipelines complain about 0
    )
