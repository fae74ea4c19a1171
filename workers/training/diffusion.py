"""The conventional baseline: a small Stable Diffusion, in diffusers' own classes, trained on icon scenes.

Three phases in one run. First the text encoder learns to read captions (`scenes.prompts.write_caption`): where a noun
stands, its code must tell the icon's place, size, colour and noun. Then the decoder of the autoencoder. After that text encoder and
U-Net learn together to predict the velocity (Salimans and Ho 2022) of noised latents, on a schedule that ends in pure
noise (Lin et al. 2024), with some captions dropped for classifier-free guidance (Ho and Salimans 2022). `export` writes the
averaged weights as a directory that `DiffusionPipeline.from_pretrained` loads, and `--model`. Needs the `diffusers` and
`train` extras.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.pipeline_folder import DEFAULTS, ICON_SCENES
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.scenes.prompts import CAPTION_WORDS_PER_ICON
from millijoule.workers.scenes.renderer import draw_variation
from millijoule.workers.scenes.scenes import (
    COLOURS,
    IMAGE_SIZE,
    MAX_COUNT,
    SIZES,
    WINDOWS,
    Scene,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS
from millijoule.workers.training import diffusion_networks as networks
from millijoule.workers.training.diffusion_networks import DiffusionConfig
from millijoule.workers.training.graphed_step import GraphedStep
from millijoule.workers.training.loop import GeneratorTrainer, newest_share, schedule, update_average
from millijoule.workers.training.optimizer import adamw, clip_and_step, load_optimizer, set_learning_rate

#: Renders whose patches the encoder's principal components are found from.
PRINCIPAL_IMAGES = 2048

#: What the text encoder learns to tell of an icon, in the order of its scene tokens, and how many of each there are.
ICON_PARTS = (DEFAULT_NOUNS, len(COLOURS), len(SIZES), len(WINDOWS))


@dataclass(frozen=True)
class DiffusionData:
    """What a step of `config` needs, whichever phase it lies in; see `StepData`."""

    config: DiffusionConfig

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config = self.config
        rng = np.random.default_rng((config.seed, step))
        if step < config.text_steps:
            scenes = networks.draw_scenes(config.text_batch, rng)
            ids = networks.caption_ids(scenes, config)
            return {"tokens": torch.from_numpy(scene_tokens(scenes)), "ids": ids}
        if step < config.text_steps + config.autoencoder_steps:
            return self._scenes(config.autoencoder_batch, rng)[1] | _noise_seed(rng)
        scenes, made = self._scenes(config.batch, rng)
        ids = networks.caption_ids(scenes, config)
        dropped = torch.from_numpy(rng.random(config.batch) < config.prompt_dropout)
        ids[dropped, 1:] = networks.VOCABULARY[networks.END]
        # stratified: one time from each of `batch` equal slices, for less variance
        times = (np.arange(config.batch) + rng.random(config.batch)) / config.batch
        return made | {"ids": ids, "times": torch.from_numpy(times)} | _noise_seed(rng)

    def _scenes(self, count: int, rng: np.random.Generator) -> tuple[list[Scene], dict[str, Tensor]]:
        """Scenes, and what their renders are drawn from."""
        scenes = networks.draw_scenes(count, rng)
        variation = draw_variation(count, 1, int(rng.integers(2**62)))
        return scenes, {"tokens": torch.from_numpy(scene_tokens(scenes)), **variation}


def _noise_seed(rng: np.random.Generator) -> dict[str, Tensor]:
    return {"noise_seed": torch.tensor(int(rng.integers(2**62)))}


class DiffusionTrainer(GeneratorTrainer):
    """Autoencoder, text encoder and U-Net with their moving averages; a `loop.Trainer`."""

    def __init__(
        self, config: DiffusionConfig, *, device: str = "cpu", compiled: bool = False, data_processes: int = 0
    ) -> None:
        super().__init__(config, DiffusionData(config), device, data_processes)
        self.config = config
        self.tokenizer = networks.build_tokenizer(config)
        self.scheduler = networks.build_scheduler()
        self.autoencoder: Any = networks.build_autoencoder(config)
        networks.set_principal_encoder(self.autoencoder, networks.draw_images(PRINCIPAL_IMAGES, config.seed))
        text, unet = networks.build_text_encoder(config, self.tokenizer), networks.build_unet(config)
        self.denoiser = nn.ModuleDict({"text": text, "unet": unet})
        self.reader = nn.Linear(config.text_width, sum(ICON_PARTS))
        layout = torch.channels_last if self.on_gpu else torch.preserve_format
        for model in (self.autoencoder, self.denoiser, self.reader):
            model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.average = self._copied()
        learning = {
            "text": nn.ModuleList([text, self.reader]),
            "autoencoder": self.autoencoder.decoder,
            "denoiser": self.denoiser,
        }
        settings = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
        self.optimizers = {name: adamw(m.parameters(), device, **settings) for name, m in learning.items()}
        self._predict = torch.compile(self._velocity) if compiled else self._velocity
        self._denoise = GraphedStep(self._compute_denoiser) if self.on_gpu else self._compute_denoiser
        signal = self.scheduler.alphas_cumprod
        self._signal, self._noise = (x.sqrt().to(device) for x in (signal, 1 - signal))

    def start_from(self, folder: Path) -> None:
        """Take over the autoencoder of a finished run; with `text_steps = 0`, text encoder and U-Net as well.

        Raises:
            InputError: not a diffusers directory, or what is to be taken has other sizes than this config.
        """
        wrong = "no autoencoder of this recipe's sizes"
        try:
            scaling = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
            self.autoencoder.load_state_dict(_read_weights(folder / "vae"))
            self.autoencoder.register_to_config(scaling_factor=float(scaling))
            if self.config.text_steps == 0:
                wrong = "with text_steps = 0, text encoder and U-Net are taken from there too, and do not fit"
                self.denoiser["text"].load_state_dict(_read_weights(folder / "text_encoder"))
                self.denoiser["unet"].load_state_dict(_read_weights(folder / "unet"))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: {wrong}: {error}") from error
        self.average = self._copied()

    def _copied(self) -> nn.ModuleDict:
        """The weights as they are, for their moving averages to begin with."""
        models = nn.ModuleDict({"autoencoder": self.autoencoder, "denoiser": self.denoiser})
        return deepcopy(models).requires_grad_(False).eval()

    def train_step(self) -> dict[str, Tensor]:
        """One step of the phase that `step` lies in; "loss" means another thing in each."""
        config, warm_up = self.config, self.config.warm_up
        begin, end = 0, config.text_steps
        run: Callable[..., dict[str, Tensor]]
        if self.step < end:
            name, rate, run = "text", config.text_learning_rate, self._text_step
            warm_up = min(warm_up, end // 10)
        elif self.step < end + config.autoencoder_steps:
            begin, end = end, end + config.autoencoder_steps
            name, rate, run = "autoencoder", config.autoencoder_learning_rate, self._autoencoder_step
        else:
            begin, end = end + config.autoencoder_steps, config.steps
            name, rate, run = "denoiser", config.learning_rate, self._denoiser_step
        first = self.step - begin
        set_learning_rate(self.optimizers[name], rate * schedule(first, end - begin, warm_up))
        self.newest_share.fill_(newest_share(config.ema, first))
        terms = run(**self.data.get(self.step))
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

    def export(self, folder: Path, name: str = "") -> Path:
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
            "num_inference_steps": 50,
            "guidance_scale": 4.0,
            "prompts": ICON_SCENES,
            "training": {**asdict(self.config), "steps_done": self.step},
        }
        (folder / "model" / DEFAULTS).write_text(json.dumps(defaults, indent=2) + "\n")
        return folder / "model"

    def _text_step(self, tokens: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """From the code of each noun in a caption, the parts of its icon; cross entropies."""
        text: Any = self.denoiser["text"]
        with self._autocast():
            codes = text(ids)[0]
        # after the start token
        nouns = codes[:, CAPTION_WORDS_PER_ICON::CAPTION_WORDS_PER_ICON][:, :MAX_COUNT]
        parts = tokens[:, :-1].unflatten(1, (MAX_COUNT, -1))
        there = parts[:, :, 0] > 0
        told = self.reader(nouns[there].float()).split(ICON_PARTS, 1)
        wanted = parts[there].sub(1).unbind(1)
        loss = torch.stack([F.cross_entropy(t, w) for t, w in zip(told, wanted, strict=True)]).sum()
        self._update("text", text, loss)
        averaged: Any = self.average["denoiser"]
        averaged["text"].load_state_dict(text.state_dict())  # what the denoiser's phase begins with
        return {"loss": loss.detach()}

    def _autoencoder_step(self, noise_seed: Tensor, **made: Tensor) -> dict[str, Tensor]:
        images = self.true_images(**made)[:, 0]
        with self._autocast():
            latents = self.autoencoder.encode(images).latents.float()
            noise = self._normal(latents.shape, noise_seed)
            decoded = self.autoencoder.decode(latents + self.config.latent_noise * noise).sample.float()
        squared = F.mse_loss(decoded, images)
        loss = F.l1_loss(decoded, images) + squared
        self._update("autoencoder", self.autoencoder, loss)
        update_average(self.average["autoencoder"], self.autoencoder, self.newest_share)
        return {"loss": loss.detach(), "squared_error": squared.detach()}

    def _denoiser_step(self, noise_seed: Tensor, **made: Tensor) -> dict[str, Tensor]:
        config = self.config
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
