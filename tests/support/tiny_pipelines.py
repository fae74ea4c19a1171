"""Tiny random text-to-image pipelines, built from configuration alone: nothing is downloaded, tokenizers included.

`save_tiny(family, folder)` writes one as diffusers saves it; `tiny_pipeline(family)` gives the folder of one that is made
once per process and shared (never write into it: `shutil.copytree` it first). `FAMILIES` maps each name to its builder.
All are of seeded weights, so the same family has the same files every time. Each draws at `SIZES[family]` pixels in well
under a second.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Words that the tokenizers know as one token each, so that tests can count tokens; other words are read by letters.
WORDS = (
    *("a", "an", "and", "the", "of", "on", "in", "red", "blue", "green", "dog", "cat", "apple", "star", "heart"),
    *("house", "moon", "tree", "very", "big", "small", "old", "new", "photo", "ugly", "blurry"),
)  # fmt: skip

LETTERS = string.ascii_lowercase + string.digits + string.punctuation


def save_tiny(family: str, folder: Path | str) -> Path:
    """Build the tiny pipeline of `family` and save it as `folder`, which is created."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        pipeline = FAMILIES[family]()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


@functools.cache
def tiny_pipeline(family: str) -> Path:
    """The folder of a tiny pipeline, made on first use and shared by all tests of the process."""
    return save_tiny(family, _shared_folder() / family)


@functools.cache
def _shared_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-pipelines-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def change_json(file: Path, **values: Any) -> None:
    """Set `values` in a JSON object; None removes a key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# tokenizers


def clip_tokenizer(max_length: int = 77) -> Any:
    """CLIP's: 77 tokens with start and end, padded with the end token."""
    from transformers import CLIPTokenizer

    pieces, merges = _merged(WORDS, "</w>")
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int = 512) -> Any:
    """T5's: a word of `WORDS` is one token, other words are read by letters; one end token."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    words = [("▁" + word, -3.0) for word in WORDS]
    letters = [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=max_length)


def gemma_tokenizer(max_length: int = 8192) -> Any:
    """Gemma's: byte pairs over "▁" for a space, one start token, padded on the left unless told otherwise."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces, merges = _merged(WORDS, "", start="▁")
    more, more_merges = _merged(WORDS, "")  # the first word of a prompt stands without a space
    tokens = dict.fromkeys([*special, "▁", "\n", *LETTERS, *string.ascii_uppercase, *pieces, *more])
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = list(dict.fromkeys([*merges, *more_merges]))
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


#: What Qwen-Image puts before every prompt and cuts off again as 34 tokens.
_QWEN_WORDS = (
    *("image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial"),
    *("relationships", "objects", "background"),
)


def qwen2_tokenizer(max_length: int = 1024) -> Any:
    """Qwen's: byte pairs, "Ġ" for a space; knows the marks of a chat."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    pieces, merges = _merged((*WORDS, *_QWEN_WORDS), "", start="Ġ")
    heads, head_merges = _merged(("system", "user", "assistant", "Describe", *WORDS), "")
    merges = list(dict.fromkeys([*merges, *head_merges]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *alphabet, *pieces, *heads]))}
    made = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    return made


def _merged(words: tuple[str, ...], end: str, start: str = "") -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens and merges of byte-pair encoding that make each word one token, read from its front.

    Earlier merges win: those of long words come first, or "moon" would be read as "mo" and "on".
    """
    pieces, merges = [], []
    for word in sorted(words, key=lambda word: (word not in ("photo", "the"), -len(word))):
        parts = [*start, *word]
        parts[-1] += end
        whole = parts[0]
        for part in parts[1:]:
            merges.append((whole, part))
            whole += part
            pieces.append(whole)
    return pieces, list(dict.fromkeys(merges))


# parts that families share

WIDTH = 32


def _attend_more(module: Any, factor: float = 6.0) -> Any:
    """Make more of what attention adds: random weights as they are made leave the prompt hardly a say."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("to_out.0.weight", "to_add_out.weight")):
                weight.mul_(factor)
    return module


def _clip(cls: str = "CLIPTextModel", projection: int = WIDTH, tokenizer: Any = None) -> Any:
    import transformers

    tokenizer = tokenizer or clip_tokenizer()
    return getattr(transformers, cls)(
        transformers.CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=projection,
            max_position_embeddings=77,
            initializer_factor=10.0,  # embeddings of 0.02 would leave every prompt nearly the same
        )
    ).eval()


def _t5(cls: str = "T5EncoderModel") -> Any:
    import transformers

    config = (transformers.UMT5Config if cls.startswith("UMT5") else transformers.T5Config)(
        d_model=WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=2,
        num_heads=2,
        vocab_size=len(t5_tokenizer()),
        decoder_start_token_id=0,
        is_encoder_decoder=False,
        is_gated_act=True,
        dense_act_fn="gelu_new",
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, cls)(config).eval()


def _vae(channels: int = 4, **more: Any) -> Any:
    """A decoder of eight pixels per latent, as the published ones."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **more,
    )


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | more)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# families


