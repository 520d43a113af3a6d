"""A base in one `.safetensors` file, as most people have them, opened without a hub: SD 1.x, SD 2.x, SDXL, SD 3, SD 3.5, Flux.1.

What the file is and whether it is whole is read off its header before anything is loaded. The configs follow from the published
architectures and from the shapes; CLIP's tokenizer is shipped. A denoiser alone takes what it lacks from other files or directories.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_original_config, infer_diffusers_model_type
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from ..assets import clip
from ..errors import InputError
from ..progress import say
from . import architectures
from .architectures import BASES
from .checkpoint_files import Stored, components, fitted, read_header, tensors_of
from .directory import load_directory

Parts = dict[str, dict[str, Stored]]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""The width of what a UNet's cross-attention reads tells the families apart."""
TOKENIZER = ("spiece.model", "tokenizer.json")
T5_NAME = "google/t5-v1_1-xxl"
SPOKEN: dict[str, str] = BASES["files"]["spoken"]
OTHERS: dict[str, str] = BASES["files"]["others"]
"""What is in a tensor's name -> what a file is that has one."""
DOORS = {"unet": ("input_blocks.0.0.weight", 4, 1), "sd3": ("x_embedder.proj.weight", 16, 1), "flux": ("img_in.weight", 16, 4)}
"""Denoiser -> its first layer, the channels of latents, and how many of that layer's inputs each channel takes."""


def detect(parts: Parts, stored: Mapping[str, Stored], path: Path) -> str:
    """The kind of a checkpoint: "sd3", "flux", or one of WIDTHS. Raises InputError for anything else, with what it is where that shows."""
    for mark, what in OTHERS.items():
        if any(re.search(mark, key) for key in stored):
            raise InputError(f"{path} is {what}.")
    kind = next((kind for kind in DOORS if kind in parts), None)
    if kind is None and parts:
        held = ", ".join(SPOKEN.get(part, part) for part in parts)
        raise InputError(f"{path} holds {held} alone, without a denoiser: give the base as --base, and this file as --parts.")
    if kind is None:
        try:
            known = infer_diffusers_model_type(tensors_of(stored, None))
        except (KeyError, IndexError, ValueError, UnboundLocalError):
            known = "v1"
        what = "it has none of their layers" if known == "v1" else f"it is {known}"
        raise InputError(f"{path} is no Stable Diffusion checkpoint and no Flux: {what}.")
    door, latent, share = DOORS[kind]
    if door in parts[kind]:
        refuse_channels(parts[kind][door].shape[1] // share, latent, path)
    if kind != "unet":
        return kind
    width = next((one.shape[-1] for key, one in parts[kind].items() if key.endswith("attn2.to_k.weight")), 0)
    if width not in WIDTHS:
        what = "an SDXL refiner" if width == 1280 else f"of an unknown kind (its cross-attention reads {width} numbers a word)"
        raise InputError(f"{path} is {what}; only text-to-image bases are supported.")
    return WIDTHS[width]


def refuse_channels(channels: int, latent: int, name: object) -> None:
    """Raises InputError for a denoiser that takes more than the latents of one picture (`latent` channels): no text-to-image base."""
    kinds = {2 * latent + 1: "an inpainting model", 2 * latent: "a model for editing", 5: "a depth-to-image model", 96: "Flux Fill"}
    if channels != latent:
        what = f"{kinds.get(channels, 'a model of another kind')}, of {channels} input channels"
        raise InputError(f"{name} is {what}; only text-to-image bases are supported.")


def models(kind: str) -> nn.ModuleDict:
    """The models of a published architecture (a key of `architectures.FAMILIES`) on the meta device, with its autoencoder."""
    found = architectures.architecture(kind)
    with torch.device("meta"):
        found["vae"] = architectures.autoencoder(architectures.FAMILIES[kind][0])
    return found


def models_of(kind: str, parts: Parts) -> dict[str, tuple[str, nn.Module]]:
    """The pipeline's name of each model -> (its name in `parts`, itself on the meta device), for those that the file has.

    SD 1 and 2 and SDXL have the published sizes, SD 3, Flux and T5 those of their tensors.
    """
    denoiser = {"unet": "unet"} if "unet" in parts else {"transformer": kind}
    names = {name: part for name, part in {**denoiser, "vae": "vae", **text_names(kind)}.items() if part in parts}
    if "unet" in parts:
        found = models(kind)
        return {name: (part, found[name]) for name, part in names.items()}
    makers = {"vae": lambda _: architectures.autoencoder(kind), "sd3": sd3, "flux": flux, "t5": t5}
    with torch.device("meta"):
        return {
            name: (part, makers[part](parts[part]) if part in makers else architectures.clip_tower(part, kind))
            for name, part in names.items()
        }


def text_names(kind: str) -> dict[str, str]:
    """The pipeline's names of the text encoders -> theirs in a file."""
    texts = BASES["architectures"][kind]["texts"]
    return dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), texts, strict=False))


