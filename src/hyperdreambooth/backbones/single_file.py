"""A base in one `.safetensors` file, as most people have them, opened without a hub: SD 1.x, SD 2.x, SDXL, SD 3, SD 3.5, Flux.1.

What the file is and whether it is whole is read off its header before anything is loaded. The configs follow from the published
architectures and from the shapes; CLIP's tokenizer is shipped. A denoiser alone takes what it lacks from other files or directories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_original_config, infer_diffusers_model_type
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from ..assets import clip
from ..errors import InputError
from ..progress import say
from . import architectures
from .checkpoint_files import Stored, components, fitted, read_header, refuse_quantized, tensors_of
from .directory import load_directory

Parts = dict[str, dict[str, Stored]]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""The width of what a UNet's cross-attention reads tells the families apart."""
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
WITHOUT = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
KINDS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "sd15": (diffusers.StableDiffusionPipeline, ("clip_l",), UNCHECKED),
    "sd21": (diffusers.StableDiffusionPipeline, ("clip_h",), UNCHECKED),
    "sdxl": (diffusers.StableDiffusionXLPipeline, ("clip_l", "clip_g"), {"force_zeros_for_empty_prompt": True, "add_watermarker": False}),
    "sd3": (diffusers.StableDiffusion3Pipeline, ("clip_l", "clip_g", "t5"), WITHOUT),
    "flux": (diffusers.FluxPipeline, ("clip_l", "t5"), {}),
}
"""Family -> its pipeline, the text encoders in the pipeline's order, and what else the pipeline takes."""
TOKENIZER = ("spiece.model", "tokenizer.json")
T5_NAME = "google/t5-v1_1-xxl"
SPOKEN = {"vae": "the autoencoder", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "clip_h": "CLIP-H", "t5": "T5"}
OTHERS = {
    "lora": "a LoRA, not a base: give it as --lora or --style, and the base that it was made for as --base",
    "hada_w|lokr_w": "a LyCORIS file, not a base: give the base that it was made for as --base",
    "control_|controlnet_|input_hint_block": "a ControlNet, not a base: it only steers one",
    r"ip_adapter\.": "an IP-Adapter, not a base",
    "motion_modules": "a motion module (AnimateDiff), not a base",
    r"emb_params|string_to_param|^clip_[lg]$": "a Textual Inversion, not a base",
    "edm_mean": "Playground 2.5, whose denoiser is preconditioned (EDM): neither epsilon nor v prediction, so it can't be trained on here",
    "edm_vpred": "an EDM checkpoint (CosXL), whose noise levels have no discrete schedule, so it can't be trained on here",
    "cond_proj": "distilled for a few steps (a latent consistency model with its guidance scale as a condition), which can't be trained on here",
    "distilled_guidance_layer": "Chroma; of its kind Flux.1 is supported",
    "single_stream_modulation": "Flux.2; of its kind Flux.1 is supported",
    r"^(encoder\.)?down_blocks\.|^(single_)?transformer_blocks\.": "one model of a base in diffusers' layout: give the directory with model_index.json",
}
"""What is in a tensor's name -> what a file is that has one."""
DOORS = {"unet": ("input_blocks.0.0.weight", 4, 1), "sd3": ("x_embedder.proj.weight", 16, 1), "flux": ("img_in.weight", 16, 4)}
"""Denoiser -> its first layer, the channels of latents, and how many of that layer's inputs each channel takes."""


def detect(parts: Parts, stored: Mapping[str, Stored], path: Path) -> str:
    """The family of a checkpoint: a key of KINDS. Raises InputError for anything else, with what it is where that shows."""
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


def models(family: str) -> nn.ModuleDict:
    """The models of a published architecture (a key of `architectures.FAMILIES`) on the meta device, with its autoencoder."""
    found = architectures.architecture(family)
    with torch.device("meta"):
        found["vae"] = architectures.autoencoder(architectures.FAMILIES[family][0])
    return found


def models_of(family: str, parts: Parts) -> dict[str, tuple[str, nn.Module]]:
    """The pipeline's name of each model -> (its name in `parts`, itself on the meta device), for those that the file has."""
    names = {"unet" if "unet" in parts else "transformer": "unet" if "unet" in parts else family, "vae": "vae", **text_names(family)}
    if family in WIDTHS.values():
        found: dict[str, Any] = dict(models(family).items())
    else:
        tower = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
        makers = {
            family: lambda tensors: transformer(family, tensors),
            "vae": lambda _: architectures.autoencoder(family),
            "clip_l": lambda _: tower(architectures.clip_config("L")),
            "clip_g": lambda _: tower(architectures.clip_config("bigG")),
            "t5": text_reader,
        }
        with torch.device("meta"):
            found = {name: makers[part](parts[part]) for name, part in names.items() if part in parts}
    return {name: (part, found[name]) for name, part in names.items() if part in parts}


