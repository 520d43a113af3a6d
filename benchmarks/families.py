"""What each family's tokens and LoRAs weigh, and the tables of docs/backbones.md.

python benchmarks/families.py            counts, runs the five stages of each family's tiny model, writes results and tables
python benchmarks/families.py --tables   writes the tables from benchmarks/results alone
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

from hyperdreambooth import formats
from hyperdreambooth.backbones.architectures import FAMILIES, PRESETS, architecture
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.lora import Lora, LoraSet, Shape, find_targets
from hyperdreambooth.training_settings import LightweightConfig

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs/backbones.md"
# the tiny model of tests/families.py that stands for each architecture
TINY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "sd3": "sd3", "sd35-medium": "sd3.5", "sd35-large": "sd3.5", "flux": "flux-dev"}


def lora_bytes(shapes: dict[str, Shape], rank: int) -> int:
    """Size of a LoRA file as it is written: fp16, diffusers' layout."""
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
    lines = ["| base | stage | batch | dtype | checkpointing | weights | activations | AdamW | 8-bit AdamW | Adafactor |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]:
        totals = " | ".join(f"**{row[f'{name}_gb']:.1f} GB**" for name in ("AdamW", "8-bit AdamW", "Adafactor"))
        parts = f"{row['weights_gb']:.1f} GB | {row['activations_gb']:.1f} GB"
        kept = "yes" if row["checkpointing"] else "no"
        lines.append(f"| {row['base']} | {row['stage']} | {row['batch']} | {row['dtype']} | {kept} | {parts} | {totals} |")
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
    for name, table in (("families", families_table()), ("memory", memory_table()), ("full-size", full_size_table())):
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        assert re.search(pattern, text, re.S), f"{DOCS} has no place for the table {name}"
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda m, block=block: block, text, flags=re.S)
    DOCS.write_text(text, encoding="utf-8")
    print(DOCS)


if __name__ == "__main__":
    main()
