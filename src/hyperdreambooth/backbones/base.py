"""What the method needs to know of a diffusion model.

`components` is an `nn.ModuleDict` whose keys are the pipeline's own ("unet", "text_encoder", ...): module paths in it
are diffusers' LoRA keys, so one list of glob patterns names targets in any component of any pipeline.

The noise level `u` in [0, 1] is sigma / (alpha + sigma) of `alpha * latents + sigma * noise`: for flow matching it is the
time itself, for a discrete schedule the time step whose ratio comes nearest. It means the same for every family.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

Conditioning = dict[str, Tensor]
"""A prompt's embeddings as the denoiser takes them: every tensor is batch first."""


class Backbone(ABC):
    """A diffusion model: pictures to latents, prompts to conditioning, noise to a prediction. Its models are frozen and in eval mode.

    Here is what all families share. Each has its own prompts, its denoiser's arguments, and its way from pictures to noise.
    """

    family: str
    text_components: tuple[str, ...]
    default_targets: tuple[str, ...]
    denoiser_name: str
    needed: Sequence[str]
    """The components without which the family can't be used."""

    def __init__(self, pipe: Any):
        """Raises InputError where a component is absent that is needed."""
        lacking = [name for name in self.needed if getattr(pipe, name, None) is None]
        if lacking:
            raise InputError(f"this base has no {lacking[0]}, without which a {type(pipe).__name__} can't be used here.")
        pipe.set_progress_bar_config(disable=True)
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False).eval()
        # an autoencoder that overflows in fp16 says so
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        names = [name for name in (self.denoiser_name, *self.text_components) if getattr(pipe, name, None) is not None]
        self.pipe: Any = pipe
        self.components = nn.ModuleDict({name: getattr(pipe, name) for name in names})
        """The models that can carry a LoRA which other tools load."""
        self.denoiser: Any = self.components[self.denoiser_name]
        self.generation: dict[str, Any] = {}
        """Settings of generation that suit the family, by `GenerateConfig`'s names."""
        self.unit = int(pipe.vae_scale_factor)
        """Sides of pictures are multiples of this."""
        side = pipe.unet.config.sample_size if self.denoiser_name == "unet" else pipe.default_sample_size
        self.size = int(side * pipe.vae_scale_factor)
        """Side in pixels of the pictures that the base was made for."""

    @property
    def device(self) -> torch.device:
        found: torch.device = self.denoiser.device
        return found

    def enable_checkpointing(self) -> None:
        """Gradient checkpointing of the denoiser: activations are computed again in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of a picture's latents; by default of the base's own size."""
        factor = self.pipe.vae_scale_factor
        return int(self.pipe.vae.config.latent_channels), (height or self.size) // factor, (width or self.size) // factor

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 -> latents (B, C, h, w), scaled as the denoiser expects."""
        vae = self.pipe.vae
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        scaled: Tensor = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return scaled.to(self.denoiser.dtype)

    def decode_images(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) in -1..1."""
        vae = self.pipe.vae
        with torch.no_grad():
            pixels: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        return pixels.float().clamp(-1, 1)

    def chunks(self, prompts: list[str]) -> int:
        """How many chunks the longest of the prompts takes in the CLIP text encoders."""
        return max((ids.shape[1] for ids in self.tokenize(prompts).values() if ids.ndim == 3), default=1)

    @abstractmethod
    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        """Prompts -> what `encode_tokens` takes, on the device, batch first.

        CLIP reads long prompts in chunks; all get as many as the longest takes, but at least `chunks`.
        """

    @abstractmethod
    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Tokenized prompts -> conditioning, batch first; differentiable, for text encoders that carry a LoRA."""

    def encode_prompts(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        """Both: prompts -> conditioning."""
        return self.encode_tokens(self.tokenize(prompts, chunks))

    @abstractmethod
    def steps_for(self, levels: Tensor) -> Tensor:
        """Noise levels u (B,) in 0..1 -> the time steps (B,) that the denoiser takes."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict: noise, velocity or flow."""

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        """Sets a sampling scheduler's time steps for latents like `noise`."""
        schedule.set_timesteps(steps, device=noise.device, **more)

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, of the latents' shape."""

    def denoise(self, noisy: Tensor, *arguments: Any, **conditioning: Any) -> Tensor:
        """Runs the denoiser in its own precision (but for the time step, which bf16 would round); its output has that of `noisy`."""
        dtype = self.denoiser.dtype
        given = {key: value.to(dtype) if isinstance(value, Tensor) and key != "timestep" else value for key, value in conditioning.items()}
        output: Tensor = self.denoiser(noisy.to(dtype), *arguments, **given, return_dict=False)[0]
        return output.to(noisy.dtype)
