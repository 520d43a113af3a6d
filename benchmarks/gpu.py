"""All benchmarks that need a CUDA GPU, in one command of under eight minutes: correctness first, then speed and memory.

    python benchmarks/gpu.py -o benchmarks/results/gpu.json

The models are full-size architectures in bf16 with random weights: trained ones can't be shipped, and time and memory don't depend on the weights'
values. Every row is compared with a peer in the same run: PEFT for training, diffusers' pipeline for image generation (see peers.py). Repeated
timings are reported as medians.
"""

from __future__ import annotations

import argparse
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
from peers import PROMPT, base, drawing, fresh, peft_steps, person, prediction, steps, timed, with_hypernetwork

from hyperdreambooth import replay
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.backbones import Backbone
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.lora import Hooks, LoraSet, merged
from hyperdreambooth.sampling import Prompts, sample
from hyperdreambooth.settings import GenerateConfig


def distance(found: LoraSet, wanted: LoraSet) -> float:
    """Relative distance of two sets of updates: the norm of their difference over the norm of `wanted`."""
    ours, theirs = (torch.cat([lora.delta().flatten().float() for lora in s.values()]) for s in (found, wanted))
    return ((ours - theirs).norm() / theirs.norm()).item()


def checks(backbone: Backbone) -> dict[str, Any]:
    """Compares results that must be equal: recorded and plain steps, merged and hooked updates, weights before and after sampling."""
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
    with torch.no_grad(), Hooks(backbone.components, mine) as hooks:  # one forward pass, so that rounding errors don't accumulate
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
    """Time and memory of a fine-tuning step: recorded as a CUDA graph, plain, and with PEFT."""
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
    """Seconds of the first three `personalize` calls of a process after loading; the prediction's time beside one forward pass."""
    fresh()
    photo = torch.zeros(1, 3, hdb.backbone.size, hdb.backbone.size)
    results: dict[str, Any] = {}
    for name in ("first", "second", "third"):
        seconds = timed(lambda: results.update(me=hdb.personalize(photo, steps=25, quiet=True)))
        results[f"personalize_{name}_s"] = round(seconds, 2)
        results[f"personalize_{name}_parts_s"] = {key: round(value, 2) for key, value in results.pop("me").seconds.items()}
    return {**results, **prediction(hdb)}


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
            except Exception as error:  # a failed part must not keep the other parts from running
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
