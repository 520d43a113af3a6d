"""Published architectures by family name, without weights: their layers can be counted where no checkpoint is at hand.

Sizes as in the configs that were published with the weights: CompVis and Runway (SD 1.x), Stability AI (SD 2.1, SDXL 1.0, SD 3
medium, SD 3.5 medium and large), Black Forest Labs (Flux.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


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


def _sd3(layers: int, positions: int, *, normed: bool, dual: int = 0) -> nn.ModuleDict:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        qk_norm="rms_norm" if normed else None,
        dual_attention_layers=tuple(range(dual)),
    )
    first, second = CLIPTextModelWithProjection(clip_config("L")), CLIPTextModelWithProjection(clip_config("bigG"))
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