def count(tensors: Mapping[str, Stored], blocks: str) -> int:
    """The number of blocks whose tensors' names begin with `blocks`."""
    return len({key.removeprefix(blocks).split(".")[0] for key in tensors if key.startswith(blocks)})


def flux(tensors: Mapping[str, Stored]) -> nn.Module:
    """Flux's denoiser, of the sizes that its tensors have."""
    depths = {"num_layers": count(tensors, "double_blocks."), "num_single_layers": count(tensors, "single_blocks.")}
    return diffusers.FluxTransformer2DModel(**depths, guidance_embeds="guidance_in.in_layer.weight" in tensors)


def sd3(tensors: Mapping[str, Stored]) -> nn.Module:
    """SD 3's denoiser, of the sizes that its tensors have."""
    side = math.isqrt(tensors["pos_embed"].shape[1]) if "pos_embed" in tensors else 192
    dual = len({key.split(".")[1] for key in tensors if ".attn2." in key})
    normed = any("ln_q" in key for key in tensors)
    return architectures.sd3_transformer(count(tensors, "joint_blocks."), side, normed=normed, dual=dual)


def t5(tensors: Mapping[str, Stored]) -> nn.Module:
    """The encoder of T5 v1.1, of the sizes that its tensors have."""
    ends = ("shared.weight", "wi_0.weight", "relative_attention_bias.weight")
    (words, width), (inner, _), (_, heads) = (next((t.shape for key, t in tensors.items() if key.endswith(end)), (64, 64)) for end in ends)
    sizes = {"vocab_size": words, "d_model": width, "d_ff": inner, "num_layers": count(tensors, "encoder.block."), "num_heads": heads}
    return T5EncoderModel(T5Config(**sizes, d_kv=64, feed_forward_proj="gated-gelu"))


def scheduler(kind: str, prediction: str, *, zero_snr: bool) -> Any:
    """The scheduler that a base was published with. `prediction`: of SD and SDXL "epsilon" or "v_prediction", of Flux "dev" or "schnell"."""
    if kind in ("sd3", "flux"):
        shifting = kind == "flux" and prediction == "dev"
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if kind == "sd3" or shifting else 1.0, use_dynamic_shifting=shifting)
    snr = {"timestep_spacing": "trailing" if zero_snr else "leading", "rescale_betas_zero_snr": zero_snr}
    if kind == "sdxl":
        return diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction, **snr)
    if prediction == "v_prediction":
        return diffusers.DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, **snr)
    return diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)


def prediction_of(path: Path, stored: Mapping[str, Stored], header: Mapping[str, str]) -> tuple[str | None, bool]:
    """What a checkpoint says of itself: "epsilon" or "v_prediction" (None: nothing), and whether its noise goes up to pure noise (zero SNR).

    In this order: the header's `modelspec.prediction_type`, the tensors `v_pred` and `ztsnr`, a YAML file beside it.
    """
    said, zero = "v" if "v_pred" in stored else None, "ztsnr" in stored
    beside = (path.with_suffix(".yaml"), path.with_suffix(".yml"), path.with_name(f"{path.name}.yaml"))
    if file := next((file for file in beside if file.is_file()), None):
        try:
            params = fetch_original_config(str(file))["model"]["params"]
            scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", "")
        except Exception as error:
            raise InputError(f"{file}, beside the checkpoint, is no config of one ({error}). Move it away.") from error
        if "EDM" in scaling:
            raise InputError(f"{path} is an EDM checkpoint, as {file.name} says, which can't be trained on here.")
        said = said or str(params.get("parameterization", "v" if scaling.endswith("VScaling") else "eps"))
        zero |= any(params.get(key) for key in ("zero_snr", "ztsnr", "use_ztsnr", "zero_terminal_snr", "use_zero_snr"))
    said = header.get("modelspec.prediction_type") or said
    return said and ("v_prediction" if said.startswith("v") else "epsilon"), zero


