"""What lies in checkpoint files: the models of a base, told by the names of their tensors under whatever prefix.

The names are those of the code that each model was first published with; diffusers' converters turn them into its own. They are run on
the shapes of a file's header first, so that a file with a missing layer is refused before anything is read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.loaders import single_file_utils as diffusers_names
from torch import Tensor, nn

from ..errors import InputError, some
from .architectures import BASES

MARKS: dict[str, str] = BASES["files"]["marks"]
"""Model -> what only its tensors' names have. What stands before it is the prefix of the whole model."""
TOWERS: dict[int, str] = {config["hidden_size"]: name for name, config in BASES["clip"].items()}
"""Width of a CLIP text encoder -> its name: "clip_l", "clip_h" or "clip_g"."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MOST_HEADER = 100_000_000
"""Bytes: safetensors' own limit."""
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `scale` multiplies it (of fp8 weights, one number or one a row)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    scale: str | None = None


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Names and shapes of a file's tensors, and its metadata. Raises InputError where it isn't whole safetensors."""
    if path.suffix.lower() == ".gguf":
        raise InputError(f"{path} is quantized (GGUF). Give the file in fp16, bf16 or fp8.")
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: only .safetensors is opened (a pickle, as in .ckpt, .pt, .bin, can run any code). Convert it first.")
    try:
        # by hand, for safetensors maps the whole file into memory first, which fails for one that is larger than what is free
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start - 8, MOST_HEADER)))
        metadata = header.pop("__metadata__", {})
        end = max((one["data_offsets"][1] for one in header.values()), default=0)
        if path.stat().st_size != start + end:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {start + end:,}")
        stored = {}
        for key, one in header.items():
            scales = (f"{key.removesuffix('.weight')}.{name}" for name in ("scale_weight", "weight_scale"))
            stored[key] = Stored(path, key, tuple(one["shape"]), one["dtype"], next((scale for scale in scales if scale in header), None))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}). Was it cut off while copying?") from error
    return stored, metadata


def components(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """The models in a file, by name ("unet", "sd3", "flux", "vae", "clip_l", "clip_g", "clip_h", "t5"): their tensors without the prefix."""
    found: dict[str, dict[str, Stored]] = {}
    for kind, mark in MARKS.items():
        matches = (re.match(rf"((?:.*?\.)??){mark}", key) for key in stored)
        for prefix in dict.fromkeys(match[1] for match in matches if match):
            if "vis" in prefix:  # the other half of CLIP, which some files keep
                continue
            tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
            width = next((value.shape[-1] for key, value in tensors.items() if key.endswith(("q_proj.weight", "attn.in_proj_weight"))), 0)
            found.setdefault(TOWERS.get(width, kind) if "clip" in kind else kind, tensors)
    return found


def tensors_of(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors themselves in `dtype`, or for None their shapes alone (on the meta device)."""
    if dtype is None:
        return {name: torch.empty(one.shape, device="meta") for name, one in stored.items()}
    found = {}
    for path in dict.fromkeys(one.path for one in stored.values()):
        with safetensors.safe_open(path, framework="pt") as file:
            for name, one in stored.items():
                if one.path == path and one.kind in FLOATS:
                    tensor = file.get_tensor(one.key).to(dtype)
                    if one.scale:
                        tensor = tensor * file.get_tensor(one.scale).to(dtype).reshape(-1, *[1] * (tensor.ndim - 1))
                    found[name] = tensor
    return found


def converted(kind: str, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A model's state dict by diffusers' names. Raises KeyError where a tensor is missing that others need."""
    found = dict(tensors)
    if kind == "unet":
        found = diffusers_names.convert_ldm_unet_checkpoint({diffusers_names.LDM_UNET_KEY + k: v for k, v in found.items()}, model.config)
    elif kind == "vae":
        found = diffusers_names.convert_ldm_vae_checkpoint({f"vae.{k}": v for k, v in found.items()}, model.config)
    elif kind == "sd3":
        found = diffusers_names.convert_sd3_transformer_checkpoint_to_diffusers(found)
    elif kind == "flux":
        found = diffusers_names.convert_flux_transformer_checkpoint_to_diffusers(found)
    elif any("resblocks" in key for key in found):
        found = diffusers_names.convert_open_clip_checkpoint(model, found, prefix="")
    if "shared.weight" in found:  # T5 reads words by one table under two names
        found["encoder.embed_tokens.weight"] = found["shared.weight"]
    if "clip" in kind:  # transformers calls the tensors of a text encoder with or without this step
        step = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
        found = {(key if key.startswith("text_projection") else step + key.removeprefix("text_model.")): v for key, v in found.items()}
    return found


def fitted(kind: str, stored: Mapping[str, Stored], model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A model's whole state dict, in `dtype` or as shapes. Raises InputError where a layer is missing, quantized or of another size."""
    path, wanted = next(iter(stored.values())).path, model.state_dict()
    for key, one in stored.items():
        if key.endswith("weight") and one.kind not in FLOATS:
            raise InputError(f"{path} is quantized ({key} is stored as {one.kind}). Give the file in fp16, bf16 or fp8.")
    try:
        found = converted(kind, tensors_of(stored, dtype), model)
    except KeyError as error:
        raise InputError(f"{path} lacks layers of its {kind}, the first of them {error.args[0]}. Give a full checkpoint.") from error
    if "text_projection.weight" in wanted and kind == "clip_l":  # SD 3 takes this encoder's pooled text as it is
        size = len(wanted["text_projection.weight"])
        found["text_projection.weight"] = torch.eye(size, dtype=dtype, device="meta" if dtype is None else "cpu")
    if missing := [key for key in wanted if key not in found]:
        raise InputError(f"{path} lacks {len(missing)} layers of its {kind}: {some(missing)}. Is it pruned? Give a full checkpoint.")
    for key, tensor in wanted.items():
        if found[key].numel() != tensor.numel():
            raise InputError(f"{path}: {key} of its {kind} is of shape {tuple(found[key].shape)}, which no base of this kind has.")
    # the same matrix is a linear layer in one code and a 1 x 1 convolution in another
    return {key: found[key].reshape(tensor.shape) for key, tensor in wanted.items()}