def _sd15() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        unet=_unet(),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd15_safety() -> Any:
    """Stable Diffusion with a safety checker, whose random concepts hide about half of the images."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    config = CLIPConfig(vision_config=vision, projection_dim=WIDTH)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(1.0)  # nothing is ever that near to a concept
    checker.special_care_embeds_weights.data.fill_(1.0)
    parts = _sd15().components
    size = {"height": 32, "width": 32}
    parts["safety_checker"] = checker
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return StableDiffusionPipeline(**parts)


def _lcm() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    return LatentConsistencyModelPipeline(
        unet=_attend_more(_unet(time_cond_proj_dim=16)),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        scheduler=LCMScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH,  # T5's width must be it; the two CLIPs are padded to it
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=_clip("CLIPTextModelWithProjection"),
        text_encoder_2=_clip("CLIPTextModelWithProjection"),
        text_encoder_3=_wide_t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _wide_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    tokens = len(t5_tokenizer())
    config = T5Config(d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=2, vocab_size=tokens)
    return T5EncoderModel(config).eval()


def _pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=32,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
        ),
        vae=_vae(),
        text_encoder=_t5(),
        tokenizer=t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _pixart_alpha() -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(**_pixart_sigma().components)


def _sana() -> Any:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma_tokenizer()
    encoder = Gemma2Config(
        head_dim=8,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            encoder_layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(encoder).eval(),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _flux(guidance: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        transformer=_attend_more(
            FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance,
            )
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
    )


def _flux_schnell() -> Any:
    """FLUX without an embedded guidance, as the distilled ones."""
    return _flux(guidance=False)


def _chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=_t5(),
        tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen2_tokenizer()
    encoder = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "vocab_size": len(tokenizer),
            "initializer_range": 0.5,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        vocab_size=len(tokenizer),
    )
    return QwenImagePipeline(
        transformer=_attend_more(
            QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
            ),
            factor=40.0,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def _z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen2_tokenizer()
    encoder = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # made of unwritten memory
        torch.nn.init.normal_(token, std=0.02)
    return ZImagePipeline(
        transformer=transformer,
        vae=_vae(16, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=Qwen3Model(encoder).eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _kandinsky22() -> Any:
    from diffusers import (
        DDPMScheduler,
        KandinskyV22CombinedPipeline,
        PriorTransformer,
        UnCLIPScheduler,
        VQModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = _unet(
        sample_size=32,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1, num_embeddings=77
    )
    torch.nn.init.ones_(prior.clip_std)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012),
        movq=movq,
        prior_prior=prior,
        prior_image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=_clip("CLIPTextModelWithProjection"),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        prior_image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )


def _deepfloyd_if() -> Any:
    from diffusers import DDPMScheduler, IFPipeline

    return IFPipeline(
        unet=_unet(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            encoder_hid_dim=WIDTH,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="positional",
            act_fn="gelu",
        ),
        text_encoder=_t5(),
        tokenizer=t5_tokenizer(),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _wuerstchen() -> Any:
    from diffusers import DDPMWuerstchenScheduler, WuerstchenCombinedPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

    return WuerstchenCombinedPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=_clip(),
        decoder=WuerstchenDiffNeXt(
            c_cond=WIDTH,
            c_hidden=[32],
            nhead=[2],
            blocks=[1],
            level_config=["CT"],
            clip_embd=WIDTH,
            inject_effnet=[False],
        ),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=_clip(),
        prior_prior=WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=WIDTH, c_r=8, nhead=2),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )


def _hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    tokenizer = t5_tokenizer(77)
    encoder = BertConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        initializer_range=0.5,
    )
    return HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            in_channels=4,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=16,
            hidden_size=32,
            activation_fn="gelu-approximate",
        ),
        vae=_vae(),
        text_encoder=BertModel(encoder).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(256),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    with torch.no_grad():  # most of what it reads are 248 tokens of padding
        transformer.context_embedder.weight.mul_(20.0)
    return AuraFlowPipeline(
        transformer=_attend_more(transformer, factor=40.0),
        vae=_vae(),
        text_encoder=_t5("UMT5EncoderModel"),
        tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _lumina2() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma_tokenizer()
    encoder = Gemma2Config(
        head_dim=8,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(512, 128, 128),
            cap_feat_dim=WIDTH,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=Gemma2Model(encoder).eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


#: Every family by name.
FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sd15_safety": _sd15_safety,
    "lcm": _lcm,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "pixart_sigma": _pixart_sigma,
    "pixart_alpha": _pixart_alpha,
    "sana": _sana,
    "flux": _flux,
    "flux_schnell": _flux_schnell,
    "chroma": _chroma,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
    "kandinsky22": _kandinsky22,
    "deepfloyd_if": _deepfloyd_if,
    "wuerstchen": _wuerstchen,
    "hunyuan_dit": _hunyuan_dit,
    "aura_flow": _aura_flow,
    "lumina2": _lumina2,
}

#: Width and height at which each is quick, in pixels.
SIZES: dict[str, int] = dict.fromkeys(FAMILIES, 64) | {"deepfloyd_if": 32, "wuerstchen": 128}

#: What a plain call of the pipeline needs besides: these families draw at the nearest of their published sizes otherwise.
CALL: dict[str, dict[str, Any]] = {
    "pixart_sigma": {"use_resolution_binning": False},
    "pixart_alpha": {"use_resolution_binning": False},
    "sana": {"use_resolution_binning": False},
    "hunyuan_dit": {"use_resolution_binning": False},
}
