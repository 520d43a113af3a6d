"""Seconds and peak memory of `personalize` on a CPU with a full-size Stable Diffusion 1.5 (random weights, as trained ones can't be shipped).

    python -m benchmarks.full_size -o benchmarks/results/full-size.json

The base is written twice, as a diffusers directory and as a single-file checkpoint (2 GB each, deleted at the end). Each is opened in a
separate process, so that the peak memory is that of loading, training and export only. Training takes two steps at 512 x 512 without a hypernetwork,
in float32 with gradient checkpointing: each step has four noised copies of the photo for the directory (the default), and one for the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 2
COPIES = {"directory": 4, "model.safetensors": 1}


def write_base(folder: Path) -> None:
    """SD 1.5's architecture with random weights in fp16: `folder`/directory and `folder`/model.safetensors."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.original_layout import original_name
    from hyperdreambooth.assets import clip
    from hyperdreambooth.backbones import architectures

    torch.manual_seed(0)
    found = architectures.architecture("sd15", vae=True)
    tensors = {}
    for component, model in found.items():
        # models are built on the meta device; normal weights of small deviation keep every layer's output finite
        model.to_empty(device="cpu").half()
        for name, tensor in model.state_dict().items():
            tensor.copy_(
                torch.randn(tensor.shape) * 0.02 if name.endswith("weight") and tensor.ndim > 1 else torch.tensor(name.endswith("weight"))
            )
            key = original_name(component, name, model.config, xl=False)
            matrix = component == "vae" and ".attn_1." in key and tensor.ndim == 2  # a 1 x 1 convolution in the file
            tensors[key] = tensor[..., None, None] if matrix else tensor
    save_file(tensors, folder / "model.safetensors")
    models: dict[str, Any] = dict(found.items())
    scheduler = architectures.scheduler("sd15", "epsilon", zero_snr=False)
    pipe = diffusers.StableDiffusionPipeline(
        **models,
        tokenizer=clip.tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "directory")


def measure(base: str, output: Path) -> dict[str, float]:
    """Measures `hyperdreambooth personalize photo --base BASE --hypernetwork none --steps 2 --gradient-checkpointing`, except the preview."""
    from hyperdreambooth import HyperDreamBooth
    from hyperdreambooth.assets import toon

    started = time.perf_counter()
    hdb = HyperDreamBooth.from_pretrained(base, hypernetwork="none", device="cpu")
    hdb.backbone.denoiser.enable_gradient_checkpointing()
    loaded = time.perf_counter()
    copies = COPIES[Path(base).name]
    me = hdb.personalize(sorted(toon.directory("faces").glob("*.png"))[0], steps=STEPS, copies=copies)
    me.save(output, overwrite=True)
    return {
        "copies": copies,
        "load_seconds": round(loaded - started, 1),
        "seconds_a_step": round(me.seconds["finetune"] / STEPS, 1),
        "export_seconds": round(me.seconds["export"], 1),
        "all_seconds": round(time.perf_counter() - started, 1),
        "all_cpu_seconds": round(time.process_time(), 1),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "layers": len(me.loras),
        "lora_bytes": output.stat().st_size,
    }


def same_weights(folder: Path) -> bool:
    """Whether both forms of the base load with identical weights."""
    import torch

    from hyperdreambooth.backbones import load_backbone

    one, other = (load_backbone(folder / name, dtype=torch.float16, prediction="epsilon") for name in COPIES)
    models = [({**base.components, "vae": base.pipe.vae}) for base in (one, other)]
    return all(
        torch.equal(tensor, models[1][component].state_dict()[name])
        for component, model in models[0].items()
        for name, tensor in model.state_dict().items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="the JSON file to write")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_base(args.make)
        return
    if args.compare:
        print(json.dumps(same_weights(args.compare)))
        return
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.measure, Path(folder) / "me.safetensors")))
        return
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__]
        subprocess.run([*again, "--make", folder], check=True)
        rows = {}
        for name in COPIES:
            found = subprocess.run([*again, "--measure", str(Path(folder) / name)], check=True, stdout=subprocess.PIPE, text=True)
            rows[name] = json.loads(found.stdout.splitlines()[-1])
            print(name, rows[name])
        compared = subprocess.run([*again, "--compare", folder], check=True, stdout=subprocess.PIPE, text=True)
        same = json.loads(compared.stdout.splitlines()[-1])
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    about = {"base": "SD 1.5, random weights", "steps": STEPS, "side": 512, "dtype": "float32", "threads": threads}
    result = {**about, "machine": platform.machine(), "same_weights": same, "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(args.output)


if __name__ == "__main__":
    main()
