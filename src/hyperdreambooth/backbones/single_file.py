"""A Stable Diffusion in one `.safetensors` file (SD 1.x, SD 2.x, SDXL), opened without a hub.

diffusers converts such files, given the configs. Those follow from the published architectures here, and the tokenizer
from CLIP's vocabulary. What the file is, and whether it is whole, is read off its header before anything is loaded.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from torch import nn

from ..assets import clip
from ..errors import InputError
from .architectures import architecture
from .original_layout import UNET, original_name

Shapes = dict[str, tuple[int, ...]]
PIPELINES = {"sd15": "StableDiffusionPipeline", "sd21": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
# the width of what the cross-attention reads tells the families apart
PROBES = {f"{UNET}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight" for block in (1, 4)}
WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Names and shapes of a file's tensors, and its metadata. Raises InputError where it isn't whole safetensors."""
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: only .safetensors checkpoints are opened (a pickle, as in .ckpt, .pt and .bin, can run any code when it is read). Convert it first."
        )
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}). Was it cut off while copying?") from error


def detect(shapes: Shapes, path: Path) -> str:
    """The architecture of a checkpoint: sd15, sd21 or sdxl. Raises InputError for anything else, with what it is where that shows."""
    if any("lora" in key for key in shapes):
        raise InputError(f"{path} is a LoRA, not a base: give it as --lora or --style, and the base that it was made for as --base.")
    known = {
        "joint_blocks.": "a Stable Diffusion 3",
        "double_blocks.": "a Flux",
    }
    for part, name in known.items():
        if any(part in key for key in shapes):
            raise InputError(
                f"{path} is {name}: single files are opened for SD 1.x, SD 2.x and SDXL. Give a directory in diffusers' layout."
            )
    if any(key.startswith(("down_blocks.", "encoder.down_blocks.", "transformer_blocks.")) for key in shapes):
        raise InputError(f"{path} is one model of a base in diffusers' layout: give the directory with model_index.json.")
    width = next((shapes[key][-1] for key in PROBES if key in shapes), None)
    if width is None:
        raise InputError(f"{path} is no Stable Diffusion checkpoint: it has no {min(PROBES)}.")
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1]
    if width not in WIDTHS or channels != 4:
        what = "an SDXL refiner" if width == 1280 else f"a model of {channels} input channels (for inpainting or editing)"
        raise InputError(f"{path} is {what}; only text-to-image bases are supported.")
    return WIDTHS[width]


def models(family: str) -> nn.ModuleDict:
    """A pipeline's models on the meta device."""
    found = architecture(family)
    with torch.device("meta"):
        found["vae"] = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=1024 if family == "sdxl" else 512,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        )
    return found


def check(shapes: Shapes, found: nn.ModuleDict, path: Path) -> None:
    """Raises InputError unless the file has every layer of the models, in the same size."""
    xl = "text_encoder_2" in found
    for component, model in found.items():
        missing = []
        for name, tensor in model.state_dict().items():
            key = original_name(component, name, model.config, xl=xl)
            size = tensor.numel() * (3 if "in_proj_" in key else 1)
            if key not in shapes:
                missing.append(key)
            elif math.prod(shapes[key]) != size:
                raise InputError(f"{path}: {key} is of shape {shapes[key]}, which no base of this kind has.")
        if missing:
            raise InputError(
                f"{path} lacks {len(missing)} layers of its {component}, the first of them {missing[0]}. Is it a pruned or partial file? Give a full checkpoint."
            )


def scheduler(family: str, prediction: str, *, zero_snr: bool) -> Any:
    """The scheduler that a family was published with."""
    if family == "sdxl":
        spacing = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True} if zero_snr else {"timestep_spacing": "leading"}
        return diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction, **spacing)
    if prediction == "v_prediction":
        return diffusers.DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    return diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)


def predicts_noise(unet: Any) -> bool:
    """Whether a UNet predicts noise rather than velocity, which an SD 2.x file doesn't say.

    At the last step a picture is nearly all noise: the best guess of the noise is the input itself, while the best guess of
    the velocity, alpha * noise - sigma * picture, has little to do with it.
    """
    noisy = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
    text = torch.zeros(1, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
    with torch.no_grad():
        output = unet(noisy, 999, text, return_dict=False)[0]
    correlation = torch.corrcoef(torch.stack([noisy.float().flatten(), output.float().flatten()]))[0, 1]
    return bool(correlation > 0.5)


def load_single_file(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a checkpoint, on the CPU.

    Prediction: the header's `modelspec.prediction_type`, else a tensor `v_pred` (and `ztsnr`), as SDXL files mark it, else noise; SD
    2.x is asked. Raises InputError where the file can't be used.
    """
    shapes, header = read_header(path)
    family = detect(shapes, path)
    found = models(family)
    check(shapes, found, path)
    velocity = header.get("modelspec.prediction_type", "v" if "v_pred" in shapes else "").startswith("v")
    parts = {"scheduler": scheduler(family, "v_prediction" if velocity else "epsilon", zero_snr="ztsnr" in shapes)}
    parts["tokenizer"] = clip.tokenizer() if family != "sd21" else clip.tokenizer("!")
    if family == "sdxl":
        parts["tokenizer_2"] = clip.tokenizer("!")
    index = {name: ["diffusers" if name in ("unet", "vae") else "transformers", type(model).__name__] for name, model in found.items()}
    index |= {name: ["diffusers" if name == "scheduler" else "transformers", type(part).__name__] for name, part in parts.items()}
    kind = getattr(diffusers, PIPELINES[family])
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder), found, {"_class_name": kind.__name__, **index})
        unsafe = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
        pipe = kind.from_single_file(str(path), config=folder, dtype=dtype, local_files_only=True, **parts, **unsafe)
    pipe.register_to_config(_name_or_path=str(path))
    if family == "sd21" and not velocity:
        if "modelspec.prediction_type" not in header and not predicts_noise(pipe.unet):
            pipe.scheduler = scheduler(family, "v_prediction", zero_snr=False)
        else:  # SD 2.x predicts noise at 512 pixels and velocity at 768
            pipe.unet.register_to_config(sample_size=64)
    return pipe


def write_configs(folder: Path, found: nn.ModuleDict, index: dict[str, Any]) -> None:
    """The configs of a pipeline, as diffusers lays them out."""
    if index["_class_name"] == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    model: Any
    for name, model in found.items():
        save = model.save_config if hasattr(model, "save_config") else model.config.save_pretrained
        save(str(folder / name))
