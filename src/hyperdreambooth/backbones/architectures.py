"""Published architectures by family name, without weights: their layers can be counted where no checkpoint is at hand."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

ATTENTION = ("unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0")
PRESETS: dict[str, tuple[str, ...]] = {
    # Ruiz et al., supplement: attention and the feed-forward's first layer of the UNet, attention of the text encoder
    "paper": (*ATTENTION, "unet.*ff.net.0.proj", "text_encoder.*[qkv]_proj", "text_encoder.*out_proj"),
    "attention": ATTENTION,
    "attention+ff": (*ATTENTION, "unet.*ff.net.0.proj", "unet.*ff.net.2"),
}
"""Named target patterns, for `StableDiffusionPipeline`s."""


def sd15() -> nn.ModuleDict:
    """Stable Diffusion 1.x: the UNet's and CLIP ViT-L/14's published configs."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    return nn.ModuleDict({"unet": unet, "text_encoder": text})


def sd21() -> nn.ModuleDict:
    """Stable Diffusion 2.x: heads of 64, linear projections, OpenCLIP ViT-H/14's 23 layers."""
    unet = UNet2DConditionModel(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu")
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": text})


FAMILIES = {"sd15": sd15, "sd21": sd21}


def architecture(family: str) -> nn.ModuleDict:
    """The modules of a family on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return FAMILIES[family]()
