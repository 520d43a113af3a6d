"""Sizes of each model family's tokens and LoRA files, and the tables of docs/backbones.md.

python benchmarks/families.py            measures the sizes, runs all five stages on each family's tiny model, writes results and tables
python benchmarks/families.py --tables   only writes the tables, from the stored results in benchmarks/results
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import T5Config, T5EncoderModel

from hyperdreambooth import formats
from hyperdreambooth.backbones.architectures import FAMILIES, PRESETS, architecture
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.lora import Lora, LoraSet, Shape, find_targets
from hyperdreambooth.training_settings import LightweightConfig

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs/backbones.md"
# for each architecture, the tiny model of tests/families.py on which the five stages are tested
TINY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "sd3": "sd3", "sd35-medium": "sd3.5", "sd35-large": "sd3.5", "flux": "flux-dev"}


def lora_bytes(shapes: dict[str, Shape], rank: int) -> int:
    """Size in bytes of a LoRA file as the library writes it: fp16, in diffusers' layout."""
    loras = LoraSet({path: Lora(torch.zeros(rank, s.inputs), torch.zeros(s.outputs, rank)) for path, s in shapes.items()})
    with tempfile.TemporaryDirectory() as folder:
        return formats.save_lora(Path(folder) / "lora.safetensors", loras, {}).stat().st_size


def stages_tested() -> dict[str, str]:
    """Runs the test of all five stages on every tiny model: name -> passed or failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "tests/test_backbones.py", "-q", "-k", "test_all_five_stages", f"--junitxml={report}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {case.attrib["name"].split("[")[1].rstrip("]"): "failed" if len(case) else "passed" for case in cases}


def count() -> list[dict[str, Any]]:
    tested = stages_tested()
    rows = []
    for name, family in FAMILIES.items():
        components = architecture(name)
        for preset, patterns in PRESETS[family].items():
            shapes = find_targets(components, patterns)
            width = LightweightConfig().width
            rows.append(
                {
                    "base": name,
                    "preset": preset,
                    "layers": len(shapes),
                    "token_variables": len(shapes) * width,
                    "token_file_bytes": len(save({path: torch.zeros(width) for path in shapes})),
                    "lora_variables": sum(s.inputs + s.outputs for s in shapes.values()),
                    "lora_bytes_rank_1": lora_bytes(shapes, 1),
                    "lora_bytes_rank_4": lora_bytes(shapes, 4),
                    "five_stages": tested[TINY[name]],
                }
            )
    return rows


def families_table() -> str:
    lines = ["| base | preset | layers | token variables | token file | LoRA, rank 1 | LoRA, rank 4 | five stages, tiny model |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in json.loads((RESULTS / "families.json").read_text(encoding="utf-8")):
        sizes = (
            f"{row['token_file_bytes'] / 1e3:.0f} KB | {row['lora_bytes_rank_1'] / 1e6:.1f} MB | {row['lora_bytes_rank_4'] / 1e6:.1f} MB"
        )
        lines.append(f"| {row['base']} | {row['preset']} | {row['layers']} | {row['token_variables']:,} | {sizes} | {row['five_stages']} |")
    return "\n".join(lines)


def memory_table() -> str:
    lines = ["| base | stage | batch | dtype | checkpointing | weights | activations | in all |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]:
        parts = f"{row['weights_gb']:.1f} GB | {row['activations_gb']:.1f} GB | **{row['AdamW_gb']:.1f} GB**"
        kept = "yes" if row["checkpointing"] else "no"
        lines.append(f"| {row['base']} | {row['stage']} | {row['batch']} | {row['dtype']} | {kept} | {parts} |")
    return "\n".join(lines)


T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
BITS = {"bfloat16": 16.0, "int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits for each weight of a linear layer. nf4 adds an 8-bit scale for every 64 weights and a float32 for every 256 of these scales; int8
adds a float32 scale for every row, which `gigabytes` counts."""


def gigabytes(model: nn.Module, kind: str, kept: tuple[str, ...] = ()) -> float:
    """GB of a model's weights if its linear layers are quantized, except those named in `kept`; all other weights have 16 bits."""
    layers = [layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path.split(".")[-1] not in kept]
    plain = 2 * (sum(p.numel() for p in model.parameters()) - sum(layer.weight.numel() for layer in layers))
    scales = sum(4 * layer.out_features for layer in layers) if kind == "int8" else 0
    return (plain + scales + sum(layer.weight.numel() for layer in layers) * BITS[kind] / 8) / 1e9


def quantized_table() -> str:
    """Memory while prompts are encoded, and in a training step of one copy with gradient checkpointing after the text encoders are offloaded."""
    lines = ["| base | weights | denoiser | text encoders | at first | a step |", "|---|---|---|---|---|---|"]
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**T5_XXL))
    for row in json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]:
        if (
            row["base"] not in ("sdxl", "sd3", "flux")
            or row["stage"] != "personalize"
            or row["dtype"] != "bfloat16"
            or not row["checkpointing"]
        ):
            continue
        if row["base"] != "sd3" and row["batch"] > 1:
            continue
        parts = dict(architecture(row["base"], vae=True).named_children())
        vae = gigabytes(parts.pop("vae"), "bfloat16")
        step = row["activations_gb"] / row["batch"] + 16 * row["trained_millions"] / 1000
        for kind in BITS:
            denoiser = gigabytes(parts["unet" if "unet" in parts else "transformer"], kind)
            texts = sum(gigabytes(part, "bfloat16") for name, part in parts.items() if "text" in name)
            texts += gigabytes(t5, kind, ("wo",)) if row["base"] != "sdxl" else 0
            figures = (denoiser, texts, denoiser + texts + vae, denoiser + vae + step)
            lines.append(f"| {row['base']} | {kind} | {' | '.join(f'{figure:.1f} GB' for figure in figures)} |")
    return "\n".join(lines)


def full_size_table() -> str:
    found = json.loads((RESULTS / "full-size.json").read_text(encoding="utf-8"))
    lines = [
        "| base as | copies | load | one step | in all | CPU time | peak memory | layers | LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        seconds = (
            f"{row['load_seconds']:.0f} s | {row['seconds_a_step']:.0f} s | {row['all_seconds']:.0f} s | {row['all_cpu_seconds']:.0f} s"
        )
        what = "a single .safetensors file" if name.endswith(".safetensors") else "a diffusers directory"
        lines.append(
            f"| {what} | {row['copies']} | {seconds} | {row['peak_rss_gb']:.1f} GB | {row['layers']} | {row['lora_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    if "--tables" not in sys.argv:
        write_json(RESULTS / "families.json", count())
    text = DOCS.read_text(encoding="utf-8")
    for name, table in (
        ("families", families_table()),
        ("memory", memory_table()),
        ("quantized", quantized_table()),
        ("full-size", full_size_table()),
    ):
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        assert re.search(pattern, text, re.S), f"{DOCS} has no place for the table {name}"
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda m, block=block: block, text, flags=re.S)
    DOCS.write_text(text, encoding="utf-8")
    print(DOCS)


if __name__ == "__main__":
    main()
