"""The interface through which the method uses a diffusion model, the same for every family.

`components` is an `nn.ModuleDict` whose keys are the pipeline's own ("unet", "text_encoder", ...): module paths in it
are diffusers' LoRA keys, so one list of glob patterns names targets in any component of any pipeline.

The noise level `u` in [0, 1] is sigma / (alpha + sigma) of `alpha * latents + sigma * noise`, and so means the same for every family.
For flow matching it is the time itself; with a discrete schedule it stands for the first time step whose ratio is at least `u`.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import say
from .architectures import PRESETS

Conditioning = dict[str, Tensor]
"""Prompts' embeddings (or token ids), by the denoiser's (or `Backbone.tokenize`'s) names. The first dimension is the batch."""
CLIP_LENGTH = 77
_say_once = functools.cache(say)


class Backbone(ABC):
    """A diffusion model: pictures to latents, prompts to conditioning, noise to a prediction. Its models are frozen and in eval mode.

    This class holds what all families share. A subclass adds how prompts are encoded, the denoiser's arguments, and the noise schedule.
    """

    family: str
    text_components: tuple[str, ...]
    denoiser_name: str
    needed: Sequence[str]
    """The components without which the family can't be used."""
    device_memory: Literal["auto", "low", "high"] = "auto"
    """low: the text encoders move to the CPU once prompts are encoded; auto: only if the device's memory is short; high: never."""

    def __init__(self, pipe: Any):
        """Raises InputError where a needed component is absent."""
        lacking = [name for name in self.needed if getattr(pipe, name, None) is None]
        if lacking:
            raise InputError(f"this base has no {lacking[0]}, without which a {type(pipe).__name__} can't be used here.")
        pipe.set_progress_bar_config(disable=True)
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False).eval()
        names = [name for name in (self.denoiser_name, *self.text_components) if getattr(pipe, name, None) is not None]
        self.pipe: Any = pipe
        self.vae_in_float32: bool = pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
        """Whether the autoencoder computes in float32, whatever its weights' precision: `force_upcast` marks one that overflows in fp16."""
        self.components = nn.ModuleDict({name: getattr(pipe, name) for name in names})
        """The models that can carry a LoRA which other tools load."""
        self.denoiser: Any = self.components[self.denoiser_name]
        self.default_targets = PRESETS[self.family]["attention+ff"]
        self.generation: dict[str, Any] = {}
        """Defaults of generation that suit the family, by `GenerateConfig`'s names."""
        self.unit = int(pipe.vae_scale_factor)
        """Height and width of pictures in pixels must be multiples of this."""
        side = pipe.unet.config.sample_size if self.denoiser_name == "unet" else pipe.default_sample_size
        self.size = int(side * pipe.vae_scale_factor)
        """Side in pixels of the pictures that the base was made for."""

    @property
    def name(self) -> str:
        """The last part of the path or hub id that the base was opened from; "" where it isn't known."""
        return Path(getattr(self.pipe, "name_or_path", None) or "").name

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.denoiser.device)

    @property
    def side_by_side(self) -> int:
        """How many people are fine-tuned in one batch, unless memory is short."""
        return 32 if self.device.type == "cuda" else 8

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The shape (C, h, w) of the latents of a picture of `height` x `width` pixels; by default of the base's own size."""
        factor = self.pipe.vae_scale_factor
        return int(self.pipe.vae.config.latent_channels), (height or self.size) // factor, (width or self.size) // factor

    @contextmanager
    def autoencoder(self) -> Iterator[Any]:
        """The pipeline's autoencoder, with `vae_in_float32` in float32 until the context closes, also after an error.

        Then its weights are the same tensors as before: the pipeline belongs to the user, whose own calls need them in their precision.
        """
        vae = self.pipe.vae
        tensors = [*vae.parameters(), *vae.buffers()] if self.vae_in_float32 else []
        weights = [tensor for tensor in tensors if tensor.is_floating_point()]
        originals = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data.float()
            yield vae
        finally:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 -> latents (B, C, h, w), scaled as the denoiser expects."""
        with torch.no_grad(), self.autoencoder() as vae:
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return cast(Tensor, (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).to(self.denoiser.dtype)

    def decode_images(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) in -1..1."""
        with torch.no_grad(), self.autoencoder() as vae:
            pixels: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        return pixels.float().clamp(-1, 1)

    def chunks(self, prompts: list[str]) -> int:
        """How many chunks of CLIP's length (see `clip_ids`) the longest of the prompts takes; 1 where CLIP reads only the first."""
        return max((ids.shape[1] for ids in self.tokenize(prompts).values() if ids.ndim == 3), default=1)

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        """Prompts -> the input of `encode_tokens`, on the device, batch first: "ids" of the first text encoder, "ids_2" of the second.

        CLIP reads long prompts in chunks; all prompts get as many as the longest takes, but at least `chunks`.
        """
        numbers = [name.removeprefix("text_encoder") for name in self.text_components]
        pairs = {f"ids{n}": (getattr(self.pipe, f"tokenizer{n}"), getattr(self.pipe, f"text_encoder{n}")) for n in numbers}
        return {ids: clip_ids(*pair, prompts, chunks).to(self.device) for ids, pair in pairs.items() if pair[0]}

    @abstractmethod
    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Tokenized prompts -> conditioning, batch first; differentiable, for text encoders that carry a LoRA."""

    def encode_prompts(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        """`tokenize`, then `encode_tokens`. The text encoders are on the device meanwhile; `device_memory` decides if they stay there."""
        self.move_text_encoders(self.device)
        found = self.encode_tokens(self.tokenize(prompts, chunks))
        if self.device_memory == "low" or (self.device_memory == "auto" and self.memory_is_short()):
            self.move_text_encoders(torch.device("cpu"))
        return found

    def move_text_encoders(self, device: torch.device) -> None:
        """Moves the text encoders to `device`. Their weights get new addresses: a CUDA graph that was recorded before is invalid."""
        for name, model in self.pipe.components.items():
            if name.startswith("text_encoder") and model is not None and model.device != device:
                model.to(device)
                torch.cuda.empty_cache()

    def memory_is_short(self) -> bool:
        """Whether a CUDA device has less free memory than the denoiser's weights take, which is about what a step needs in addition."""
        if self.device.type != "cuda":
            return False
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused < sum(weight.nbytes for weight in self.denoiser.parameters())

    @abstractmethod
    def steps_for(self, levels: Tensor) -> Tensor:
        """Noise levels u (B,) in 0..1 -> the time steps (B,) that the denoiser takes."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: latents (B, C, h, w) with noise at the time steps (B,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict: noise, velocity or flow."""

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        """Sets the time steps of a sampling scheduler, for latents of the shape and on the device of `noise`."""
        schedule.set_timesteps(steps, device=noise.device, **more)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, of the latents' shape."""
        return self.denoise(noisy, timestep=timesteps, **conditioning)

    def denoise(self, noisy: Tensor, **conditioning: Any) -> Tensor:
        """Runs the denoiser in its own dtype (except the time step, which bf16 would round); the output has the dtype of `noisy`."""
        dtype = self.denoiser.dtype
        given = {key: value.to(dtype) if isinstance(value, Tensor) and key != "timestep" else value for key, value in conditioning.items()}
        return cast(Tensor, self.denoiser(noisy.to(dtype), **given, return_dict=False)[0]).to(noisy.dtype)