def predicts(unet: Any) -> str | None:
    """What a trained UNet predicts, "epsilon" or "v_prediction", which few files say; None where it doesn't show.

    At the last step a picture is nearly all noise. The best guess of the noise is the input itself; the best guess of the velocity,
    alpha * noise - sigma * picture, is minus the same average picture, whatever the noise.
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
    """The pipeline of a checkpoint, on the device.

    Args:
        prediction: "epsilon" or "v_prediction"; "auto" believes the file, and asks the UNet where it says nothing.
        more: files and directories with what the checkpoint lacks (text encoders, autoencoder, T5's tokenizer).

    Raises InputError where the file can't be used.
    """
    stored, header = read_header(path)
    parts = components(stored)
    kind = detect(parts, stored, path)
    settings = dict(BASES["pipelines"][architectures.FAMILIES[kind][0]])
    pipeline = settings.pop("class")
    given: dict[str, Any] = {}
    for source in more:
        if source.is_file():
            parts = components(read_header(source)[0]) | parts
        elif (source / "model_index.json").is_file():
            whole = load_directory(source, dtype, [pipeline], without=("unet", "transformer", "scheduler"))
            given = {name: part for name, part in whole.components.items() if part is not None and name != "scheduler"} | given
        elif not any((source / name).is_file() for name in TOKENIZER):
            raise InputError(f"--parts {source}: there is no such file, and no directory that holds components or T5's tokenizer.")
    require(kind, parts, given, path)
    given |= tokenizers(kind, parts, given, more)
    found = models_of(kind, parts)
    for part, model in found.values():
        fitted(part, parts[part], model, None)
    said, zero_snr = prediction_of(path, stored, header)
    for name, (part, model) in found.items():
        # T5's outputs overflow in float16
        own = torch.float32 if part == "t5" and dtype == torch.float16 else dtype
        model.load_state_dict(fitted(part, parts[part], model, own), assign=True)
        module: Any
        for module in model.modules():
            if "position_ids" in module._buffers:  # CLIP counts words, which isn't in every file
                module.register_buffer("position_ids", torch.arange(module.position_embedding.num_embeddings)[None], persistent=False)
        given[name] = model
    unet: Any = given.get("unet")
    if prediction != "auto":
        said = prediction
    elif said is None and unet is not None and (said := predicts(unet.to(device))) != "epsilon":
        said = said or ("v_prediction" if kind == "sd21" else "epsilon")
        say(f"{path.name} doesn't say what it predicts; its UNet seems to predict {said}. If pictures are noise, give --prediction.")
    if kind == "flux":
        said = "dev" if given["transformer"].config.guidance_embeds else "schnell"
    if kind == "sd21" and said == "epsilon":  # SD 2.x predicts noise at 512 pixels and velocity at 768
        unet.register_to_config(sample_size=64)
    noising = scheduler(kind, said or "epsilon", zero_snr=zero_snr)
    pipe = getattr(diffusers, pipeline)(**{**settings, **given, "scheduler": noising})
    pipe.register_to_config(_name_or_path=str(path))
    return pipe.to(device)


def tokenizers(kind: str, parts: Parts, given: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The tokenizers of the text encoders, by the pipeline's names. CLIP's is shipped, T5's comes from a directory or from the hub.

    SD 3 goes on without a T5 that has none; for Flux that raises InputError.
    """
    found: dict[str, Any] = {}
    for name, part in text_names(kind).items():
        key = name.replace("text_encoder", "tokenizer")
        found[key] = given.get(key)
        if found[key] is not None or (part not in parts and name not in given):
            continue
        found[key] = t5_tokenizer(folders) if part == "t5" else clip.tokenizer() if part == "clip_l" else clip.tokenizer("!")
        if found[key] is None:
            what = f"T5's tokenizer is neither shipped nor on the hub that can be reached ({T5_NAME}): give its folder as --parts"
            if kind == "flux":
                raise InputError(f"{what}.")
            say(f"T5 is left out. {what} to have it.")
            parts.pop(part, None)
            given.pop(name, None)
    return found


def t5_tokenizer(folders: Sequence[Path]) -> Any:
    """T5's tokenizer from the first folder that has one, or from the hub; None where there is none."""
    own = [str(folder) for folder in folders if any((folder / name).is_file() for name in TOKENIZER)]
    try:
        return AutoTokenizer.from_pretrained((own or [T5_NAME])[0])
    except (OSError, ValueError) as error:
        if own:
            raise InputError(f"{own[0]} holds no tokenizer that can be opened: {error}") from error
        return None


def require(kind: str, parts: Parts, given: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where an autoencoder or text encoder is missing. SD 3 runs without any two of its three text encoders."""
    texts = text_names(kind)
    lacking = [part for name, part in {"vae": "vae", **texts}.items() if part not in parts and name not in given]
    if kind == "sd3" and set(texts.values()) - set(lacking):
        if absent := [SPOKEN[part] for part in lacking if part != "vae"]:
            say(f"{path.name} is opened without {' and '.join(absent)}, which it lacks. Give them as --parts to have them.")
        lacking = [part for part in lacking if part == "vae"]
    if lacking:
        what = ", ".join(SPOKEN[part] for part in lacking)
        raise InputError(
            f"{path} lacks {what}. Give files that hold them, or a directory of the same family in diffusers' layout, as --parts FILE ..."
        )
