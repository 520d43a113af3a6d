"""Published architectures by family name, without weights: their layers can be counted where no checkpoint is at hand.

Sizes as in the configs that were published with the weights: CompVis and Runway (SD 1.x), Stability AI (SD 2.1, SDXL 1.0, SD 3
medium, SD 3.5 medium and large), Black Forest Labs (Flux.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel


def clip_config(name: str) -> CLIPTextConfig:
    """CLIP ViT-L/14, OpenCLIP ViT-H/14 (all but its last layer, as SD 2.x has it) or OpenCLIP ViT-bigG/14: the text towers."""
    width, layers, heads, act = {"L": (768, 12, 12, "quick_gelu"), "H": (1024, 23, 16, "gelu"), "bigG": (1280, 32, 20, "gelu")}[name]
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=512 if name == "H" else width,
    )


def sd15() -> nn.ModuleDict:
    """Stable Diffusion 1.x: heads of an eighth of the channels, CLIP ViT-L/14."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(clip_config("L"))})


def sd21() -> nn.ModuleDict:
    """Stable Diffusion 2.x: heads of 64, linear projections, OpenCLIP ViT-H/14."""
    unet = UNet2DConditionModel(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(clip_config("H"))})


def sdxl() -> nn.ModuleDict:
    """Stable Diffusion XL 1.0: three levels, up to ten transformer blocks in each, CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    first, second = CLIPTextModel(clip_config("L")), CLIPTextModelWithProjection(clip_config("bigG"))
    return nn.ModuleDict({"unet": unet, "text_encoder": first, "text_encoder_2": second})


def sd3_transformer(layers: int, positions: int, *, normed: bool, dual: int = 0, text: int = 4096) -> SD3Transformer2DModel:
    """Stable Diffusion 3's denoiser: as many heads of 64 as blocks; `positions`: rows of its table of patch positions."""
    return SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=text,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        qk_norm="rms_norm" if normed else None,
        dual_attention_layers=tuple(range(dual)),
    )


def _sd3(layers: int, positions: int, *, normed: bool, dual: int = 0) -> nn.ModuleDict:
    first, second = CLIPTextModelWithProjection(clip_config("L")), CLIPTextModelWithProjection(clip_config("bigG"))
    transformer = sd3_transformer(layers, positions, normed=normed, dual=dual)
    return nn.ModuleDict({"transformer": transformer, "text_encoder": first, "text_encoder_2": second})


def sd3() -> nn.ModuleDict:
    """Stable Diffusion 3 medium: 24 joint blocks."""
    return _sd3(24, 192, normed=False)


def sd35_medium() -> nn.ModuleDict:
    """Stable Diffusion 3.5 medium: 24 joint blocks, a second attention of the picture alone in the first 13."""
    return _sd3(24, 384, normed=True, dual=13)


def sd35_large() -> nn.ModuleDict:
    """Stable Diffusion 3.5 large: 38 joint blocks."""
    return _sd3(38, 192, normed=True)


def flux() -> nn.ModuleDict:
    """Flux.1 dev: 19 joint and 38 single blocks (schnell has the same targets)."""
    transformer = FluxTransformer2DModel(guidance_embeds=True)
    return nn.ModuleDict({"transformer": transformer, "text_encoder": CLIPTextModel(clip_config("L"))})


FAMILIES: dict[str, tuple[str, Callable[[], nn.ModuleDict]]] = {
    "sd15": ("sd", sd15),
    "sd21": ("sd", sd21),
    "sdxl": ("sdxl", sdxl),
    "sd3": ("sd3", sd3),
    "sd35-medium": ("sd3", sd35_medium),
    "sd35-large": ("sd3", sd35_large),
    "flux": ("flux", flux),
}
"""Name -> family (`Backbone.family`) and what builds it."""


def architecture(name: str) -> nn.ModuleDict:
    """The modules of a published architecture on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return FAMILIES[name][1]()


def autoencoder(family: str) -> AutoencoderKL:
    """The autoencoder of a family ("sd", "sdxl", "sd3", "flux"): all have the same layers; scale and channels of the latents differ."""
    scale, shift, channels, side = {
        "sd": (0.18215, None, 4, 512),
        "sdxl": (0.13025, None, 4, 1024),
        "sd3": (1.5305, 0.0609, 16, 1024),
        "flux": (0.3611, 0.1159, 16, 1024),
    }[family]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=side,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def t5(words: int = 32128, width: int = 4096, inner: int = 10240, layers: int = 24, heads: int = 64) -> T5EncoderModel:
    """The encoder of T5 v1.1; by default XXL, which SD 3 and Flux read prompts with."""
    gated = "gated-gelu"
    return T5EncoderModel(
        T5Config(vocab_size=words, d_model=width, d_ff=inner, num_layers=layers, num_heads=heads, d_kv=64, feed_forward_proj=gated)
    )
