"""How a base is opened, and which family it is of."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch

from ..errors import InputError, some
from .base import Backbone
from .flux import Flux
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL

FAMILIES: dict[str, Callable[[Any], Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""diffusers' pipeline -> the family that it is of. A new family is a file of its own and a line here."""
TEXT = {f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
SAMPLING = {"unet", "transformer", "vae", "scheduler"} | TEXT
"""The components that a picture is drawn with, of any family."""
WEIGHTS = re.compile(r"(?:diffusion_)?(?:pytorch_)?model(?P<tags>(?:[.-][\w-]+)*)\.safetensors", re.IGNORECASE)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
DISTILLED = (
    "distilled for a few steps (a latent consistency model with its guidance scale as a condition, time_cond_proj_dim), which can't be trained on "
    "here. Give the base that it was distilled from."
)
VARIANTS = ("", "fp16", "bf16", "fp32")
"""Weights to prefer where a component comes in several variants; plain ones first, training's own (non_ema) last."""


def load_backbone(base: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Opens a base: "toon" (shipped), a diffusers directory, a single .safetensors checkpoint of SD 1.x, SD 2.x or SDXL, or a hub id.

    What the pipeline is chooses the family.

    Raises InputError where it isn't a pipeline of a supported family.
    """
    source = resolve_base(base)
    if Path(source).is_file():
        from .single_file import load_single_file

        return wrap(load_single_file(Path(source), dtype).to(device), source)
    try:
        pipe = load_directory(Path(source) if Path(source).is_dir() else download(source), dtype)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{base} can't be opened as a base: {(str(error) or type(error).__name__).splitlines()[0]} "
            'Give "toon", a directory in diffusers\' layout (with model_index.json), a .safetensors checkpoint, or a hub id.'
        ) from error
    pipe.register_to_config(_name_or_path=source)
    return wrap(pipe.to(device), str(base))


def download(name: str) -> Path:
    """Fetches a base from the hub: its plain weights, or those in half precision where there are no others."""
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
    except (OSError, ValueError):
        return Path(diffusers.DiffusionPipeline.download(name, variant="fp16", use_safetensors=True))


def load_directory(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a directory in diffusers' layout, without what no picture is drawn with (a safety checker, extra components).

    Weights may be plain or of any variant (`model.fp16.safetensors`), whole or sharded, each component in its own way: diffusers is
    given links to them by their plain names. Raises InputError where weights are missing.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise InputError(f"{folder} is a {kind}; supported: {', '.join(FAMILIES)}.")
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    needed = {name for name, value in parts.items() if name in SAMPLING and value[0] and (folder / name).is_dir()}
    if lost := sorted((parts.keys() & SAMPLING) - TEXT - needed):
        raise InputError(f"{folder} has no folder {lost[0]}, which its model_index.json names. Was it copied whole?")
    plain = {name: value for name, value in index.items() if name not in parts or name in needed}
    # SD 3 runs without any two of its text encoders: diffusers wants to be told
    absent = dict.fromkeys((parts.keys() & TEXT) - needed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        stored = {name: link_component(folder / name, Path(scratch) / name) for name in sorted(needed)}
        (Path(scratch) / "model_index.json").write_text(json.dumps(plain), encoding="utf-8")
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
        pipe = getattr(diffusers, kind).from_pretrained(scratch, dtype=dtype, use_safetensors=True, **absent, **unchecked)
    for name, tensors in stored.items():
        # diffusers leaves a layer that isn't in the file without memory; transformers draws it at random
        given = {key.removeprefix("text_model.") for key in tensors}
        found = dict(getattr(pipe, name).named_parameters()) if tensors else {}
        lost = [key for key, tensor in found.items() if tensor.is_meta or ("text" in name and key.removeprefix("text_model.") not in given)]
        if lost:
            raise InputError(f"{folder / name} lacks {len(lost)} layers: {some(lost)}. Copy or download it again.")
    return pipe


def link_component(folder: Path, target: Path) -> set[str]:
    """Links to a component's configs and to one variant of its weights, by plain names; returns the names of its tensors."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model") and ".safetensors" not in file.name:
            link(file, target / file.name)
    if folder.name.startswith(("tokenizer", "scheduler")):
        return set()
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(file.name):
            found[SHARD.sub("", match["tags"]).strip(".")].append(file)
    # one whole file goes before the same in shards
    found = {variant: [file for file in files if not SHARD.search(file.name)] or files for variant, files in found.items()}
    # a variant with a missing shard, which a broken download leaves, is none
    whole = [
        variant for variant, files in found.items() if {match[2] for f in files if (match := SHARD.search(f.name))} <= {f"{len(files):05}"}
    ]
    if not whole:
        what = (
            f"a part of its shards ({found.popitem()[1][0].name} ...)" if found else "no .safetensors file (pickles, .bin, aren't opened)"
        )
        raise InputError(f"{folder} has {what}. Copy or download it again.")
    rank = {variant: VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS) + ("ema" in variant) for variant in whole}
    files = found[min(whole, key=lambda variant: rank[variant])]
    stem = re.split(r"[.-]", files[0].name)[0]
    shards: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        link(file, target / name)
        with safetensors.safe_open(file, framework="pt") as opened:
            shards |= dict.fromkeys(opened.keys(), name)
    if len(files) > 1:
        (target / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}), encoding="utf-8")
    return set(shards)


def link(file: Path, target: Path) -> None:
    """A link, or a copy where the system allows no links (Windows)."""
    try:
        target.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)


def wrap(pipe: Any, name: str) -> Backbone:
    """The backbone of a loaded pipeline. Raises InputError for another kind of pipeline."""
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise InputError(f"{name} is a {kind}; supported: {', '.join(FAMILIES)}.")
    denoiser, latent = getattr(pipe, "unet", None) or pipe.transformer, pipe.vae.config.latent_channels
    refuse_other_uses(denoiser.config.in_channels // (4 if kind == "FluxPipeline" else 1), latent, name)
    if denoiser.config.get("time_cond_proj_dim"):
        raise InputError(f"{name} is {DISTILLED}")
    return FAMILIES[kind](pipe)


def refuse_other_uses(channels: int, latent: int, name: object) -> None:
    """Raises InputError for a denoiser that takes more than the latents of one picture (`latent` channels): no text-to-image base."""
    kinds = {
        2 * latent + 1: "an inpainting model",
        2 * latent: "a model for editing pictures (InstructPix2Pix)",
        5: "a depth-to-image model",
    }
    if channels != latent:
        what = f"{kinds.get(channels, 'a model of another kind')}, of {channels} input channels"
        raise InputError(f"{name} is {what}; only text-to-image bases are supported.")


def resolve_base(base: str | Path) -> str:
    """The directory of a shipped base, or `base` as given."""
    from ..assets import toon

    if str(base) == "toon":
        return str(toon.directory("base"))
    path = Path(base)
    if path.suffix in (".safetensors", ".ckpt") and not path.exists():
        raise InputError(f"{base}: no such file.")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise InputError(f"{base} has no model_index.json, so it isn't a base in diffusers' layout.")
    return str(base)
