"""Shared code of the GPU and CPU speed benchmarks: base models with random weights, this library's tasks, and the same tasks in peer libraries.

The peers follow their own examples, with latents and prompts encoded once: PEFT trains like diffusers' DreamBooth LoRA example, and diffusers'
pipeline generates with its LoRA loaded. Times are measured by `timed` in seconds; it synchronizes with the GPU if there is one.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hyperdreambooth import replay
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.assets import clip
from hyperdreambooth.backbones import Backbone, architectures, wrap
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.lora import Lora, LoraSet, find_targets, merged
from hyperdreambooth.pretrained import HyperNetworkInfo, build
from hyperdreambooth.settings import GenerateConfig, PersonalizeConfig
from hyperdreambooth.stages.dreambooth import Subject, finish, personalize
from hyperdreambooth.training_settings import HyperNetworkConfig, LightweightConfig

PROMPT = "a ohwx face"
RANK = 4


def published(name: str) -> dict[str, nn.Module]:
    """The models of sd15 or sdxl on the meta device. "mid" is SD 1.5 at half its width, for pictures of 128 x 128 pixels."""
    if name != "mid":
        return dict(architectures.architecture(name, vae=True).items())
    with torch.device("meta"):
        sizes = {"sample_size": 16, "block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 768, "attention_head_dim": 8}
        narrow = {
            **architectures.BASES["autoencoder"],
            **architectures.BASES["autoencoders"]["sd"],
            "block_out_channels": (32, 64, 128, 128),
        }
        text = architectures.clip_tower("clip_l", "sd")
        return {"unet": diffusers.UNet2DConditionModel(**sizes), "vae": diffusers.AutoencoderKL(**narrow), "text_encoder": text}


def base(name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Backbone:
    """The base sd15, sdxl or mid with random weights."""
    models: dict[str, Any] = published(name)
    torch.manual_seed(0)
    for model in models.values():
        model.to_empty(device=device).to(dtype)
        # also fills buffers that aren't in the state dict, such as a text encoder's position ids
        for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            tensor = tensor.detach()
            if tensor.is_floating_point():
                tensor.normal_(std=0.02) if key.endswith("weight") and tensor.ndim > 1 else tensor.fill_(float(key.endswith("weight")))
            else:
                tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
    kind = "sdxl" if name == "sdxl" else "sd15"
    models |= {"scheduler": architectures.scheduler(kind, "epsilon", zero_snr=False), "tokenizer": clip.tokenizer()}
    if name == "sdxl":
        return wrap(diffusers.StableDiffusionXLPipeline(**models, tokenizer_2=clip.tokenizer("!")), name)
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return wrap(diffusers.StableDiffusionPipeline(**models, **none), name)


def with_hypernetwork(backbone: Backbone) -> HyperDreamBooth:
    """The base with a random hypernetwork of a suitable size: the encoder is a DINOv2 small; the decoder has four blocks of width 512, four passes."""
    targets = find_targets(backbone.components, backbone.default_targets)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=224)
    )
    source = build(targets, FaceEncoder(model, size=224), LightweightConfig(learnable=True), HyperNetworkConfig(512, 4, 8, 4))
    info = HyperNetworkInfo("random", {path: list(shape) for path, shape in targets.items()}, {}, {}, prompt="a [V] face")
    return HyperDreamBooth(backbone, "random", source.to(backbone.device).eval(), info)


def person(backbone: Backbone, seed: int = 0, batch: int | None = None, patterns: tuple[str, ...] = ()) -> LoraSet:
    """Random updates for one person or a batch, for the base's default layers or those that match `patterns`."""
    generator = torch.Generator(backbone.device).manual_seed(seed)
    lead = () if batch is None else (batch,)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=generator, device=backbone.device)

    shapes = find_targets(backbone.components, patterns or backbone.default_targets).items()
    return LoraSet({path: Lora(draw(RANK, s.inputs) / s.inputs**0.5, draw(s.outputs, RANK) * 0.05) for path, s in shapes})


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def fresh() -> None:
    """Discards recorded CUDA graphs, frees cached GPU memory, and resets the peak memory counter."""
    replay.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes() -> float:
    """Peak GPU memory in GB that was allocated since `fresh`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def steps(
    backbone: Backbone,
    copies: int,
    count: int,
    *,
    people: int = 1,
    off: bool = False,
    first: int = 6,
    side: int = 0,
    patterns: tuple[str, ...] = (),
) -> tuple[LoraSet, list[float], float]:
    """Fine-tunes random updates of `people` people; returns the updates, milliseconds of each step after the first few, and peak GB.

    Args:
        copies: noised copies of each photo in a step.
        count: number of steps.
        off: whether steps run without recorded CUDA graphs.
        first: index of the step after which timing starts.
        side: side of the latents; 0: the base's default.
        patterns: patterns of the trained layers; none: the base's default layers.
    """
    channels, height, width = backbone.latent_shape()
    shape = people, 1, channels, side or height, side or width
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(backbone.device)
    moments: list[float] = []

    def on_step(done: int, loras: LoraSet) -> bool:
        wait()
        moments.append(time.perf_counter())
        return False

    start = person(backbone, batch=people, patterns=patterns).scaled(0.1)
    config = PersonalizeConfig(steps=count, copies=copies, rank=RANK, learning_rate=1e-4)
    with mock.patch.object(replay, "OFF", off):
        tuned, _ = personalize(backbone, Subject(latents, PROMPT), start, config, on_step=on_step, quiet=True)
    return tuned, [1000 * (b - a) for a, b in itertools.pairwise(moments[first:])], gigabytes()


def peft_steps(backbone: Backbone, copies: int, count: int = 12, *, first: int = 4) -> tuple[list[float], float]:
    """Trains with PEFT like diffusers' DreamBooth LoRA example, with latents and prompts encoded once; returns milliseconds and peak GB."""
    denoiser, on_gpu = backbone.denoiser, backbone.device.type == "cuda"
    targets = [path.partition(".")[2] for path in find_targets(backbone.components, backbone.default_targets)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), denoiser)
    cast_training_params([denoiser], torch.float32)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=on_gpu)
    latents = torch.randn(copies, *backbone.latent_shape(), device=backbone.device)
    with torch.no_grad():
        conditioning = backbone.encode_prompts([PROMPT] * copies)

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (copies,), device=backbone.device)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            predicted = backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
        (predicted.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [1000 * timed(step) for _ in range(count)][first:]
    peak = gigabytes()
    unwrap(denoiser)
    return times, peak


def unwrap(model: nn.Module) -> None:
    """Removes PEFT's adapter layers from a model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)


def prediction(hdb: HyperDreamBooth) -> dict[str, float]:
    """Time of predicting a LoRA from a photo, beside one forward pass of the denoiser."""
    photo = torch.zeros(1, 3, hdb.backbone.size, hdb.backbone.size)
    noise = torch.randn(1, *hdb.backbone.latent_shape(), device=hdb.device)
    times: tuple[list[float], list[float]] = [], []
    with torch.no_grad():
        arguments = noise, torch.full((1,), 500, device=hdb.device), hdb.backbone.encode_prompts([PROMPT])
        for _ in range(8):
            times[0].append(timed(lambda: hdb.predict(photo)))
            times[1].append(timed(lambda: hdb.backbone.predict(*arguments)))
    predict, forward = (statistics.median(some[2:]) for some in times)
    return {
        "predict_ms": round(1000 * predict, 1),
        "forward_ms": round(1000 * forward, 1),
        "predict_over_forward": round(predict / forward, 2),
    }


def drawing(hdb: HyperDreamBooth, folder: Path, *, steps: int = 25, rounds: int = 4) -> dict[str, Any]:
    """Times generating one picture of a person, beside diffusers' pipeline without and with a LoRA; and the switch from one person to another."""
    fresh()
    pipe, backbone = hdb.backbone.pipe, hdb.backbone
    me, other = (hdb.person(finish(person(backbone, seed))) for seed in (1, 2))
    file = me.save(folder / "me.safetensors", overwrite=True)
    # plain classifier-free guidance, as in diffusers
    settings, prompt = GenerateConfig(steps=steps, guidance=5.0), hdb.prompt.replace("[V]", hdb.identifier)

    def ours(who: Any) -> Callable[[], object]:
        return lambda: hdb.generate(prompt, who, config=settings)

    def theirs() -> object:
        return pipe(prompt, num_inference_steps=steps, guidance_scale=5.0)

    diffusers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = {"ours_first_s": timed(ours(me))}
    works = {"ours_person": ours(me), "ours_other_person": ours(other), "ours_base": ours(None), "diffusers": theirs}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(timed(work))
    results |= {f"{name}_s": statistics.median(times) for name, times in taken.items()}
    results["ours_over_diffusers"] = statistics.median(a / b for a, b in zip(taken["ours_person"], taken["diffusers"], strict=True))
    if backbone.device.type == "cuda":
        with mock.patch.object(replay, "OFF", True):
            results["ours_person_plain_s"] = statistics.median(timed(ours(me)) for _ in range(3))
    switches, merges, loaded = [], [], 0.0
    for turn in range(rounds + 1):
        switches.append(timed(lambda: pipe.load_lora_weights(str(file), adapter_name="me")))
        loaded = timed(theirs) if turn == rounds else loaded
        switches[-1] += timed(lambda: pipe.delete_adapters("me"))
        unwrap(backbone.denoiser)

        def switch() -> None:
            with torch.no_grad(), merged(backbone.components, me.loras):
                pass

        merges.append(timed(switch))
    results |= {"diffusers_lora_loaded_s": loaded, "diffusers_switch_s": statistics.median(switches)}
    results |= {"ours_switch_s": statistics.median(merges)}
    results["switch_over_diffusers"] = results["ours_switch_s"] / results["diffusers_switch_s"]
    return {name: round(value, 4) for name, value in results.items()}
