"""Writes the tables of the README and of docs from benchmarks/results: `python benchmarks/tables.py` (with --check: only compares)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from hyperdreambooth.evaluation.command import markdown_table

ROOT = Path(__file__).parents[1]


def fidelity() -> str:
    results = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text(encoding="utf-8"))
    return markdown_table(results["rows"])


def short() -> str:
    """What the README shows of `fidelity`."""
    rows = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        "| | found among 100 | among 1,000 | context, seen | context, held out | copies of training people |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in (
        ("true", "true"),
        ("base", "the base alone"),
        ("prediction", "prediction, no step on the person"),
        ("finetuned", "+ 25 steps"),
        ("faithful", "the paper's mode, prediction"),
    ):
        columns = ("rank1", "rank1_crowd", "context_seen", "context_held_out", "copied")
        lines.append(f"| {title} | " + " | ".join(f"{100 * rows[name][key][0]:.1f} %" for key in columns) + " |")
    return "\n".join(lines)


def speed() -> str:
    results = json.loads((ROOT / "benchmarks/results/speed.json").read_text(encoding="utf-8"))
    hooks, one = results["hooks"], results["personalize"]
    return "\n".join(
        [
            "| what | figure | beside |",
            "|---|---|---|",
            f"| forward + backward, batch 8, per-sample LoRA on hooks | {hooks['hooks_over_peft']:.2f} x | one trainable PEFT LoRA on the same layers |",
            f"| the same | {hooks['hooks_over_bare']:.2f} x | the UNet without any LoRA |",
            f"| `personalize`, in all | {one['personalize_seconds']:.1f} s | {one['load_seconds']:.1f} s of it to start and load the base |",
            f"| peak memory of `personalize` | {one['personalize_peak_mb']:.0f} MB | {one['load_peak_mb']:.0f} MB to start and load the base |",
        ]
    )


def gpu() -> str:
    lines = ["| on one H100, full-size random weights, bf16 | ours | its peer in the same run | ratio |", "|---|---|---|---|"]
    for base, title in (("sd15", "SD 1.5, 512 px"), ("sdxl", "SDXL, 1024 px")):
        found = json.loads((ROOT / f"benchmarks/results/gpu-{base}.json").read_text(encoding="utf-8"))[base]
        for row in found["training"]:
            ms, gb = row["ms"], row["gb"]
            lines += [
                f"| {title}: a fine-tuning step, {row['copies']} copies | {ms['ours']:.0f} ms ({ms['plain']:.0f} unrecorded) | PEFT {ms['peft']:.0f} ms | {row['ours_over_peft']:.2f} |",
                f"| ... its peak memory | {gb['ours']:.1f} GB | PEFT {gb['peft']:.1f} GB | {row['memory_over_peft']:.2f} |",
            ]
        one, drawn = found["commands"], found["drawing"]
        switch = (
            f"| ... switch of person | {1000 * drawn['ours_switch_s']:.0f} ms | load and delete {1000 * drawn['diffusers_switch_s']:.0f} ms"
        )
        lines += [
            f"| {title}: `personalize`, 25 steps of 4 copies, after loading | {one['personalize_first_s']:.1f} s first, {one['personalize_second_s']:.1f} s then | | |",
            f"| {title}: a picture of the person, 25 steps | {drawn['ours_person_s']:.2f} s | diffusers bare {drawn['diffusers_s']:.2f} s | {drawn['ours_over_diffusers']:.2f} |",
            f"{switch} | {drawn['switch_over_diffusers']:.2f} |",
        ]
        most = found["people"][-1]
        lines.append(
            f"| {title}: {most['people']} people in one batch, a step | {most['ms_a_person']:.1f} ms, {most['gb_a_person']:.1f} GB a person | | |"
        )
    return "\n".join(lines)


TABLES = {"README.md": (short,), "docs/fidelity.md": (fidelity,), "docs/speed.md": (speed, gpu)}


def main() -> int:
    stale = 0
    for name, tables in TABLES.items():
        file = ROOT / name
        text = old = file.read_text(encoding="utf-8")
        for table in tables:
            mark = table.__name__
            pattern = rf"<!-- {mark} -->\n.*?<!-- /{mark} -->"
            assert re.search(pattern, text, re.S), f"{name} has no place for the table {mark}"
            block = f"<!-- {mark} -->\n{table()}\n<!-- /{mark} -->"
            text = re.sub(pattern, lambda m, block=block: block, text, flags=re.S)
        stale += text != old
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
    return int(stale > 0) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
