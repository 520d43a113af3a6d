"""Everything that a CUDA card is needed for, in one command of under eight minutes: correctness first, then speed and memory.

    python benchmarks/gpu.py -o benchmarks/results/gpu.json

Full-size architectures with random weights in bf16 (none can be shipped; time and memory don't depend on what weights say). Every row
stands beside its peer in the same run: PEFT for training, diffusers' own pipeline for drawing. Medians of what is given as `times`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
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
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.lora import Hooks, Lora, LoraSet, find_targets, merged
from hyperdreambooth.pretrained import HyperNetworkInfo, build
from hyperdreambooth.sampling import Prompts, sample
from hyperdreambooth.settings import GenerateConfig, PersonalizeConfig
from hyperdreambooth.stages.dreambooth import Subject, finish, personalize
from hyperdreambooth.training_settings import HyperNetworkConfig, LightweightConfig

PROMPT = "a ohwx face"
RANK = 4


def base(name: str, device: str = "cuda") -> Backbone:
    """A published architecture (sd15, sdxl) with random weights in bf16."""
    found = architectures.architecture(name, vae=True)
    torch.manual_seed(0)
    for model in found.values():
        model.to_empty(device=device).to(torch.bfloat16)
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.02) if key.endswith("weight") and tensor.ndim > 1 else tensor.fill_(float(key.endswith("weight")))
            else:
                tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
    models: dict[str, Any] = dict(found.items())
    models |= {"scheduler": architectures.scheduler(name, "epsilon", zero_snr=False), "tokenizer": clip.tokenizer()}
    if name == "sdxl":
        return wrap(diffusers.StableDiffusionXLPipeline(**models, tokenizer_2=clip.tokenizer("!")), name)
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return wrap(diffusers.StableDiffusionPipeline(**models, **none), name)


def with_hypernetwork(backbone: Backbone) -> HyperDreamBooth:
    """A hypernetwork of the size that suits such bases: a small DINOv2, four blocks of width 512, four passes; random weights."""
    targets = find_targets(backbone.components, backbone.default_targets)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=224)
    )
    source = build(targets, FaceEncoder(model, size=224), LightweightConfig(learnable=True), HyperNetworkConfig(512, 4, 8, 4))
    info = HyperNetworkInfo("random", {path: list(shape) for path, shape in targets.items()}, {}, {}, prompt="a [V] face")
    return HyperDreamBooth(backbone, "random", source.to(backbone.device).eval(), info)


def person(backbone: Backbone, seed: int = 0, batch: int | None = None) -> LoraSet:
    """Random updates of some size, of one person or a batch."""
    generator = torch.Generator(backbone.device).manual_seed(seed)
    lead = () if batch is None else (batch,)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=generator, device=backbone.device)

    shapes = find_targets(backbone.components, backbone.default_targets).items()
    return LoraSet({path: Lora(draw(RANK, s.inputs) / s.inputs**0.5, draw(s.outputs, RANK) * 0.05) for path, s in shapes})


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def fresh() -> None:
    replay.forget()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def steps(backbone: Backbone, copies: int, count: int, *, people: int = 1, off: bool = False) -> tuple[LoraSet, list[float], float]:
    """Fine-tunes `people` people from scratch: the updates, milliseconds of the steps after the first six, peak GB."""
    torch.cuda.reset_peak_memory_stats()
    latents = torch.randn(people, 1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(3)).to(backbone.device)
    moments: list[float] = []

    def on_step(done: int, loras: LoraSet) -> bool:
        torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return False

    start = person(backbone, batch=people).scaled(0.1)
    config = PersonalizeConfig(steps=count, copies=copies, rank=RANK, learning_rate=1e-4)
    with mock.patch.object(replay, "OFF", off):
        tuned, _ = personalize(backbone, Subject(latents, PROMPT), start, config, on_step=on_step, quiet=True)
    times = [1000 * (b - a) for a, b in itertools.pairwise(moments[6:])]
    return tuned, times, torch.cuda.max_memory_allocated() / 1e9


def peft_steps(backbone: Backbone, copies: int, count: int = 12) -> tuple[list[float], float]:
    """The same by PEFT, as diffusers' DreamBooth example trains a LoRA, with latents and prompts encoded once: milliseconds, peak GB."""
    torch.cuda.reset_peak_memory_stats()
    denoiser = backbone.denoiser
    targets = [path.partition(".")[2] for path in find_targets(backbone.components, backbone.default_targets)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), denoiser)
    cast_training_params([denoiser], torch.float32)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    latents = torch.randn(copies, *backbone.latent_shape(), device=backbone.device)
    with torch.no_grad():
        conditioning = backbone.encode_prompts([PROMPT] * copies)

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (copies,), device=backbone.device)
        with torch.autocast("cuda", torch.bfloat16):
            predicted = backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
        (predicted.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [1000 * timed(step) for _ in range(count)][4:]
    peak = torch.cuda.max_memory_allocated() / 1e9
    unwrap(denoiser)
    return times, peak


def unwrap(model: nn.Module) -> None:
    """Takes PEFT's layers out again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)


def distance(found: LoraSet, wanted: LoraSet) -> float:
    """Of two sets of updates: the norm of their difference over the norm."""
    ours, theirs = (torch.cat([lora.delta().flatten().float() for lora in s.values()]) for s in (found, wanted))
    return ((ours - theirs).norm() / theirs.norm()).item()


def checks(backbone: Backbone) -> dict[str, Any]:
    """What must be equal: recorded and plain steps, merged and hooked updates, weights before and after drawing."""
    results: dict[str, Any] = {}
    start = person(backbone, batch=1).scaled(0.1)
    fresh()
    plain, _, _ = steps(backbone, 2, 12, off=True)
    again, _, _ = steps(backbone, 2, 12, off=True)
    recorded, _, _ = steps(backbone, 2, 12)
    reused, _, _ = steps(backbone, 2, 12)
    change = distance(plain, start)
    results["trained_change"] = change
    results["plain_again_over_change"] = distance(again, plain) / change
    results["recorded_over_change"] = distance(recorded, plain) / change
    results["recording_reused_over_change"] = distance(reused, plain) / change
    before = {name: tensor.clone() for name, tensor in backbone.denoiser.state_dict().items()}
    mine = person(backbone, 1)
    with torch.no_grad():
        prompts = Prompts(backbone.encode_prompts([PROMPT]), backbone.encode_prompts([""]))
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(1)).to(backbone.device)
    settings = GenerateConfig(steps=8)
    latents = {}
    with mock.patch.object(replay, "OFF", True):
        latents["base"] = sample(backbone, prompts, noise, settings)
        latents["merged"] = sample(backbone, prompts, noise, settings, personal=mine)
        latents["hooked"] = sample(backbone, prompts, noise, settings, personal=LoraSet(mine.map(lambda t: t[None])))
    for name, update in (("merged_recorded", mine), ("hooked_recorded", LoraSet(mine.map(lambda t: t[None])))):
        sample(backbone, prompts, noise, settings, personal=person(backbone, 2) if name.startswith("m") else update.scaled(0.5))
        latents[name] = sample(backbone, prompts, noise, settings, personal=update)
    size = (latents["merged"] - latents["base"]).norm()
    for name, other in (("hooked", "merged"), ("merged_recorded", "merged"), ("hooked_recorded", "hooked")):
        results[f"{name}_over_effect"] = ((latents[name] - latents[other]).norm() / size).item()
    with torch.no_grad(), Hooks(backbone.components, mine) as hooks:  # one forward pass, where rounding can't add up
        arguments = noise, torch.full((1,), 500, device=noise.device), prompts.positive
        hooks.set(mine)
        hooked = backbone.predict(*arguments)
        hooks.clear()
        plain_output = backbone.predict(*arguments)
        with merged(backbone.components, mine):
            one = backbone.predict(*arguments)
    results["merged_forward_over_effect"] = ((one - hooked).norm() / (hooked - plain_output).norm()).item()
    results["weights_untouched"] = all(torch.equal(tensor, before[name]) for name, tensor in backbone.denoiser.state_dict().items())
    return results


def training(backbone: Backbone, copies: tuple[int, ...]) -> list[dict[str, Any]]:
    """A fine-tuning step: recorded, plain, and PEFT's."""
    rows = []
    for count in copies:
        fresh()
        _, plain, plain_gb = steps(backbone, count, 14, off=True)
        fresh()
        _, ours, ours_gb = steps(backbone, count, 20)
        fresh()
        peer, peer_gb = peft_steps(backbone, count)
        milliseconds = {name: round(statistics.median(times), 1) for name, times in (("ours", ours), ("plain", plain), ("peft", peer))}
        gigabytes = {"ours": round(ours_gb, 2), "plain": round(plain_gb, 2), "peft": round(peer_gb, 2)}
        row = {
            "copies": count,
            "ms": milliseconds,
            "gb": gigabytes,
            "ours_over_peft": round(milliseconds["ours"] / milliseconds["peft"], 3),
        }
        rows.append({**row, "memory_over_peft": round(ours_gb / peer_gb, 3)})
        print(rows[-1], flush=True)
    return rows


def people_side_by_side(backbone: Backbone, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        fresh()
        try:
            _, times, gb = steps(backbone, 1, 12, people=count)
        except torch.OutOfMemoryError:
            rows.append({"people": count, "out_of_memory": True})
            continue
        ms = statistics.median(times)
        rows.append({"people": count, "ms": round(ms, 1), "ms_a_person": round(ms / count, 2), "gb_a_person": round(gb / count, 2)})
        print(rows[-1], flush=True)
    return rows


def whole_commands(hdb: HyperDreamBooth) -> dict[str, Any]:
    """`personalize` after loading, first and second in a process; the prediction beside one forward pass."""
    fresh()
    photo = torch.zeros(1, 3, hdb.backbone.size, hdb.backbone.size)
    results: dict[str, Any] = {}
    for name in ("first", "second", "third"):
        seconds = timed(lambda: results.update(me=hdb.personalize(photo, steps=25, quiet=True)))
        results[f"personalize_{name}_s"] = round(seconds, 2)
        results[f"personalize_{name}_parts_s"] = {key: round(value, 2) for key, value in results.pop("me").seconds.items()}
    predict = statistics.median(timed(lambda: hdb.predict(photo)) for _ in range(5))
    noise = torch.randn(1, *hdb.backbone.latent_shape(), device=hdb.device)
    with torch.no_grad():
        conditioning = hdb.backbone.encode_prompts([PROMPT])
        arguments = noise, torch.full((1,), 500, device=hdb.device), conditioning
        forward = statistics.median(timed(lambda: hdb.backbone.predict(*arguments)) for _ in range(8))
    return {
        **results,
        "predict_ms": round(1000 * predict, 1),
        "forward_ms": round(1000 * forward, 1),
        "predict_over_forward": round(predict / forward, 2),
    }


def drawing(hdb: HyperDreamBooth, folder: Path) -> dict[str, Any]:
    """One picture of 25 steps with a person, beside diffusers' pipeline: bare, with its LoRA loaded, with its LoRA fused."""
    fresh()
    pipe, backbone = hdb.backbone.pipe, hdb.backbone
    me = hdb.person(finish(person(backbone, 1)))
    other = hdb.person(finish(person(backbone, 2)))
    file = me.save(folder / "me.safetensors", overwrite=True)
    settings = GenerateConfig(steps=25, guidance=5.0)

    def ours(who: Any) -> Callable[[], object]:
        return lambda: hdb.generate(PROMPT, who, config=settings)

    def theirs() -> object:
        return pipe(PROMPT, num_inference_steps=25, guidance_scale=5.0)

    results: dict[str, Any] = {"ours_first_s": timed(ours(me))}
    rounds: dict[str, list[float]] = {"ours_person": [], "ours_other_person": [], "ours_base": [], "diffusers": []}
    for _ in range(4):
        for name, work in (("ours_person", ours(me)), ("ours_other_person", ours(other)), ("ours_base", ours(None)), ("diffusers", theirs)):
            rounds[name].append(timed(work))
    results |= {f"{name}_s": statistics.median(times) for name, times in rounds.items()}
    with mock.patch.object(replay, "OFF", True):
        results["ours_person_plain_s"] = statistics.median(timed(ours(me)) for _ in range(3))
    switches, merges = [], []
    for _ in range(3):
        switches.append(timed(lambda: pipe.load_lora_weights(str(file), adapter_name="me")))
        loaded = timed(theirs)
        switches[-1] += timed(lambda: pipe.delete_adapters("me"))
    unwrap(backbone.denoiser)
    for _ in range(5):
        with torch.no_grad():
            started = time.perf_counter()
            with merged(backbone.components, me.loras):
                pass
            torch.cuda.synchronize()
            merges.append(time.perf_counter() - started)
    results |= {
        "diffusers_lora_loaded_s": loaded,
        "diffusers_switch_s": statistics.median(switches),
        "ours_switch_s": statistics.median(merges),
    }
    results["ours_over_diffusers"] = results["ours_person_s"] / results["diffusers_s"]
    results["switch_over_diffusers"] = results["ours_switch_s"] / results["diffusers_switch_s"]
    return {name: round(value, 4) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--bases", nargs="+", default=["sd15", "sdxl"], choices=["sd15", "sdxl"])
    parser.add_argument("--only", nargs="+", default=["checks", "commands", "drawing", "training", "people"])
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "device": torch.cuda.get_device_name(), "versions": versions}
    copies = {"sd15": (1, 4, 16), "sdxl": (1, 4)}
    for name in args.bases:
        fresh()
        backbone = base(name)
        hdb = with_hypernetwork(backbone)
        jobs: dict[str, Callable[[], Any]] = {
            "checks": lambda backbone=backbone: checks(backbone),
            "commands": lambda hdb=hdb: whole_commands(hdb),
            "drawing": lambda hdb=hdb: drawing(hdb, args.output.parent),
            "training": lambda backbone=backbone, name=name: training(backbone, copies[name]),
            "people": lambda backbone=backbone, name=name: people_side_by_side(backbone, (8, 32, 64) if name == "sd15" else (8,)),
        }
        for job in args.only:
            started = time.perf_counter()
            try:
                found = jobs[job]()
            except Exception as error:  # one part's failure must not cost the others their time on the card
                import traceback

                traceback.print_exc()
                found = {"error": str(error)}
            result.setdefault(name, {})[job] = found
            print(name, job, f"{time.perf_counter() - started:.0f} s", json.dumps(found), flush=True)
            write_json(args.output, result)
        del backbone, hdb, jobs
        fresh()
    print(args.output)


if __name__ == "__main__":
    main()