def text_names(family: str) -> dict[str, str]:
    """The pipeline's names of the text encoders -> theirs in a file."""
    return {f"text_encoder_{number}".removesuffix("_1"): part for number, part in enumerate(KINDS[family][1], 1)}


def count(tensors: Mapping[str, Stored], blocks: str) -> int:
    """The number of blocks whose tensors' names begin with `blocks`."""
    return len({key.removeprefix(blocks).split(".")[0] for key in tensors if key.startswith(blocks)})


def transformer(family: str, tensors: Mapping[str, Stored]) -> nn.Module:
    """The denoiser of SD 3 or Flux, of the sizes that its tensors have."""
    if family == "flux":
        depths = {"num_layers": count(tensors, "double_blocks."), "num_single_layers": count(tensors, "single_blocks.")}
        return diffusers.FluxTransformer2DModel(**depths, guidance_embeds="guidance_in.in_layer.weight" in tensors)
    side = math.isqrt(tensors["pos_embed"].shape[1]) if "pos_embed" in tensors else 192
    dual = len({key.split(".")[1] for key in tensors if ".attn2." in key})
    normed = any("ln_q" in key for key in tensors)
    return architectures.sd3_transformer(count(tensors, "joint_blocks."), side, normed=normed, dual=dual)


def text_reader(tensors: Mapping[str, Stored]) -> nn.Module:
    """T5, of the sizes that its tensors have."""
    ends = ("shared.weight", "wi_0.weight", "relative_attention_bias.weight")
    (words, width), (inner, _), (_, heads) = (next((t.shape for key, t in tensors.items() if key.endswith(end)), (64, 64)) for end in ends)
    return architectures.t5(words, width, inner, count(tensors, "encoder.block."), heads)


def scheduler(family: str, prediction: str, *, zero_snr: bool) -> Any:
    """The scheduler that a family was published with. `prediction`: of SD and SDXL "epsilon" or "v_prediction", of Flux "dev" or "schnell"."""
    if family == "sd3":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "flux":
        guided = prediction == "dev"
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    snr = {"timestep_spacing": "trailing" if zero_snr else "leading", "rescale_betas_zero_snr": zero_snr}
    if family == "sdxl":
        return diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction, **snr)
    if prediction == "v_prediction":
        return diffusers.DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, **snr)
    return diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)


def original_config(path: Path) -> tuple[str | None, bool]:
    """What a YAML file beside a checkpoint says: the prediction, and whether noise goes up to pure noise (zero terminal SNR)."""
    for file in (path.with_suffix(".yaml"), path.with_suffix(".yml"), path.with_name(f"{path.name}.yaml")):
        if file.is_file():
            try:
                params = fetch_original_config(str(file))["model"]["params"]
                scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", "")
            except Exception as error:
                raise InputError(f"{file}, beside the checkpoint, is no config of one ({error}). Move it away.") from error
            if "EDM" in scaling:
                raise InputError(f"{path} is an EDM checkpoint, as {file.name} says, which can't be trained on here.")
            kind = params.get("parameterization", "v" if scaling.endswith("VScaling") else "eps")
            zero = any(params.get(key) for key in ("zero_snr", "ztsnr", "use_ztsnr", "zero_terminal_snr", "use_zero_snr"))
            return ("v_prediction" if kind in ("v", "v_prediction") else "epsilon"), zero
    return None, False


def _asked(unet: Any, noisy: torch.Tensor, step: int) -> torch.Tensor:
    """The UNet's output for noisy latents (1, C, h, w) and no prompt."""
    place = {"dtype": unet.dtype, "device": getattr(unet, "device", None)}
    text = torch.zeros(1, 77, unet.config.cross_attention_dim, **place)
    more = {}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]], **place)
        more = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled, **place), "time_ids": sizes}}
    with torch.no_grad():
        output: torch.Tensor = unet(noisy.to(**place), step, text, return_dict=False, **more)[0]
    return output.float().cpu()


def _alike(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).nan_to_num())


def predicts_noise(unet: Any) -> bool:
    """Whether a UNet predicts noise rather than velocity, which few files say.

    At the last step a picture is nearly all noise: the best guess of the noise is the input itself, while the best guess of
    the velocity, alpha * noise - sigma * picture, has little to do with it.
    """
    noisy = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    return _alike(_asked(unet, noisy, 999), noisy) > 0.5