def clip_ids(tokenizer: Any, encoder: Any, prompts: list[str], chunks: int) -> Tensor:
    """Token ids for CLIP, (B, chunks, 77): a long prompt in chunks of 75 tokens between start and end tokens, as A1111 and ComfyUI do.

    All prompts get as many chunks as the longest takes, but at least `chunks`. The tokenizer's or encoder's own limit replaces 77.
    """
    size = min(tokenizer.model_max_length, encoder.config.max_position_embeddings if encoder is not None else CLIP_LENGTH) - 2
    # the tokenizer would warn that its encoder can't read that many at once
    words = [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
    chunks = max(chunks, *(math.ceil(len(ids) / size) for ids in words))
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = [[ids[size * i : size * (i + 1)] for i in range(chunks)] for ids in words]
    return torch.tensor([[[start, *part, end, *[pad] * (size - len(part))] for part in row] for row in parts])


def t5_ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Token ids for T5, padded or cut to `length`: (B, length). Text that is cut off is reported, once."""
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
            _say_once(f"the prompt is too long for T5, which reads {length} tokens of {len(ids)}. Lost there: {lost}")
    return cast(Tensor, tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids)


def by_chunk(ids: Tensor) -> Tensor:
    """Token ids (B, chunks, 77) as a batch for CLIP, (chunks * B, 77): the first chunks of all prompts, then the second ones, and so on.

    In this order a batch of LoRA updates, which `Lora.added` tiles over the samples, gives every chunk the update of its prompt's person.
    """
    return ids.transpose(0, 1).flatten(0, 1)


def joined(hidden: Tensor, ids: Tensor) -> Tensor:
    """Hidden states (chunks * B, 77, width) of `by_chunk(ids)`, concatenated along each prompt's sequence: (B, chunks * 77, width)."""
    return hidden.unflatten(0, (ids.shape[1], ids.shape[0])).transpose(0, 1).flatten(1, 2)


def clip_embeddings(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's penultimate hidden states (B, chunks * 77, width), as SDXL and SD 3 use them, and the first chunk's projected pooled text."""
    output = encoder(by_chunk(ids), output_hidden_states=True)
    return joined(output.hidden_states[-2], ids), output[0][: len(ids)]
