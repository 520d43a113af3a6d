"""Writes the README's tables from benchmarks/results: `python benchmarks/tables.py` (with --check: only compares)."""

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


def main() -> int:
    readme = ROOT / "README.md"
    text = old = readme.read_text(encoding="utf-8")
    for name, table in (("fidelity", fidelity()), ("speed", speed())):
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        assert re.search(pattern, text, re.S), f"README.md has no place for the table {name}"
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda m, block=block: block, text, flags=re.S)
    if "--check" in sys.argv:
        return int(text != old)
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
