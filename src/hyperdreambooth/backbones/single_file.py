"""Opens a base from a single `.safetensors` file, without the hub: SD 1.x, SD 2.x, SDXL, SD 3, SD 3.5, Flux.1.

The models in a file are recognized by their tensors' names, under any prefix: those of the code that each model was first published with,
which diffusers' converters translate. The converters first run on the shapes in the header, so that a file that lacks a layer is refused
before anything is loaded. CLIP's tokenizer is shipped. With a denoiser alone (or GGUF) the rest comes from other files or directories.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers.loaders import single_file_utils as diffusers_names
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoTokenizer

from .. import checkpoint
from ..assets import clip
from ..errors import InputError, refusing, some
from ..progress import say
from . import architectures
from .architectures import BASES, TEXTS
from .directory import FLOATS, load_directory
from .quantized import gguf_model, load_gguf, read_gguf

MARKS: dict[str, str] = BASES["files"]["marks"]
"""Model -> regular expression that only names of its tensors match. What precedes the match is the prefix of the model's tensors."""
TOWERS: dict[int, str] = {config["hidden_size"]: name for name, config in BASES["clip"].items()}
"""Width of a CLIP text encoder -> its name: "clip_l", "clip_h" or "clip_g"."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
GGUF = ".gguf"
WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Width of the text embeddings that a UNet's cross-attention reads -> architecture."""
TOKENIZER = ("spiece.model", "tokenizer.json")
T5_NAME = "google/t5-v1_1-xxl"
DISPLAY_NAMES: dict[str, str] = BASES["files"]["display_names"]
UNSUPPORTED: dict[str, str] = BASES["files"]["unsupported"]
"""Regular expression -> what a file with a tensor of such a name is, in words: nothing that can be opened here."""
FIRST_LAYERS = {"unet": ("input_blocks.0.0.weight", 4, 1), "sd3": ("x_embedder.proj.weight", 16, 1), "flux": ("img_in.weight", 16, 4)}
"""Denoiser -> its first layer's weight, the channels of its latents, and that layer's inputs per channel (Flux: a 2 x 2 patch)."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `kind`: its type's name; `scale`: the tensor that multiplies an fp8 weight, one number or one per row."""

    path: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    scale: str | None = None


Parts = dict[str, dict[str, Stored]]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Names and shapes of a file's tensors, and its metadata. Raises InputError where it isn't a whole safetensors or GGUF file."""
    if path.suffix.lower() == GGUF:
        return {key: Stored(path, key, *about) for key, about in read_gguf(path).items()}, {}
    try:
        header, metadata = checkpoint.read_header(path)
    except InputError as error:
        if path.suffix.lower() not in PICKLES:
            raise
        what = f"{path}: only .safetensors is opened (a pickle, as in .ckpt, .pt, .bin, can run any code). Convert it first."
        raise InputError(what) from error
    stored = {}
    for key, one in header.items():
        scales = (f"{key.removesuffix('.weight')}.{name}" for name in ("scale_weight", "weight_scale"))
        fits = (scale for scale in scales if scale in header and math.prod(header[scale].shape) in (1, *one.shape[:1]))
        stored[key] = Stored(path, key, *one, next(fits, None))
    return stored, metadata


def components(stored: Mapping[str, Stored]) -> Parts:
    """The models in a file ("unet", "sd3", "flux", "vae", "clip_l", "clip_g", "clip_h", "t5"): their tensors, named without the prefix."""
    found: Parts = {}
    matches = ((kind, re.match(rf"((?:.*?\.)??){mark}", key)) for kind, mark in MARKS.items() for key in stored)
    models = dict.fromkeys((kind, match[1]) for kind, match in matches if match and "vis" not in match[1])  # not CLIP's vision model
    others = tuple({prefix for _, prefix in models} - {""})
    for kind, prefix in models:
        own = (key for key in stored if (key.startswith(prefix) if prefix else not key.startswith(others)))
        tensors = {key.removeprefix(prefix): stored[key] for key in own}
        width = next((value.shape[-1] for key, value in tensors.items() if key.endswith(("q_proj.weight", "attn.in_proj_weight"))), 0)
        found.setdefault(TOWERS.get(width, kind) if "clip" in kind else kind, tensors)
    return found


def tensors_of(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """One model's tensors, read in `dtype`; for None as empty tensors on the meta device, of the same shapes."""
    if dtype is None:
        return {name: torch.empty(one.shape, device="meta") for name, one in stored.items()}
    path = next(iter(stored.values())).path
    if path.suffix.lower() == GGUF:
        tensors = load_gguf(path, {one.key: one.shape for one in stored.values()}, dtype)
        return {name: tensors[one.key] for name, one in stored.items()}
    found = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for name, one in stored.items():
            if one.kind in FLOATS:
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
    if "shared.weight" in found:  # T5's one embedding table has two names
        found["encoder.embed_tokens.weight"] = found["shared.weight"]
    if "clip" in kind:  # a text encoder's tensors have this prefix or not, depending on its class and the version of transformers
        step = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
        found = {(key if key.startswith("text_projection") else step + key.removeprefix("text_model.")): v for key, v in found.items()}
    return found


