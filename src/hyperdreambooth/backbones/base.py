"""What the method needs to know of a diffusion model, and how one is opened.

`components` is an `nn.ModuleDict` whose keys are the pipeline's own ("unet", "text_encoder", ...): module paths in it
are diffusers' LoRA keys, so one list of glob patterns names targets in any component of any pipeline.

The noise level `u` in [0, 1] is sigma / (alpha + sigma) of `alpha * latents + sigma * noise`: for flow matching it is the
time itself, for a discrete schedule the time step whose ratio comes nearest. It means the same for every family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError

Conditioning = dict[str, Tensor]
"""A prompt's embeddings as the denoiser takes them: every tensor is batch first."""


class Backbone(Protocol):
    """A diffusion model: pictures to latents, prompts to conditioning, noise to a prediction."""

    family: str
    pipe: Any
    components: nn.ModuleDict
    """The models that can carry a LoRA which other tools load."""
    denoiser: Any
    text_components: tuple[str, ...]
    default_targets: tuple[str, ...]
    generation: dict[str, Any]
    """Settings of generation that suit the family, by `GenerateConfig`'s names."""
    size: int
    """Side in pixels of the pictures that the base was made for."""
    unit: int
    """Sides of pictures are multiples of this."""

    @property
    def device(self) -> torch.device: ...

    def enable_checkpointing(self) -> None:
        """Gradient checkpointing of the denoiser: activations are computed again in the backward pass."""
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of a picture's latents; by default of the base's own size."""
        ...

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 -> latents (B, C, h, w), scaled as the denoiser expects."""
        ...

    def decode_images(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) in -1..1."""
        ...

    def tokenize(self, prompts: list[str]) -> Conditioning:
        """Prompts -> what `encode_tokens` takes, on the device, batch first."""
        ...

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Tokenized prompts -> conditioning, batch first; differentiable, for text encoders that carry a LoRA."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Both: prompts -> conditioning."""
        ...

    def steps_for(self, levels: Tensor) -> Tensor:
        """Noise levels u (B,) in 0..1 -> the time steps (B,) that the denoiser takes."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict: noise, velocity or flow."""
        ...

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor) -> None:
        """Sets a sampling scheduler's time steps for latents like `noise`."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, of the latents' shape."""
        ...


def load_backbone(base: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Opens a base: "toon" (shipped), a diffusers directory, a single .safetensors checkpoint of SD 1.x, SD 2.x or SDXL, or a hub id.

    What the pipeline is chooses the family.

    Raises InputError where it isn't a pipeline of a supported family.
    """
    import diffusers

    source = resolve_base(base)
    if Path(source).is_file():
        from .single_file import load_single_file

        return wrap(load_single_file(Path(source), dtype).to(device), source)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, **absent(source))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{base} can't be opened as a base: {str(error).splitlines()[0]} "
            'Give "toon", a directory in diffusers\' layout (with model_index.json), a .safetensors checkpoint, or a hub id.'
        ) from error
    return wrap(pipe.to(device), str(base))


def absent(source: str) -> dict[str, None]:
    """The text encoders that a directory was saved without (SD 3 runs without any two): diffusers wants to be told."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text(encoding="utf-8"))
    text = {name: kind for name, kind in parts.items() if name.startswith(("text_encoder", "tokenizer"))}
    return {name: None for name, kind in text.items() if kind == [None, None] or not (index.parent / name).is_dir()}


def wrap(pipe: Any, name: str) -> Backbone:
    """The backbone of a loaded pipeline. Raises InputError for another kind of pipeline."""
    from .flux import Flux
    from .sd import StableDiffusion
    from .sd3 import StableDiffusion3
    from .sdxl import StableDiffusionXL

    families: dict[str, Callable[[Any], Backbone]] = {
        "StableDiffusionPipeline": StableDiffusion,
        "StableDiffusionXLPipeline": StableDiffusionXL,
        "StableDiffusion3Pipeline": StableDiffusion3,
        "FluxPipeline": Flux,
    }
    kind = type(pipe).__name__
    if kind not in families:
        raise InputError(f"{name} is a {kind}; supported: {', '.join(families)}.")
    return families[kind](pipe)


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
