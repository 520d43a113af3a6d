"""A tiny random pipeline of each family, of diffusers' real classes: it computes the same as a full-size one, with smaller tensors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from worlds.toon.base import build_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def autoencoder(channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=64,
        **more,
    )


def clip(width: int = 32, *, projected: bool = False, act: str = "quick_gelu") -> tuple[Any, Any]:
    """A tokenizer and its text encoder."""
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int = 32) -> tuple[Any, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz[V],.")]
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5Tokenizer(vocab=pieces, extra_ids=0), T5EncoderModel(config)


def unet(text_width: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=text_width,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )


def sd1() -> StableDiffusionPipeline:
    tokenizer, text = clip()
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        autoencoder(), text, tokenizer, unet(32, attention_head_dim=4), scheduler, None, None, requires_safety_checker=False
    )


def sd2() -> StableDiffusionPipeline:
    tokenizer, text = clip(act="gelu")
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    model = unet(32, attention_head_dim=(2, 4), use_linear_projection=True)
    return StableDiffusionPipeline(autoencoder(), text, tokenizer, model, scheduler, None, None, requires_safety_checker=False)


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer, text = clip()
    tokenizer_2, text_2 = clip(act="gelu", projected=True)
    model = unet(
        64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        autoencoder(), text, text_2, tokenizer, tokenizer_2, model, scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False
    )


def sd3(newer: bool = False, absent: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    """SD 3, or 3.5 medium (normalized queries and keys, a second attention in the first blocks); `absent`: text encoders left out."""
    towers = [clip(16, projected=True), clip(16, act="gelu", projected=True), t5()]
    for index in absent:
        towers[index] = (None, None)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if newer else None,
        dual_attention_layers=(0,) if newer else (),
    )
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if newer:
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, max_shift=1.16)
    vae = autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609)
    (tokenizer, text), (tokenizer_2, text_2), (tokenizer_3, text_3) = towers
    return StableDiffusion3Pipeline(model, flow, vae, text, tokenizer, text_2, tokenizer_2, text_3, tokenizer_3)


def flux(distilled: bool = True) -> FluxPipeline:
    """Flux dev (guidance as a condition) or schnell."""
    (tokenizer, text), (tokenizer_2, text_2) = clip(), t5()
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    flow = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=distilled, base_image_seq_len=4, max_image_seq_len=64, shift=3.0 if distilled else 1.0
    )
    pipe = FluxPipeline(flow, autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159), text, tokenizer, text_2, tokenizer_2, model)
    pipe.default_sample_size = 8  # the class has a fixed default, for pictures of 1024 pixels
    return pipe


FAMILIES = {
    "sd1": sd1,
    "sd2": sd2,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3.5": lambda: sd3(newer=True),
    "sd3-no-t5": lambda: sd3(absent=(2,)),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(distilled=False),
}


def make(name: str, seed: int = 0) -> Any:
    """A tiny pipeline by family name; the same weights for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[name]()
