"""Tensor names of Stable Diffusion in single-file checkpoints, which use the layout of the original (pre-diffusers) code.

The functions map a tensor's name in diffusers to its name in the file, in order to write such files and to check them layer by layer.
"""

from __future__ import annotations

import re
from typing import Any

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.k_proj.": "attn.in_proj_",
    "self_attn.v_proj.": "attn.in_proj_",
}


def unet_name(name: str, config: Any) -> str:
    """The file's name of a tensor of the UNet. `config`: the UNet's configuration."""
    layers = int(config.layers_per_block) + 1
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if found:
        side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind.endswith("samplers"):
            index = layers - 1
        place = f"input_blocks.{1 + block * layers + index}" if side == "down" else f"output_blocks.{block * layers + index}"
        slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + ("CrossAttn" in config.up_block_types[block])}[kind]
        if kind == "downsamplers":
            rest = rest.replace("conv.", "op.")
        return f"{UNET}{place}.{slot}.{_resnet(rest) if kind == 'resnets' else rest}"
    found = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if found:
        slot = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"{UNET}middle_block.{slot}.{_resnet(found[3]) if found[1] == 'resnets' else found[3]}"
    layer, _, tensor = name.rpartition(".")
    return f"{UNET}{OUTSIDE[layer]}.{tensor}"


def _resnet(rest: str) -> str:
    layer, _, tensor = rest.rpartition(".")
    return f"{RESNET[layer]}.{tensor}"


def vae_name(name: str) -> str:
    """The file's name of a tensor of the autoencoder; the matrices of its attention are 1 x 1 convolutions in the file."""
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{3 - int(found[1])}.", name)
    for part, there in VAE_PARTS.items():
        name = name.replace(f"{part}.", f"{there}.")
    return VAE + name.replace("resnets.", "block.")


def clip_name(name: str, prefix: str) -> str:
    """The file's name of a tensor of OpenAI's CLIP text encoder."""
    return f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}"


def openclip_name(name: str, prefix: str) -> str:
    """The file's name of a tensor of an OpenCLIP text encoder; the file concatenates query, key and value, in that order, in one tensor."""
    name = name.removeprefix("text_model.")
    outside = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    if name in outside:
        return f"{prefix}model.{outside[name]}"
    name = name.replace("encoder.layers.", "transformer.resblocks.")
    for part, there in OPENCLIP.items():
        name = name.replace(part, there)
    return f"{prefix}model.{name}"


def original_name(component: str, name: str, config: Any, *, xl: bool) -> str:
    """The file's name of a tensor of `component` ("unet", "vae", "text_encoder", "text_encoder_2")."""
    if component == "unet":
        return unet_name(name, config)
    if component == "vae":
        return vae_name(name)
    if component == "text_encoder_2":
        return openclip_name(name, "conditioner.embedders.1.")
    if xl:
        return clip_name(name, "conditioner.embedders.0.")
    return clip_name(name, TEXT) if config.hidden_size == 768 else openclip_name(name, TEXT)
