"""Opens a base from a directory in diffusers' layout, whichever variant's names its weight files have."""

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..checkpoint import read_header
from ..errors import InputError, refusing, some

TEXT = {f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
SAMPLING = {"unet", "transformer", "vae", "scheduler"} | TEXT
"""The components that generation uses, in any family."""
WEIGHTS = re.compile(r"(?:\w+_)?model(?P<tags>(?:[.-][\w-]+)*)\.safetensors", re.IGNORECASE)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
"""safetensors' names of the types that weights may have."""
NEEDED = {"tokenizer": ("tokenizer.json", "vocab.json", "spiece.model"), "scheduler": ("scheduler_config.json",)}
"""Component -> files of which it needs one; a model needs its config.json."""
VARIANTS = ("", "fp16", "bf16", "fp32")
"""Which weights to prefer of several variants: plain ones first; after these any other, those with "ema" in their names last."""


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """A directory's model_index.json, and the pipeline's class in it. Raises InputError where it can't be read."""
    with refusing(f"{folder / 'model_index.json'} is no index of a pipeline of diffusers", OSError, ValueError, KeyError, TypeError):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return index, str(index["_class_name"])


def load_directory(folder: Path, dtype: torch.dtype, supported: Collection[str], without: Collection[str] = ()) -> Any:
    """The pipeline of a directory in diffusers' layout, without components that generation doesn't use (such as a safety checker).

    Each component's weights may be plain or of any variant (`model.fp16.safetensors`), whole or sharded: diffusers loads from a temporary
    directory with links to them under plain names. Components in `without` aren't loaded. Raises InputError where weights are missing, and
    for a class of pipeline that isn't among the `supported`.
    """
    index, kind = read_index(folder)
    if kind not in supported:
        raise InputError(f"{folder} is a {kind}; supported: {', '.join(supported)}.")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and name not in without}
    needed = {name for name, value in parts.items() if name in SAMPLING and any(value) and (folder / name).is_dir()}
    tokenizers = {name.replace("text_encoder", "tokenizer") for name in needed & TEXT} & parts.keys()
    if lost := sorted((((parts.keys() & SAMPLING) - TEXT) | tokenizers) - needed):
        raise InputError(f"{folder} has no folder {lost[0]}, which its model_index.json names. Was it copied whole?")
    plain = {name: value for name, value in index.items() if name in needed or not isinstance(value, list)}
    # SD 3 runs with one of its three text encoders: diffusers wants the absent ones passed as None
    absent = dict.fromkeys((index.keys() & {*without, *TEXT}) - needed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        stored = {name: link_component(folder / name, Path(scratch) / name) for name in sorted(needed)}
        (Path(scratch) / "model_index.json").write_text(json.dumps(plain), encoding="utf-8")
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
        pipe = getattr(diffusers, kind).from_pretrained(scratch, dtype=dtype, use_safetensors=True, **absent, **unchecked)
    for name, tensors in stored.items():
        # diffusers leaves a layer that isn't in the file on the meta device; transformers initializes it at random
        given = {key.removeprefix("text_model.") for key in tensors}
        found = dict(getattr(pipe, name).named_parameters()) if tensors else {}
        lost = [key for key, tensor in found.items() if tensor.is_meta or ("text" in name and key.removeprefix("text_model.") not in given)]
        if lost:
            raise InputError(f"{folder / name} lacks {len(lost)} layers: {some(lost)}. Copy or download it again.")
        denoiser = getattr(pipe, name) if name in ("unet", "transformer") and not is_quantized(folder / name) else None
        if denoiser and (more := sorted(tensors - denoiser.state_dict().keys())):
            raise InputError(f"{folder / name} has layers that its config.json doesn't name, and that would be left out: {some(more)}.")
    return pipe


def link_component(folder: Path, target: Path) -> set[str]:
    """Links a component's configs and one variant of its weights into `target`, under plain names; returns its tensors' names."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model") and ".safetensors" not in file.name:
            link(file, target / file.name)
    kind = re.sub(r"_\d$", "", folder.name)
    needed = NEEDED.get(kind, ("config.json",))
    if not any((target / name).exists() for name in needed):
        raise InputError(f"{folder} has no {' or '.join(needed)}. Copy or download it again.")
    if kind in NEEDED:
        return set()
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(file.name):
            found[SHARD.sub("", match["tags"]).strip(".")].append(file)
    # one whole file is preferred to shards of the same variant
    found = {variant: [file for file in files if not SHARD.search(file.name)] or files for variant, files in found.items()}
    best = sorted(found, key=lambda variant: VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS) + ("ema" in variant))
    # a variant that lacks a shard, as after a broken download, doesn't count
    whole = (v for v in best if {match[2] for f in found[v] if (match := SHARD.search(f.name))} <= {f"{len(found[v]):05}"})
    if (variant := next(whole, None)) is None:
        what = f"a part of its shards ({found[best[0]][0].name} ...)" if found else "no .safetensors file (.bin, a pickle, isn't opened)"
        raise InputError(f"{folder} has {what}. Copy or download it again.")
    files = found[variant]
    stem = "model" if kind == "text_encoder" else "diffusion_pytorch_model"
    shards: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        link(file, target / name)
        entries = read_header(file)[0]
        if not is_quantized(folder) and (odd := [key for key, one in entries.items() if key.endswith("weight") and one.kind not in FLOATS]):
            raise InputError(f"{file} is quantized ({odd[0]} is stored as {entries[odd[0]].kind}), and its config.json doesn't say how.")
        shards |= dict.fromkeys(entries, name)
    if len(files) > 1:
        (target / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}), encoding="utf-8")
    return set(shards)


def is_quantized(folder: Path) -> bool:
    """Whether a component was saved quantized, by its config.json."""
    return "quantization_config" in (folder / "config.json").read_text(encoding="utf-8")


def link(file: Path, target: Path) -> None:
    """Links `target` to `file`, or copies it where the system allows no links (Windows). Raises InputError if `file` is a broken link."""
    if not file.exists():
        raise InputError(f"{file} is a link to a file that isn't there ({file.readlink()}). Download it again.")
    try:
        target.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
