"""Tensor names and shapes of published checkpoints, and checkpoint files of zeros or of given tensors with these names."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.original_layout import original_name, vae_name
from hyperdreambooth.backbones import architectures
from hyperdreambooth.backbones.architectures import autoencoder

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def published(family: str) -> Shapes:
    """A checkpoint of SD 1.5, SD 2.1 or SDXL ("sd15", "sd21", "sdxl")."""
    shapes: Shapes = {"alphas_cumprod": (1000,)}
    for component, model in architectures.architecture(family, vae=True).items():
        for name, tensor in model.state_dict().items():
            key = original_name(component, name, model.config, xl=family == "sdxl")
            shapes[key] = (3 * tensor.shape[0], *tensor.shape[1:]) if "in_proj_" in key else tuple(tensor.shape)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def clip(width: int, layers: int, prefix: str = "", step: str = "text_model.", *, projected: bool = False) -> Shapes:
    """A CLIP text encoder by transformers' names."""
    shapes: Shapes = {f"{prefix}text_projection.weight": (width, width)} if projected else {}
    root = prefix + step
    shapes |= {f"{root}embeddings.token_embedding.weight": (49408, width), f"{root}embeddings.position_embedding.weight": (77, width)}
    shapes |= {f"{root}embeddings.position_ids": (1, 77)}
    norms = [f"{root}final_layer_norm"]
    for index in range(layers):
        block = f"{root}encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}self_attn.{name}", width, width)
        shapes |= linear(f"{block}mlp.fc1", width, 4 * width) | linear(f"{block}mlp.fc2", 4 * width, width)
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
    return shapes | {f"{norm}.{name}": (width,) for norm in norms for name in ("weight", "bias")}


def t5(layers: int = 1, heads: int = 1, inner: int = 64, words: int = 64, prefix: str = "text_encoders.t5xxl.transformer.") -> Shapes:
    """A T5 of width 4096, which SD 3 and Flux read; but for its width it may be small."""
    shapes: Shapes = {f"{prefix}shared.weight": (words, 4096), f"{prefix}encoder.final_layer_norm.weight": (4096,)}
    for index in range(layers):
        layer = f"{prefix}encoder.block.{index}.layer."
        shapes |= {f"{layer}0.SelfAttention.{name}.weight": (64 * heads, 4096) for name in "qkv"}
        shapes |= {f"{layer}0.SelfAttention.o.weight": (4096, 64 * heads), f"{layer}1.DenseReluDense.wo.weight": (4096, inner)}
        shapes |= {f"{layer}1.DenseReluDense.wi_{index}.weight": (inner, 4096) for index in (0, 1)}
        shapes |= {f"{layer}{index}.layer_norm.weight": (4096,) for index in (0, 1)}
    return shapes | {f"{prefix}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads)}


def vae(family: str, prefix: str = "first_stage_model.") -> Shapes:
    with torch.device("meta"):
        tensors = autoencoder(family).state_dict()
    return {vae_name(name).replace("first_stage_model.", prefix): tuple(tensor.shape) for name, tensor in tensors.items()}


def sd3(depth: int = 2, side: int = 12, dual: int = 0, prefix: str = UNET, *, normed: bool = False) -> Shapes:
    """SD 3's denoiser: `depth` joint blocks, each a head of 64 wide; the published ones are 24 and 38 deep."""
    width = 64 * depth
    shapes: Shapes = {"pos_embed": (1, side * side, width), "x_embedder.proj.weight": (width, 16, 2, 2), "x_embedder.proj.bias": (width,)}
    for name, inputs in (("context_embedder", 4096), ("t_embedder.mlp.0", 256), ("t_embedder.mlp.2", width), ("y_embedder.mlp.0", 2048)):
        shapes |= linear(name, inputs, width)
    shapes |= linear("y_embedder.mlp.2", width, width) | linear("final_layer.linear", width, 64)
    shapes |= linear("final_layer.adaLN_modulation.1", width, 2 * width)
    for index in range(depth):
        for side_name in ("x_block", "context_block"):
            block, last = f"joint_blocks.{index}.{side_name}.", side_name == "context_block" and index == depth - 1
            attentions = ["attn", "attn2"] if side_name == "x_block" and index < dual else ["attn"]
            for attention in attentions:
                shapes |= linear(f"{block}{attention}.qkv", width, 3 * width)
                shapes |= {f"{block}{attention}.ln_{name}.weight": (64,) for name in "qk" if normed}
                shapes |= {} if last else linear(f"{block}{attention}.proj", width, width)
            shapes |= linear(f"{block}adaLN_modulation.1", width, (2 if last else 3 + 3 * len(attentions)) * width)
            shapes |= {} if last else linear(f"{block}mlp.fc1", width, 4 * width) | linear(f"{block}mlp.fc2", 4 * width, width)
    return {prefix + name: shape for name, shape in shapes.items()}


def flux(double: int = 1, single: int = 1, prefix: str = UNET, *, guided: bool = True) -> Shapes:
    """Flux's denoiser: `dev` (guided) or `schnell`; the published one has 19 and 38 blocks."""
    width = 3072
    shapes = linear("img_in", 64, width) | linear("txt_in", 4096, width)
    for name, inputs in (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guided else [])):
        shapes |= linear(f"{name}.in_layer", inputs, width) | linear(f"{name}.out_layer", width, width)
    shapes |= linear("final_layer.linear", width, 64) | linear("final_layer.adaLN_modulation.1", width, 2 * width)
    for index in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{index}.{side}_"
            for name, inputs, outputs in (("mod.lin", 1, 6), ("attn.qkv", 1, 3), ("attn.proj", 1, 1), ("mlp.0", 1, 4), ("mlp.2", 4, 1)):
                shapes |= linear(block + name, inputs * width, outputs * width)
            shapes |= {f"{block}attn.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for index in range(single):
        block = f"single_blocks.{index}."
        for name, inputs, outputs in (("linear1", 1, 7), ("linear2", 5, 1), ("modulation.lin", 1, 3)):
            shapes |= linear(block + name, inputs * width, outputs * width)
        shapes |= {f"{block}norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    return {prefix + name: shape for name, shape in shapes.items()}


def zeros(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str = "F16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros, which takes no room on a disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + BYTES[kind] * math.prod(shape)
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def written(models: Mapping[str, Any], *, xl: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of models by the names that they were first published with."""
    tensors: dict[str, torch.Tensor] = {}
    for component, model in models.items():
        for name, tensor in model.state_dict().items():
            key = original_name(component, name, model.config, xl=xl)
            if "in_proj_" in key:  # concatenates query, key and value in this order
                order = ["q_proj", "k_proj", "v_proj"]
                other = [model.state_dict()[name.replace("q_proj", part)] for part in order] if "q_proj" in name else []
                if other:
                    tensors[key] = torch.cat(other)
                continue
            if key.endswith("text_projection"):
                tensor = tensor.T
            tensors[key] = tensor[..., None, None] if component == "vae" and ".attn_1." in key and tensor.ndim == 2 else tensor
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float16, metadata: dict[str, str] | None = None
) -> Path:
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
