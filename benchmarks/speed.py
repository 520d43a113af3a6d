"""Speed and memory, each against a named peer in the same run (machines are noisy: read the ratios).

    python benchmarks/speed.py -o benchmarks/results/speed.json

hooks      forward + backward of the toon UNet at batch 8 with per-sample LoRAs on hooks, over PEFT's one trainable LoRA
personalize seconds and peak memory of `hyperdreambooth personalize` in a fresh process, over importing the libraries and
           loading the base alone
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model

from hyperdreambooth.assets import toon
from hyperdreambooth.backbones import load_backbone
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.lora import applied, find_targets
from hyperdreambooth.trainable_lora import IdentityTable, LightweightLora
from hyperdreambooth.training_settings import LightweightConfig


def medians(*runs: Callable[[], object], repeats: int = 15) -> list[float]:
    """Median seconds of each, taken in turns, so that a noisy moment hits all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            if repeat >= 2:
                times[index].append(time.perf_counter() - started)
    return [statistics.median(t) for t in times]


def hooks(batch: int = 8) -> dict[str, float]:
    """Forward + backward: per-sample tokens on hooks, one PEFT LoRA on the same layers, and the bare UNet."""
    backbone = load_backbone("toon")
    targets = find_targets(backbone.components, backbone.default_targets)
    table = IdentityTable(batch, LightweightLora(targets, LightweightConfig(down_dim=64, up_dim=32)))
    plain = copy.deepcopy(backbone.components["unet"])
    peer = copy.deepcopy(plain)
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=[path.removeprefix("unet.") for path in targets]), peer)
    noisy = torch.randn(batch, *backbone.latent_shape())
    steps = torch.full((batch,), 500)
    prompts = {key: value.detach() for key, value in backbone.encode_prompts(["a [V] face"] * batch).items()}
    rows = torch.arange(batch)
    leaf = noisy.clone().requires_grad_()

    def ours() -> None:
        with applied(backbone.components, table(rows)):
            backbone.predict(noisy, steps, prompts).square().mean().backward()

    def peft() -> None:
        peer(noisy, steps, **prompts).sample.square().mean().backward()

    def bare() -> None:
        plain(leaf, steps, **prompts).sample.square().mean().backward()

    a, b, c = medians(ours, peft, bare)
    return {"per_sample_hooks_ms": 1000 * a, "peft_ms": 1000 * b, "bare_ms": 1000 * c, "hooks_over_peft": a / b, "hooks_over_bare": a / c}


CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from hyperdreambooth.cli import main
code = main(sys.argv[1:])
try:  # getrusage would count what the parent had at the fork
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak}))
sys.exit(code)
"""


def personalize() -> dict[str, float]:
    """The command in a fresh process, beside one that only loads the base (`targets`)."""
    face = toon.directory("faces") / "face-01.png"
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in (
            ("load", ["targets", "toon", "--json"]),
            ("personalize", ["personalize", str(face), "-o", f"{folder}/me.safetensors"]),
        ):
            done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True, env=os.environ)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            figures[f"{name}_seconds"], figures[f"{name}_peak_mb"] = found["seconds"], found["peak_mb"]
        figures["seconds_over_loading"] = figures["personalize_seconds"] / figures["load_seconds"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/speed.json"))
    args = parser.parse_args()
    results = {
        "command": "python benchmarks/speed.py",
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "hooks": {key: round(value, 3) for key, value in hooks().items()},
        "personalize": {key: round(value, 2) for key, value in personalize().items()},
    }
    write_json(args.output, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
