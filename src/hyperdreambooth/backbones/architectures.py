"""Published architectures by name, without weights: to count their layers, and to load checkpoints into them.

The sizes in assets/bases.json are those of the configs published with the weights by CompVis and Runway (SD 1.x), Stability AI (SD 2.1,
SDXL 1.0, SD 3 medium, SD 3.5 medium and large), and Black Forest Labs (Flux.1). SD 2.x uses all but the last layer of OpenCLIP ViT-H/14.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

BASES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "assets" / "bases.json").read_text(encoding="utf-8"))
CLIP = ("text_encoder*.[qkv]_proj", "text_encoder*.out_proj")
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    family: {
        "paper": (*patterns["attention"], *patterns["first"], *CLIP),
        "attention": (*patterns["attention"],),
        "attention+ff": (*patterns["attention"], *patterns["first"], *patterns["second"]),
    }
    for family, patterns in BASES["targets"].items()
}
"""Family (`Backbone.family`) -> preset -> glob patterns of the layers that carry a LoRA.

"paper" is the choice of Ruiz et al., supplement; "attention+ff" is the default. In SD 3 and Flux the text tokens have projections of their
own in every joint block (`add_*`, `ff_context`); a single-stream block of Flux has one output layer for attention and MLP (`proj_out`).
"""
FAMILIES: dict[str, str] = {name: base["family"] for name, base in BASES["architectures"].items()}  # Name -> `Backbone.family`.
TEXTS: dict[str, dict[str, str]] = {name: base["texts"] for name, base in BASES["architectures"].items()}
"""Name -> the pipeline's name of each text encoder -> the model ("clip_l", "clip_h", "clip_g", "t5")."""


def clip_tower(name: str, family: str) -> nn.Module:
    """A CLIP text encoder as the family uses it: "clip_l" (ViT-L/14), "clip_h" (OpenCLIP ViT-H/14) or "clip_g" (ViT-bigG/14)."""
    kind = CLIPTextModelWithProjection if name == "clip_g" or family == "sd3" else CLIPTextModel
    return kind(CLIPTextConfig(**BASES["clip"][name]))


def build(name: str) -> nn.ModuleDict:
    """The denoiser and the CLIP text encoders of a published architecture, with random weights, by the pipeline's component names."""
    family, sizes = FAMILIES[name], BASES["architectures"][name]["denoiser"]
    makers: dict[str, Callable[..., nn.Module]] = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}
    denoiser = {"transformer": makers[family](**sizes)} if family in makers else {"unet": UNet2DConditionModel(**sizes)}
    return nn.ModuleDict({**denoiser, **{text: clip_tower(part, family) for text, part in TEXTS[name].items() if part != "t5"}})


def architecture(name: str, *, vae: bool = False) -> nn.ModuleDict:
    """The modules of a published architecture on the meta device (shapes, no memory); with `vae`, its autoencoder too."""
    with torch.device("meta"):
        return nn.ModuleDict({**build(name), **({"vae": autoencoder(FAMILIES[name])} if vae else {})})


def autoencoder(family: str) -> AutoencoderKL:
    """The autoencoder of a family ("sd", "sdxl", "sd3", "flux"). All have the same encoder and decoder blocks; their latents differ."""
    return AutoencoderKL(**BASES["autoencoder"], **BASES["autoencoders"][family])


def count(tensors: Mapping[str, Any], blocks: str) -> int:
    """The number of blocks among tensors named `blocks` (such as "joint_blocks."), index, and the rest."""
    return len({key.removeprefix(blocks).split(".")[0] for key in tensors if key.startswith(blocks)})


def flux(tensors: Mapping[str, Any]) -> nn.Module:
    """Flux's denoiser, in the sizes of these tensors (by their original names)."""
    depths = {"num_layers": count(tensors, "double_blocks."), "num_single_layers": count(tensors, "single_blocks.")}
    return FluxTransformer2DModel(**depths, guidance_embeds="guidance_in.in_layer.weight" in tensors)


def sd3(tensors: Mapping[str, Any]) -> nn.Module:
    """SD 3's denoiser, in the sizes of these tensors (by their original names): as many attention heads, of 64 dimensions, as blocks."""
    layers = count(tensors, "joint_blocks.")
    side = math.isqrt(tensors["pos_embed"].shape[1]) if "pos_embed" in tensors else 192
    sizes = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers, "pos_embed_max_size": side}
    dual = len({key.split(".")[1] for key in tensors if ".attn2." in key})  # the first blocks, with a second attention
    normed = "rms_norm" if any("ln_q" in key for key in tensors) else None
    return SD3Transformer2DModel(**sizes, qk_norm=normed, dual_attention_layers=tuple(range(dual)))


def t5(tensors: Mapping[str, Any]) -> nn.Module:
    """The encoder of T5 v1.1, in the sizes of these tensors."""
    ends = ("shared.weight", "wi_0.weight", "relative_attention_bias.weight")
    (words, width), (inner, _), (_, heads) = (next((t.shape for key, t in tensors.items() if key.endswith(end)), (64, 64)) for end in ends)
    sizes = {"vocab_size": words, "d_model": width, "d_ff": inner, "num_layers": count(tensors, "encoder.block."), "num_heads": heads}
    return T5EncoderModel(T5Config(**sizes, d_kv=64, feed_forward_proj="gated-gelu"))


def scheduler(kind: str, prediction: str, *, zero_snr: bool) -> Any:
    """A base's published scheduler. `prediction`: "epsilon" or "v_prediction" (SD, SDXL), "flow" (SD 3), "dev" or "schnell" (Flux)."""
    settings = dict(BASES["schedulers"][FAMILIES[kind]][prediction])
    if zero_snr and "rescale_betas_zero_snr" in settings:
        settings |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return getattr(diffusers, settings.pop("class"))(**settings)


def models_of(kind: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, nn.Module]]:
    """The models that a file holds: the pipeline's component name -> (the name in `parts`, the model on the meta device).

    SD 1, SD 2 and SDXL have the published sizes; SD 3, Flux and T5 those of their tensors. `parts`: model -> tensor's name -> its shape.
    """
    denoiser = {"unet": "unet"} if "unet" in parts else {"transformer": kind}
    names = {name: part for name, part in {**denoiser, "vae": "vae", **TEXTS[kind]}.items() if part in parts}
    if "unet" in parts:
        found = architecture(kind, vae=True)
        return {name: (part, found[name]) for name, part in names.items()}
    makers = {"vae": lambda _: autoencoder(kind), "sd3": sd3, "flux": flux, "t5": t5}
    with torch.device("meta"):
        return {name: (part, makers[part](parts[part]) if part in makers else clip_tower(part, kind)) for name, part in names.items()}
