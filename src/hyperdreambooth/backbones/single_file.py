"""A base in one `.safetensors` file, as most people have them, opened without a hub: SD 1.x, SD 2.x, SDXL, SD 3, SD 3.5, Flux.1.

What the file is and whether it is whole is read off its header before anything is loaded. The configs follow from the published
architectures and from the shapes; CLIP's tokenizer is shipped. A denoiser alone takes what it lacks from other files or directories.
"""

from __future__ import annotations

import math
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
TEXTS = {
    "sd15": ("clip_l",),
    "sd21": ("clip_h",),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5"),
    "flux": ("clip_l", "t5"),
}
"""Family -> the text encoders in the order of the pipeline's."""
PIPELINES: dict[str, Any] = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sd21": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "sd15": UNCHECKED,
    "sd21": UNCHECKED,
    "sdxl": {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    "sd3": dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
}
T5_NAME = "google/t5-v1_1-xxl"
SPOKEN = {"vae": "the autoencoder", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "clip_h": "CLIP-H", "t5": "T5"}
OTHERS = {
    "lora": "a LoRA, not a base: give it as --lora or --style, and the base that it was made for as --base",
    "hada_w": "a LyCORIS file, not a base: give the base that it was made for as --base",
    "lokr_w": "a LyCORIS file, not a base: give the base that it was made for as --base",
    "control_": "a ControlNet, not a base: it only steers one",
    "controlnet_": "a ControlNet, not a base: it only steers one",
    "input_hint_block": "a ControlNet, not a base: it only steers one",
    "ip_adapter.": "an IP-Adapter, not a base",
    "motion_modules": "a motion module (AnimateDiff), not a base",
    "emb_params": "a Textual Inversion, not a base",
    "string_to_param": "a Textual Inversion, not a base",
    "edm_mean": "Playground 2.5, whose denoiser is preconditioned (EDM): neither epsilon nor v prediction, so it can't be trained on here",
    "edm_vpred": "an EDM checkpoint (CosXL), whose noise levels have no discrete schedule, so it can't be trained on here",
    "cond_proj": "distilled for a few steps (a latent consistency model with its guidance scale as a condition), which can't be trained on here",
}
"""A part of a tensor's name -> what a file is that has one."""


def detect(parts: Parts, stored: Mapping[str, Stored], path: Path) -> str:
    """The family of a checkpoint: a key of TEXTS. Raises InputError for anything else, with what it is where that shows."""
    for mark, what in OTHERS.items():
        if any(mark in key for key in stored):
            raise InputError(f"{path} is {what}.")
    kind = next((kind for kind in ("unet", "sd3", "flux") if kind in parts), None)
    known = infer_diffusers_model_type(
        {f"model.diffusion_model.{k}": v for k, v in tensors_of(parts[kind] if kind else stored, None).items()}
    )
    if kind is None:
        if any(key.startswith(("down_blocks.", "encoder.down_blocks.", "transformer_blocks.", "single_transformer")) for key in stored):
            raise InputError(f"{path} is one model of a base in diffusers' layout: give the directory with model_index.json.")
        if parts:
            held = ", ".join(SPOKEN.get(part, part) for part in parts)
            raise InputError(f"{path} holds {held} alone, without a denoiser: give the base as --base, and this file as --parts.")
        raise InputError(
            f"{path} is no Stable Diffusion checkpoint and no Flux: {f'it is {known}' if known != 'v1' else 'it has none of their layers'}."
        )
    tensors = parts[kind]
    if kind == "unet":
        width = next((one.shape[-1] for key, one in tensors.items() if key.endswith("attn2.to_k.weight")), 0)
        channels = tensors["input_blocks.0.0.weight"].shape[1] if "input_blocks.0.0.weight" in tensors else 4
        if width == 1280:
            raise InputError(f"{path} is an SDXL refiner; only text-to-image bases are supported.")
        if width not in WIDTHS:
            raise InputError(f"{path} is no base that is known: its cross-attention reads {width} numbers a word.")
        refuse_channels(channels, 4, path)
        return WIDTHS[width]
    if kind == "sd3":
        refuse_channels(tensors["x_embedder.proj.weight"].shape[1] if "x_embedder.proj.weight" in tensors else 16, 16, path)
        return "sd3"
    if known in ("chroma", "flux-2-dev", "flux-3-image", "flux-3-image-distilled"):
        raise InputError(f"{path} is {known}; of these models Flux.1 is supported.")
    refuse_channels(tensors["img_in.weight"].shape[1] // 4 if "img_in.weight" in tensors else 16, 16, path)
    return "flux"


def refuse_channels(channels: int, latent: int, name: object) -> None:
    """Raises InputError for a denoiser that takes more than the latents of one picture (`latent` channels): no text-to-image base."""
    kinds = {
        2 * latent + 1: "an inpainting model",
        2 * latent: "a model for editing pictures",
        5: "a depth-to-image model",
        96: "Flux Fill",
    }
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
    with torch.device("meta"):
        if family in architectures.FAMILIES and family not in ("sd3", "flux"):
            published: dict[str, Any] = dict(models(family).items())
        else:
            tower = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
            published = {"transformer": transformer(family, parts[family]), "vae": architectures.autoencoder(family)}
            makers = {"clip_l": lambda: tower(architectures.clip_config("L")), "clip_g": lambda: tower(architectures.clip_config("bigG"))}
            makers["t5"] = lambda: text_reader(parts["t5"])
            published |= {name: makers[part]() for name, part in text_names(family).items() if part in parts}
    names = {"unet": "unet", "transformer": family, "vae": "vae", **text_names(family)}
    return {name: (names[name], model) for name, model in published.items() if names[name] in parts}


def text_names(family: str) -> dict[str, str]:
    """The pipeline's names of the text encoders -> theirs in a file."""
    return {f"text_encoder_{number}".removesuffix("_1"): part for number, part in enumerate(TEXTS[family], 1)}


def transformer(family: str, tensors: Mapping[str, Stored]) -> nn.Module:
    """The denoiser of SD 3 or Flux, of the sizes that its tensors have."""

    def blocks(name: str) -> int:
        return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})

    if family == "flux":
        return diffusers.FluxTransformer2DModel(
            num_layers=blocks("double_blocks"),
            num_single_layers=blocks("single_blocks"),
            guidance_embeds=any(key.startswith("guidance_in.") for key in tensors),
        )
    side = math.isqrt(tensors["pos_embed"].shape[1]) if "pos_embed" in tensors else 192
    dual = len({key.split(".")[1] for key in tensors if ".attn2." in key})
    return architectures.sd3_transformer(blocks("joint_blocks"), side, normed=any("ln_q" in key for key in tensors), dual=dual)