def fitted(kind: str, stored: Mapping[str, Stored], model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A model's state dict in `dtype` (None: meta tensors); GGUF stays quantized. Raises InputError where layers are missing or differ."""
    path, wanted = next(iter(stored.values())).path, model.state_dict()
    packed = path.suffix.lower() == GGUF and kind in FIRST_LAYERS
    scales = {one.scale for one in stored.values()}
    for key, one in stored.items():
        side = one.key not in scales and re.search(r"scale_inv$|weight_scale|scale_weight|\.weight\.", key)
        if side or (key.endswith("weight") and one.kind not in FLOATS and not packed):
            what = f"{path} is quantized ({key} of its {DISPLAY_NAMES.get(kind, kind)} is stored as {one.kind})"
            raise InputError(f"{what}. Give the file in fp16, bf16 or fp8; a denoiser may be GGUF, too.")
    with refusing(f"{path} lacks layers of its {kind}, the first of them", KeyError, advice="Give a full checkpoint."):
        found = converted(kind, tensors_of(stored, dtype), model)
    if "text_projection.weight" in wanted and kind == "clip_l":  # SD 3 uses this encoder's pooled text without a projection
        size = len(wanted["text_projection.weight"])
        found["text_projection.weight"] = torch.eye(size, dtype=dtype, device="meta" if dtype is None else "cpu")
    if missing := [key for key in wanted if key not in found]:
        raise InputError(f"{path} lacks {len(missing)} layers of its {kind}: {some(missing)}. Is it pruned? Give a full checkpoint.")
    layers = (one for key, one in stored.items() if re.search(r"(^|\.)(weight|bias|scale|pos_embed)$", key))
    more = sum(math.prod(one.shape) for one in layers) - sum(tensor.numel() for tensor in wanted.values())
    if more > 0 and kind in FIRST_LAYERS and dtype is None:
        what = f"has {more:,} numbers in its {kind} that no base of this kind has: layers that would be left out"
        raise InputError(f"{path} {what}. It is another kind of model, or has one more in it.")
    if packed and dtype is not None:  # quantized tensors have other shapes; the header's were checked before, with None as `dtype`
        return {key: found[key] for key in wanted}
    for key, tensor in wanted.items():
        if found[key].numel() != tensor.numel():
            raise InputError(f"{path}: {key} of its {kind} is of shape {tuple(found[key].shape)}, which no base of this kind has.")
    # a linear layer in one implementation is a 1 x 1 convolution in another
    return {key: found[key].reshape(tensor.shape) for key, tensor in wanted.items()}


def detect(parts: Parts, stored: Mapping[str, Stored], path: Path) -> str:
    """A checkpoint's architecture: "sd3", "flux", or one of WIDTHS. Raises InputError for anything else, naming it where it is known."""
    for mark, what in UNSUPPORTED.items():
        if any(re.search(mark, key) for key in stored):
            raise InputError(f"{path} is {what}.")
    kind = next((kind for kind in FIRST_LAYERS if kind in parts), None)
    if kind is None and parts:
        held = ", ".join(DISPLAY_NAMES.get(part, part) for part in parts)
        raise InputError(f"{path} holds {held} alone, without a denoiser: give the base as --base, and this file as --parts.")
    if kind is None:
        try:
            known = diffusers_names.infer_diffusers_model_type(tensors_of(stored, None))
        except (KeyError, IndexError, ValueError, UnboundLocalError):
            known = "v1"
        what = "it has none of their layers" if known == "v1" else f"it is {known}"
        raise InputError(f"{path} is no Stable Diffusion checkpoint and no Flux: {what}.")
    first, latent, share = FIRST_LAYERS[kind]
    if first in parts[kind]:
        refuse_channels(parts[kind][first].shape[1] // share, latent, path)
    if kind != "unet":
        return kind
    width = next((one.shape[-1] for key, one in parts[kind].items() if key.endswith("attn2.to_k.weight")), 0)
    if width not in WIDTHS:
        what = "an SDXL refiner" if width == 1280 else f"of an unknown kind (its cross-attention reads {width} numbers a word)"
        raise InputError(f"{path} is {what}; only text-to-image bases are supported.")
    return WIDTHS[width]


def refuse_channels(channels: int, latent: int, name: object) -> None:
    """Raises InputError for a denoiser whose input `channels` aren't the latents' of one picture (`latent`): no text-to-image base."""
    kinds = {2 * latent + 1: "an inpainting model", 2 * latent: "a model for editing", 5: "a depth-to-image model", 96: "Flux Fill"}
    if channels != latent:
        what = f"{kinds.get(channels, 'a model of another kind')}, of {channels} input channels"
        raise InputError(f"{name} is {what}; only text-to-image bases are supported.")


def prediction_of(path: Path, stored: Mapping[str, Stored], header: Mapping[str, str], given: str) -> tuple[str | None, bool]:
    """What a file declares: "epsilon" or "v_prediction" (None: neither), and whether its schedule ends in pure noise (zero terminal SNR).

    The first source that declares a prediction counts: `given` (unless "auto"), the header's `modelspec.prediction_type`, a tensor called
    `v_pred`, a YAML config beside the file. Zero terminal SNR is declared by a tensor called `ztsnr` or by the YAML config.
    Raises InputError for another prediction, and for a YAML file that isn't such a config.
    """
    names = {key.rpartition(".")[2] for key in stored}
    declared, zero = "v" if "v_pred" in names else None, "ztsnr" in names
    beside = (path.with_suffix(".yaml"), path.with_suffix(".yml"), path.with_name(f"{path.name}.yaml"))
    if file := next((file for file in beside if file.is_file()), None):
        with refusing(f"{file}, beside the checkpoint, is no config of one", Exception, advice="Move it away."):
            params = diffusers_names.fetch_original_config(str(file))["model"]["params"]
            scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", "")
        if "EDM" in scaling:
            raise InputError(f"{path} is an EDM checkpoint, as {file.name} says, which can't be trained on here.")
        declared = declared or str(params.get("parameterization", "v" if scaling.endswith("VScaling") else "eps"))
        zero |= any(params.get(key) for key in ("zero_snr", "ztsnr", "use_ztsnr", "zero_terminal_snr", "use_zero_snr"))
    declared = given if given != "auto" else str(header.get("modelspec.prediction_type") or declared or "").lower()
    if declared and not declared.startswith(("v", "eps")):
        raise InputError(f"{path} says that it predicts {declared}, which can't be trained on here. If it doesn't, give --prediction.")
    return declared and ("v_prediction" if declared.startswith("v") else "epsilon"), zero


def predicts(unet: Any) -> str | None:
    """What a trained UNet predicts, "epsilon" or "v_prediction", found by running it, as few files declare it; None where it isn't clear.

    The input of the last time step is nearly pure noise. The best prediction of the noise is then the input itself. The best prediction of
    the velocity, alpha * noise - sigma * picture, is minus the average picture, whatever the noise: the same for two different inputs.
    """
    place = {"dtype": unet.dtype, "device": getattr(unet, "device", None)}
    more = {}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2, **place)
        more = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, pooled, **place), "time_ids": sizes}}
    noisy = torch.cat([torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    text = torch.zeros(2, 77, unet.config.cross_attention_dim, **place)
    with torch.no_grad():
        output = unet(noisy.to(**place), 999, text, return_dict=False, **more)[0].float().cpu()
    if torch.cosine_similarity(output[0].flatten(), noisy[0].flatten(), dim=0) > 0.5:
        return "epsilon"
    return "v_prediction" if torch.cosine_similarity(output[0].flatten(), output[1].flatten(), dim=0) > 0.6 else None


def load_single_file(
    path: Path, dtype: torch.dtype, *, device: str | torch.device = "cpu", prediction: str = "auto", more: Sequence[Path] = ()
) -> Any:
    """The pipeline of a checkpoint.

    Args:
        device: where the UNet runs to find what it predicts.
        prediction: "epsilon" or "v_prediction"; "auto" takes what the file declares, or else what `predicts` finds.
        more: files and directories with what the checkpoint lacks (text encoders, autoencoder, T5's tokenizer).

    Raises InputError where the file can't be used.
    """
    stored, header = read_header(path)
    parts = components(stored)
    kind = detect(parts, stored, path)
    settings = dict(BASES["pipelines"][architectures.FAMILIES[kind]])
    pipeline = settings.pop("class")
    given: dict[str, Any] = {}
    for source in more:
        if source.is_file():
            held = {name: part for name, part in components(read_header(source)[0]).items() if name not in FIRST_LAYERS}
            if not held:
                what = "no text encoder or autoencoder by the names that they were first published with"
                raise InputError(f"--parts {source} holds {what}. Of files in diffusers' layout give the base's whole directory.")
            parts |= held
        elif (source / "model_index.json").is_file():
            whole = load_directory(source, dtype, [pipeline], without=("unet", "transformer", "scheduler"))
            given = {name: part for name, part in whole.components.items() if part is not None and name != "scheduler"} | given
        elif not any((source / name).is_file() for name in TOKENIZER):
            raise InputError(f"--parts {source}: there is no such file, and no directory that holds components or T5's tokenizer.")
    require(kind, parts, given, path)
    given |= tokenizers(kind, parts, given, more)
    found = architectures.models_of(kind, parts)
    for part, model in found.values():
        fitted(part, parts[part], model, None)
    for name, (part, model) in found.items():
        # T5's outputs overflow in float16
        own = torch.float32 if part == "t5" and dtype == torch.float16 else dtype
        state = fitted(part, parts[part], model, own)
        if part in FIRST_LAYERS and next(iter(parts[part].values())).path.suffix.lower() == GGUF:
            given[name] = gguf_model(model, state, dtype)
            continue
        model.load_state_dict({key: tensor.to(own) for key, tensor in state.items()}, assign=True)  # GGUF's are of other types
        module: Any
        for module in model.modules():
            if "position_ids" in module._buffers:  # CLIP's position ids aren't in every file
                module.register_buffer("position_ids", torch.arange(module.position_embedding.num_embeddings)[None], persistent=False)
        given[name] = model
    unet: Any = given.get("unet")
    predicted, zero_snr = prediction_of(path, stored, header, prediction) if unet is not None else ("flow", False)
    if not predicted and (predicted := predicts(unet.to(device))) != "epsilon":
        predicted = predicted or ("v_prediction" if kind == "sd21" else "epsilon")
        say(f"{path.name} doesn't say what it predicts; its UNet seems to predict {predicted}. If pictures are noise, give --prediction.")
    if kind == "flux":
        predicted = "dev" if given["transformer"].config.guidance_embeds else "schnell"
    if kind == "sd21" and predicted == "epsilon":  # SD 2.x bases that predict noise are made for 512 pixels, the others for 768
        unet.register_to_config(sample_size=64)
    scheduler = architectures.scheduler(kind, predicted or "epsilon", zero_snr=zero_snr)
    pipe = getattr(diffusers, pipeline)(**{**settings, **given, "scheduler": scheduler})
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


def tokenizers(kind: str, parts: Parts, given: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The tokenizers of the text encoders, by the pipeline's names. CLIP's is shipped, T5's comes from a directory or from the hub.

    Where T5's can't be had, SD 3 is opened without T5, which is taken out of `parts` and `given`; for Flux, InputError is raised.
    """
    found: dict[str, Any] = {}
    own = [str(folder) for folder in folders if any((folder / name).is_file() for name in TOKENIZER)]
    for name, part in TEXTS[kind].items():
        key = name.replace("text_encoder", "tokenizer")
        found[key] = given.get(key)
        if found[key] is not None or (part not in parts and name not in given):
            continue
        if part != "t5":
            found[key] = clip.tokenizer() if part == "clip_l" else clip.tokenizer("!")
            continue
        try:
            folder = own[0] if own else snapshot_download(T5_NAME, allow_patterns=["*.json", "spiece.model"])  # offline it fails at once
            found[key] = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            what = f"T5's tokenizer is neither shipped nor on the hub that can be reached ({T5_NAME}): give its folder as --parts"
            if kind == "flux" or own:
                raise InputError(f"{own[0]} holds no tokenizer that can be opened: {error}" if own else f"{what}.") from error
            say(f"T5 is left out. {what} to have it.")
            parts.pop(part, None)
            given.pop(name, None)
    return found


def require(kind: str, parts: Parts, given: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where an autoencoder or text encoder is missing. SD 3 runs without any two of its three text encoders."""
    texts = TEXTS[kind]
    lacking = [part for name, part in {"vae": "vae", **texts}.items() if part not in parts and name not in given]
    if kind == "sd3" and set(texts.values()) - set(lacking):
        if absent := [DISPLAY_NAMES[part] for part in lacking if part != "vae"]:
            say(f"{path.name} is opened without {' and '.join(absent)}, which it lacks. Give them as --parts to have them.")
        lacking = [part for part in lacking if part == "vae"]
    if lacking:
        what = ", ".join(DISPLAY_NAMES[part] for part in lacking)
        advice = "Give files that hold them, or a directory of the same family in diffusers' layout, as --parts FILE ..."
        raise InputError(f"{path} lacks {what}. {advice}")
