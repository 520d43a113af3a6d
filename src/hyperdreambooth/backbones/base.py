"""What the method needs to know of a diffusion model.

`components` is an `nn.ModuleDict` whose keys are the pipeline's own ("unet", "text_encoder", ...): module paths in it
are diffusers' LoRA keys, so one list of glob patterns names targets in any component of any pipeline.

The noise level `u` in [0, 1] is sigma / (alpha + sigma) of `alpha * latents + sigma * noise`: for flow matching it is the
time itself, for a discrete schedule the time step whose ratio comes nearest. It means the same for every family.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

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

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        """Prompts -> what `encode_tokens` takes, on the device, batch first.

        CLIP reads long prompts in chunks; all get as many as the longest takes, but at least `chunks`.
        """
        ...

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Tokenized prompts -> conditioning, batch first; differentiable, for text encoders that carry a LoRA."""
        ...

    def encode_prompts(self, prompts: list[str], chunks: int = 1) -> Conditioning:
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
