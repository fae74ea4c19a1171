"""The networks of the conventional baseline (`training.diffusion`): autoencoder, text encoder, U-Net, tokenizer, schedule.

The autoencoder's decoder writes a 64-pixel render as a 16x16 grid of latents; its encoder is not trained: it holds the
principal components of patches of four pixels, which keep all that the verifier sees; a trained one lost half of the
small icons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.scenes.prompts import CAPTION_WORDS, CAPTION_WORDS_PER_ICON, write_caption
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import IMAGE_SIZE, MAX_COUNT, Scene, sample_training_scenes

#: Factor on the words' initial embeddings.
EMBEDDING_SCALE = 40.0

#: Where the decoder's input is still nearly linear.
LATENT_REACH = 2.0

UNKNOWN, START, END = "<unk>", "<s>", "</s>"

#: Token of each word.
VOCABULARY = {word: i for i, word in enumerate((UNKNOWN, START, END, *CAPTION_WORDS))}


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


def build_autoencoder(config: DiffusionConfig) -> Any:
    """Its encoder takes what `set_principal_encoder` makes of it."""
    diffusers, _ = import_diffusers()
    levels = len(config.decoder_blocks)
    # without normalisation layers: those of the usual autoencoder take the colour out of flat images
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(3 * 4 ** (levels - 1),) * levels,
        decoder_block_out_channels=(config.decoder_width,) * levels,
        num_encoder_blocks=(0,) * levels,
        num_decoder_blocks=config.decoder_blocks,
        latent_channels=config.latent_channels,
    )


def build_text_encoder(config: DiffusionConfig, tokenizer: Any) -> Any:
    _, transformers = import_diffusers()
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        # CLIP's 0.02 drowns in the layers' biases: after 3,200 steps all prompts still looked the same to the U-Net
        text.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
    return text


def build_unet(config: DiffusionConfig) -> Any:
    diffusers, _ = import_diffusers()
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)]
    return diffusers.UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(config.decoder_blocks) - 1),
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


@torch.no_grad()
def set_principal_encoder(autoencoder: Any, images: Tensor) -> None:
    """Make the encoder of an `AutoencoderTiny` without blocks project patches on their principal components.

    Its strided convolutions gather each patch's pixels into channels; the last convolution projects. Latents have
    mean 0, and all but one in a thousand lie within the decoder's linear range (it takes tanh(z / 3)): few patches show an
    edge, so in units of their standard deviation the fine components' largest values are far out. The `scaling_factor`
    brings the mean variance to 1 for the denoiser. The encoder's widths are the values of a patch; the components are
    found from `images` `[count, 3, size, size]` in [-1, 1].
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


def build_scheduler() -> Any:
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
