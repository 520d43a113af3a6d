"""Opens bases, and chooses the backbone class of their family."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import InputError, refusing
from ..progress import hushed
from .base import Backbone
from .directory import load_directory, read_index
from .discrete import StableDiffusion, StableDiffusionXL
from .flow import Flow, Flux, StableDiffusion3
from .quantized import check_library, quantized
from .single_file import UNSUPPORTED, components, load_single_file, read_header, refuse_channels

INDEX = "model_index.json"
FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""diffusers' pipeline class -> the backbone of its family. A new family is a class and a line here."""


def best_for(base: str | Path, device: str | torch.device | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """`device` and `dtype` for `load_backbone`, with the best available in place of None; off CUDA, and for toon, that is float32."""
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one GPU for each process of `accelerate launch`
    device = str(device or ("mps" if torch.backends.mps.is_available() else "cpu"))
    if dtype is None and device.startswith("cuda") and str(base) != "toon":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"device": device, "dtype": dtype or torch.float32}


@hushed()
@torch.inference_mode(False)  # weights that are made in inference mode can't take part in a training
def load_backbone(
    base: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: str = "auto",
    parts: Sequence[str | Path] = (),
    quantize: str | None = None,
) -> Backbone:
    """Opens a base: "toon" (shipped), a directory in diffusers' layout, a single .safetensors checkpoint, or a hub id.

    The class of the pipeline decides the family.

    Args:
        prediction: what the denoiser predicts, "epsilon" or "v_prediction"; "auto" reads it from the base's files, or tests the UNet.
        parts: files and directories with what a single file lacks: text encoders, autoencoder, T5's tokenizer.
        quantize: "nf4" or "int8" quantizes denoiser and T5, see `quantized`; a base that was saved quantized stays as it is.

    Raises InputError where the base can't be opened, or isn't of a supported family.
    """
    source = resolve_base(base)
    if (file := Path(source)).is_file():
        pipe = load_single_file(file, dtype, device=device, prediction=prediction, more=[*map(Path, parts)])
        return wrap(quantized(pipe, quantize, device).to(device), source)
    if parts:
        raise InputError(f"--parts is for a single file that lacks something; {base} is none.")
    kinds = OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError
    advice = f'Give "toon", a directory in diffusers\' layout (with {INDEX}), a .safetensors checkpoint, or a hub id.'
    with refusing(f"{base} can't be opened as a base", *kinds, advice=advice):
        folder = Path(source) if Path(source).is_dir() else download(source)
        check_library(folder)
        pipe = load_directory(folder, dtype, FAMILIES)
    pipe.register_to_config(_name_or_path=source)
    if prediction != "auto":
        if "prediction_type" not in pipe.scheduler.config:
            raise InputError(f"--prediction is of bases with a discrete schedule; {base} is trained by flow matching.")
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return wrap(quantized(pipe, quantize, device).to(device), str(base))


def trained_by_flow(base: str | Path) -> bool | None:
    """Whether a base is trained by flow matching, by its model_index.json or its file's header; None for one that isn't on this machine."""
    source = Path(resolve_base(base))
    if source.is_dir():
        return issubclass(FAMILIES.get(read_index(source)[1], Backbone), Flow)
    return bool({"sd3", "flux"} & components(read_header(source)[0]).keys()) if source.is_file() else None


def download(name: str) -> Path:
    """Fetches a base from the hub: its plain weights, or those in half precision where there are no others."""
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
    except (OSError, ValueError) as first:
        try:
            return Path(diffusers.DiffusionPipeline.download(name, variant="fp16", use_safetensors=True))
        except (OSError, ValueError):
            raise first from None


def wrap(pipe: Any, name: str) -> Backbone:
    """The backbone of a loaded pipeline. Raises InputError for another kind of pipeline."""
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise InputError(f"{name} is a {kind}; supported: {', '.join(FAMILIES)}.")
    denoiser, latent = getattr(pipe, "unet", None) or pipe.transformer, pipe.vae.config.latent_channels
    refuse_channels(denoiser.config.in_channels // (4 if kind == "FluxPipeline" else 1), latent, name)
    if denoiser.config.get("time_cond_proj_dim"):
        raise InputError(f"{name} is {UNSUPPORTED['cond_proj']}.")
    return FAMILIES[kind](pipe)


def resolve_base(base: str | Path) -> str:
    """The shipped directory of "toon", an existing path, or a hub id without the hub's address. Raises InputError for anything else."""
    from ..assets import toon

    if str(base) == "toon":
        return str(toon.directory("base"))
    path, name = Path(base), re.sub(r"^https?://(huggingface\.co|hf\.co)/", "", str(base))
    if path.suffix.lower() in (".safetensors", ".sft", ".ckpt", ".gguf") and not path.exists():
        raise InputError(f"{base}: no such file.")
    if path.is_dir() and not (path / INDEX).is_file():
        indexes = (path.parent / INDEX, *path.glob(f"*/{INDEX}"), *path.glob(f"snapshots/*/{INDEX}"))
        near = [*(file.parent for file in indexes if file.is_file()), *path.glob("*.safetensors")]
        advice = f" Give {near[0]}?" if near else ""
        what = "a link to nothing as its" if (path / INDEX).is_symlink() else "no"
        raise InputError(f"{base} has {what} {INDEX}, so it isn't a base in diffusers' layout.{advice}")
    if not path.exists() and not re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", name):
        raise InputError(f"{base} can't be opened as a base: there is no such file or directory, and a hub id is user/name.")
    return str(base) if path.exists() else name
