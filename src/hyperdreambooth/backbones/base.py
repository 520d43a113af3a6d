"""What the method needs to know of a diffusion model, and how one is opened.

`components` is an `nn.ModuleDict` whose keys are the pipeline's own ("unet", "text_encoder", ...): module paths in it
are diffusers' LoRA keys, so one list of glob patterns names targets in any component of any pipeline.

The noise level `u` in [0, 1] is sigma / (alpha + sigma) of `alpha * latents + sigma * noise`: for flow matching it is the
time itself, for a discrete schedule the time step whose ratio comes nearest. It means the same for every family.
"""

from __future__ import annotations

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
    text_components: tuple[str, ...]
    default_targets: tuple[str, ...]
    size: int

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

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts -> conditioning, batch first; differentiable where a text encoder carries a LoRA."""
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

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, of the latents' shape."""
        ...


def load_backbone(base: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Opens a base: "toon" (shipped), a diffusers directory, or a hub id.

    Raises InputError where it isn't a pipeline of a supported family.
    """
    import diffusers

    from .sd import StableDiffusion

    source = resolve_base(base)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{base} can't be opened as a base: {str(error).splitlines()[0]} "
            'Give "toon", a directory in diffusers\' layout (with model_index.json), or a hub id.'
        ) from error
    if not isinstance(pipe, diffusers.StableDiffusionPipeline):
        raise InputError(f"{base} is a {type(pipe).__name__}; supported: StableDiffusionPipeline (SD 1.x and 2.x).")
    return StableDiffusion(pipe.to(device))


def resolve_base(base: str | Path) -> str:
    """The directory of a shipped base, or `base` as given."""
    from ..assets import toon

    if str(base) == "toon":
        return str(toon.directory("base"))
    path = Path(base)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise InputError(f"{base} has no model_index.json, so it isn't a base in diffusers' layout.")
    return str(base)
