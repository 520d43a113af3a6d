"""Published architectures by name, without weights: their layers can be counted where no checkpoint is at hand.

Sizes (assets/bases.json) as in the configs that were published with the weights: CompVis and Runway (SD 1.x), Stability AI (SD 2.1,
SDXL 1.0, SD 3 medium, SD 3.5 medium and large), Black Forest Labs (Flux.1). SD 2.x reads all but the last layer of OpenCLIP ViT-H/14.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BASES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "assets" / "bases.json").read_text(encoding="utf-8"))


def sd3_transformer(layers: int, positions: int, *, normed: bool, dual: int = 0) -> SD3Transformer2DModel:
    """Stable Diffusion 3's denoiser: as many heads of 64 as blocks; `positions`: rows of its table of patch positions.

    `normed`: whether queries and keys are normalized; `dual`: blocks, from the first, with a second attention of the picture alone.
    """
    return SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=layers,
        caption_projection_dim=64 * layers,
        pos_embed_max_size=positions,
        qk_norm="rms_norm" if normed else None,
        dual_attention_layers=tuple(range(dual)),
    )


DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "sd": UNet2DConditionModel,
    "sdxl": UNet2DConditionModel,
    "sd3": sd3_transformer,
    "flux": FluxTransformer2DModel,
}


def clip_tower(name: str, family: str) -> nn.Module:
    """A text tower of CLIP: "clip_l" (ViT-L/14), "clip_h" (OpenCLIP ViT-H/14) or "clip_g" (ViT-bigG/14), as the family reads it."""
    kind = CLIPTextModelWithProjection if name == "clip_g" or family == "sd3" else CLIPTextModel
    return kind(CLIPTextConfig(**BASES["clip"][name]))


def build(name: str) -> nn.ModuleDict:
    """The denoiser and the CLIP text towers of a published architecture, with random weights, by the pipeline's names."""
    base = BASES["architectures"][name]
    family = base["family"]
    models = {"unet" if family in ("sd", "sdxl") else "transformer": DENOISERS[family](**base["denoiser"])}
    towers = [clip_tower(part, family) for part in base["texts"] if part != "t5"]
    return nn.ModuleDict({**models, **dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False))})


FAMILIES: dict[str, tuple[str, Callable[[], nn.ModuleDict]]] = {
    name: (base["family"], partial(build, name)) for name, base in BASES["architectures"].items()
}
"""Name -> family (`Backbone.family`) and what builds it."""


def architecture(name: str) -> nn.ModuleDict:
    """The modules of a published architecture on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return build(name)


def autoencoder(family: str) -> AutoencoderKL:
    """The autoencoder of a family ("sd", "sdxl", "sd3", "flux"): all have the same layers; scale and channels of the latents differ."""
    return AutoencoderKL(**BASES["autoencoder"], **BASES["autoencoders"][family])