def predicts_velocity(unet: Any) -> bool:
    """Whether a UNet that doesn't predict noise shows that it predicts velocity.

    At the last step that is minus the same average picture, whatever the noise.
    """
    first, second = (torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return _alike(_asked(unet, first, 999), _asked(unet, second, 999)) > 0.6


def prediction_of(path: Path, stored: Mapping[str, Stored], header: Mapping[str, str]) -> tuple[str | None, bool]:
    """What a checkpoint says of itself: "epsilon" or "v_prediction" (None: nothing), and whether its SNR ends at zero.

    In this order: the header's `modelspec.prediction_type`, the tensors `v_pred` and `ztsnr`, a YAML file beside it.
    """
    said, zero = original_config(path)
    zero |= "ztsnr" in stored
    if "v_pred" in stored:
        said = "v_prediction"
    if kind := header.get("modelspec.prediction_type"):
        said = "v_prediction" if kind.startswith("v") else "epsilon"
    return said, zero


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
    family = detect(parts, stored, path)
    for file in more:
        if file.is_file():
            parts = components(read_header(file)[0]) | parts
        elif not any((file / name).is_file() for name in ("model_index.json", *TOKENIZER)):
            raise InputError(f"--parts {file}: there is no such file, and no directory that holds components or T5's tokenizer.")
    given = components_of_directories(family, more, dtype)
    require(family, parts, given, path)
    given |= tokenizers(family, parts, given, more)
    found = models_of(family, parts)
    for part, model in found.values():
        refuse_quantized(parts[part])
        fitted(part, parts[part], model, None)
    said, zero_snr = prediction_of(path, stored, header)
    loaded: dict[str, Any] = {}
    for name, (part, model) in found.items():
        # T5's outputs overflow in float16
        model.load_state_dict(
            fitted(part, parts[part], model, torch.float32 if part == "t5" and dtype == torch.float16 else dtype), assign=True
        )
        module: Any
        for module in model.modules():
            if "position_ids" in module._buffers:  # CLIP counts words, which isn't in every file
                module.register_buffer("position_ids", torch.arange(module.position_embedding.num_embeddings)[None], persistent=False)
        loaded[name] = model
    unet = loaded.get("unet")
    if prediction != "auto":
        said = prediction
    elif said is None and unet is not None:
        said = "epsilon"
        if not predicts_noise(unet.to(device)):
            said = "v_prediction" if family == "sd21" or predicts_velocity(unet) else "epsilon"
            say(f"{path.name} doesn't say what it predicts; its UNet seems to predict {said}. If pictures are noise, give --prediction.")
    if family == "flux":
        said = "dev" if loaded["transformer"].config.guidance_embeds else "schnell"
    if family == "sd21" and said == "epsilon":  # SD 2.x predicts noise at 512 pixels and velocity at 768
        loaded["unet"].register_to_config(sample_size=64)
    given = {**KINDS[family][2], **given, **loaded, "scheduler": scheduler(family, said or "epsilon", zero_snr=zero_snr)}
    pipe: diffusers.DiffusionPipeline = KINDS[family][0](**given)
    pipe.register_to_config(_name_or_path=str(path))
    return pipe.to(device)


def components_of_directories(family: str, folders: Sequence[Path], dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders, tokenizers and autoencoder out of directories in diffusers' layout, by the pipeline's names; the first has precedence."""
    found: dict[str, Any] = {}
    for folder in folders:
        if (folder / "model_index.json").is_file():
            pipe = load_directory(folder, dtype, [KINDS[family][0].__name__], without=("unet", "transformer", "scheduler"))
            found = {name: part for name, part in pipe.components.items() if part is not None and name != "scheduler"} | found
    return found


def tokenizers(family: str, parts: Parts, given: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The tokenizers of the text encoders, by the pipeline's names. CLIP's is shipped, T5's comes from a directory or from the hub.

    Raises InputError where Flux has none for T5. SD 3 can do without T5.
    """
    found: dict[str, Any] = {}
    for name, part in text_names(family).items():
        key = name.replace("text_encoder", "tokenizer")
        if key in given or (part not in parts and name not in given):
            found[key] = given.get(key)
        elif part != "t5":
            found[key] = clip.tokenizer() if part == "clip_l" else clip.tokenizer("!")
        else:
            found[key] = t5_tokenizer([folder for folder in folders if folder.is_dir()])
            if found[key] is None and family == "flux":
                raise InputError(
                    f"T5's tokenizer is neither shipped nor on the hub that can be reached ({T5_NAME}): give its folder as --parts."
                )
            if found[key] is None:
                say(
                    "T5 is left out: its tokenizer is neither shipped nor on a hub that can be reached. Give its folder as --parts to have it."
                )
                parts.pop("t5")
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


def require(family: str, parts: Parts, given: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where an autoencoder or text encoder is missing. SD 3 runs without any two of its three text encoders."""
    lacking = [part for name, part in {"vae": "vae", **text_names(family)}.items() if part not in parts and name not in given]
    texts = KINDS[family][1]
    if family == "sd3" and set(texts) - set(lacking):
        if absent := [SPOKEN[part] for part in lacking if part != "vae"]:
            say(f"{path.name} is opened without {' and '.join(absent)}, which it lacks. Give them as --parts to have them.")
        lacking = [part for part in lacking if part == "vae"]
    if lacking:
        what = ", ".join(SPOKEN[part] for part in lacking)
        raise InputError(
            f"{path} lacks {what}. Give files that hold them, or a directory of the same family in diffusers' layout, as --parts FILE ..."
        )