def text_reader(tensors: Mapping[str, Stored]) -> nn.Module:
    """T5, of the sizes that its tensors have."""

    def shape(end: str) -> tuple[int, ...]:
        return next((one.shape for key, one in tensors.items() if key.endswith(end)), (64, 64))

    layers = len({key.split(".")[2] for key in tensors if key.startswith("encoder.block.")})
    words, width = shape("shared.weight")
    return architectures.t5(words, width, shape("wi_0.weight")[0], layers, shape("relative_attention_bias.weight")[1])


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
    text = torch.zeros(1, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
    more = {}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]], dtype=unet.dtype)
        more = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled, dtype=unet.dtype), "time_ids": sizes}}
    with torch.no_grad():
        output: torch.Tensor = unet(noisy.to(unet.dtype), step, text, return_dict=False, **more)[0]
    return output.float()


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


def load_single_file(path: Path, dtype: torch.dtype, *, prediction: str = "auto", more: Sequence[Path] = ()) -> Any:
    """The pipeline of a checkpoint, on the CPU.

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
        if not predicts_noise(unet):
            said = "v_prediction" if family == "sd21" or predicts_velocity(unet) else "epsilon"
            say(f"{path.name} doesn't say what it predicts; its UNet seems to predict {said}. If pictures are noise, give --prediction.")
    if family == "flux":
        said = "dev" if loaded["transformer"].config.guidance_embeds else "schnell"
    if family == "sd21" and said == "epsilon":  # SD 2.x predicts noise at 512 pixels and velocity at 768
        loaded["unet"].register_to_config(sample_size=64)
    given = {**OPTIONS.get(family, {}), **given, **loaded, "scheduler": scheduler(family, said or "epsilon", zero_snr=zero_snr)}
    pipe: diffusers.DiffusionPipeline = PIPELINES[family](**given)
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


def components_of_directories(family: str, folders: Sequence[Path], dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders, tokenizers and autoencoder out of directories in diffusers' layout, by the pipeline's names; the first has precedence."""
    found: dict[str, Any] = {}
    for folder in folders:
        if (folder / "model_index.json").is_file():
            pipe = load_directory(folder, dtype, [PIPELINES[family].__name__], without=("unet", "transformer", "scheduler"))
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
    own = [str(folder) for folder in folders if any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json"))]
    try:
        return AutoTokenizer.from_pretrained((own or [T5_NAME])[0])
    except (OSError, ValueError) as error:
        if own:
            raise InputError(f"{own[0]} holds no tokenizer that can be opened: {error}") from error
        return None


def require(family: str, parts: Parts, given: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where an autoencoder or text encoder is missing. SD 3 runs without any two of its three text encoders."""
    lacking = [part for name, part in {"vae": "vae", **text_names(family)}.items() if part not in parts and name not in given]
    texts = TEXTS[family]
    if family == "sd3" and set(texts) - set(lacking):
        if absent := [SPOKEN[part] for part in lacking if part != "vae"]:
            say(f"{path.name} is opened without {' and '.join(absent)}, which it lacks. Give them as --parts to have them.")
        lacking = [part for part in lacking if part == "vae"]
    if lacking:
        what = ", ".join(SPOKEN[part] for part in lacking)
        raise InputError(
            f"{path} lacks {what}. Give files that hold them, or a directory of the same family in diffusers' layout, as --parts FILE ..."
        )
