"""Writes the tables of the README and the docs from benchmarks/results: `python benchmarks/tables.py`.

With --check it only compares them: exit status 1 if a table is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hyperdreambooth.checkpoint import read_json
from hyperdreambooth.evaluation.command import cell, markdown_table

ROOT = Path(__file__).parents[1]


def measured(name: str) -> dict[str, Any]:
    """The contents of benchmarks/results/`name`.json."""
    return read_json(ROOT / f"benchmarks/results/{name}.json")


def fidelity() -> str:
    results = measured("fidelity")
    crowds = ("rank1", "rank1_crowd", "rank1_lookalikes", "similarity", "context_seen", "context_held_out")
    return markdown_table(results["rows"], (*crowds, "perceptual_distance", "pixel_distance", "copied"))


def short() -> str:
    """The rows and columns of `fidelity` that the README shows."""
    rows = measured("fidelity")["rows"]
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


def baselines() -> str:
    """The comparison of methods."""
    names = ("rank1", "rank1_crowd", "auc", "similarity", "context", "perceptual_distance", "leakage", "prior_drift", "diversity")
    return markdown_table(measured("baselines")["rows"], (*names, "people", "steps", "seconds", "numbers"))


def searched() -> str:
    """All settings that the search tried, one row for each learning rate and kind of noise levels; the best rate is bold."""
    results = measured("search")
    lines = ["| method | rate | noise levels | perceptual distance after steps | similarity at the last |", "|---|---|---|---|---|"]
    for name, found in results["search"].items():
        runs: dict[tuple[float, str], list[dict]] = {}
        for one in found["tried"]:
            runs.setdefault((one["rate"], one["levels"]), []).append(one)
        for (rate, levels), run in runs.items():
            curve = ", ".join(f"{one['perceptual_distance'][0]:.3f} ({one['steps']})" for one in run)
            best = "**" if found["best"] in run else ""
            lines.append(f"| {name} | {best}{rate:g}{best} | {levels} | {curve} | {run[-1]['similarity'][0]:.3f} |")
    return "\n".join(lines)


def plain() -> str:
    """Prompts as users write them: the fraction of pictures with the right color and shape, and rank-1 after fine-tuning."""
    rows = measured("plain-prompts")["rows"]
    lines = ["| prompt | right: base | prediction | + 25 steps | found among 100, + 25 steps |", "|---|---|---|---|---|"]
    for prompt in rows["base"]:
        cells = [rows[name][prompt]["right"] for name in ("base", "prediction", "finetuned")] + [rows["finetuned"][prompt]["rank1"]]
        lines.append(
            f"| {prompt} | " + " | ".join(f"{100 * mean:.0f} % ({100 * low:.0f}-{100 * high:.0f})" for mean, low, high in cells) + " |"
        )
    return "\n".join(lines)


def ablations() -> str:
    """Variants of the hypernetwork's training at one short budget."""
    rows = measured("ablations")["rows"]
    lines = [
        "| variant | what differs | identity gain | rank-1 | similarity | perceptual distance | leakage |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = " | ".join(cell(row[figure], figure) for figure in ("rank1", "similarity", "perceptual_distance", "leakage"))
        lines.append(f"| {name} | {row['changes']} | {row['identity_gain']:.3f} ± {row['interval']:.3f} | {cells} |")
    return "\n".join(lines)


def photos_and_steps() -> str:
    """Quality with one photo or three, by number of fine-tuning steps."""
    figures = ("rank1", "rank1_crowd", "similarity", "context_seen", "context_held_out", "perceptual_distance", "copied")
    return markdown_table(measured("photos-and-steps")["rows"], figures)


def leakage() -> str:
    """How close pictures of other prompts come to the person whose LoRA is loaded."""
    rows = measured("leakage")["rows"]
    prompts = list(next(iter(rows.values())))
    lines = [f"| leakage of | {' | '.join(prompts[:-1])} | similarity of {prompts[-1]} |", "|---" * (len(prompts) + 1) + "|"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(cell(figure, prompt) for prompt, figure in row.items())} |" for name, row in rows.items())]
    )


def speed() -> str:
    results = measured("speed")
    lines = ["| | ours | its peer in the same run | ratio (quartiles) | times the floor |", "|---|---|---|---|---|"]
    for base, title in (("toon", "toon, 64 px"), ("mid", "half of SD 1.5, 128 px")):
        found = results[base]
        for row in found["steps"]:
            ratio, floor = f"{row['ours_over_peft']:.2f} ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})", f"{row['ours_over_floor']:.1f}"
            mine, peer = f"{row['ours_ms']:.0f} ms", f"PEFT {row['peft_ms']:.0f} ms"
            lines.append(f"| {title}: a fine-tuning step, {row['copies']} copies | {mine} | {peer} | {ratio} | {floor} |")
        for row in found["memory"]:
            mine, peer = f"{row['ours_mb']} MB", f"PEFT {row['peft_mb']} MB; loaded {row['loaded_mb']}"
            lines.append(f"| {title}: peak memory of it, {row['copies']} copies | {mine} | {peer} | {row['ours_over_peft']:.2f} | |")
        drawn = found["drawing"]
        mine, peer = (
            f"{drawn['ours_person_s']:.2f} s",
            f"diffusers bare {drawn['diffusers_s']:.2f} s, its LoRA loaded {drawn['diffusers_lora_loaded_s']:.2f}",
        )
        lines.append(f"| {title}: a picture of the person, 10 steps | {mine} | {peer} | {drawn['ours_over_diffusers']:.2f} | |")
        mine, peer = f"{1000 * drawn['ours_switch_s']:.0f} ms", f"load and delete {1000 * drawn['diffusers_switch_s']:.0f} ms"
        lines.append(f"| ... switch of person | {mine} | {peer} | {drawn['switch_over_diffusers']:.2f} | |")
    one, whole, starts = results["toon"]["prediction"], results["toon"]["personalize"], results["toon"]["start"]
    mine, peer = f"{one['predict_ms']:.0f} ms", f"a forward pass of the denoiser {one['forward_ms']:.0f} ms"
    lines.append(f"| toon: prediction from a photo | {mine} | {peer} | {one['predict_over_forward']:.2f} | |")
    mine, peer = (
        f"{whole['after_loading_first_s']:.1f} s",
        f"the whole command {whole['whole_s']:.1f} s, a command that only loads {whole['load_s']:.1f}",
    )
    lines.append(f"| toon: `personalize` after loading, 25 steps | {mine} | {peer} | | |")
    for name in [name for name in starts if name != "diffusers"]:
        cells = f"{starts[name]['s']:.2f} s | importing diffusers' pipeline {starts['diffusers']['s']:.2f} s | {starts[name]['over_diffusers']:.3f}"
        lines.append(f"| `{name}`, of the processor | {cells} | |")
    return "\n".join(lines)


def growth() -> str:
    """Milliseconds of a fine-tuning step by problem size."""
    results = measured("speed")
    lines = ["| a step's milliseconds by | toon | half of SD 1.5 |", "|---|---|---|"]
    for what in results["toon"]["growth"]:
        cells = (", ".join(f"{ms:.0f} ({size})" for size, ms in results[base]["growth"][what].items()) for base in ("toon", "mid"))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu() -> str:
    lines = ["| on one H100, full-size random weights, bf16 | ours | its peer in the same run | ratio |", "|---|---|---|---|"]
    for base, title in (("sd15", "SD 1.5, 512 px"), ("sdxl", "SDXL, 1024 px")):
        found = measured(f"gpu-{base}")[base]
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


def scaling() -> str:
    """The costs of making tables of toon people in every way, and of encoding pictures."""
    results = measured("scale")
    titles = {
        "plain": "one process",
        "again": "one process, where all rows are there",
        "shards": "two shards",
        "hundredth": "one shard of a hundred",
        "ray": "Ray, two workers",
        "ray-killed": "Ray, a worker killed now and then",
    }
    lines = [
        "| people | | clock | processor | killed | trained again | largest process | same bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for people, found in results["engine"].items():
        for way, title in titles.items():
            if one := found.get(way):
                largest = max(one["largest_mb"].values())
                lines.append(
                    f"| {int(people):,} | {title} | {one['seconds']:.0f} s | {one['processor_seconds']:.0f} s | {one['killed']} | "
                    f"{one['trained_again']} of {one['chunks']} chunks | {largest} MB | {'yes' if one['same_bytes'] else 'no'} |"
                )
    lines += ["", "| a picture of 256 pixels, JPEG | clock | processor |", "|---|---|---|"]
    for threads, found in results.get("encoding", {}).items():
        one, many = found["one_by_one"], found["batches"]
        for name, ms in (("one by one", one), ("in batches, decoded in threads", many)):
            lines.append(f"| {threads}: {name} | {ms['clock_ms']:.1f} ms | {ms['processor_ms']:.1f} ms |")
        ratios = [f"{one[kind] / many[kind]:.1f} times" for kind in ("clock_ms", "processor_ms")]
        lines.append(f"| {threads}: as fast | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


TABLES = {
    "README.md": (short,),
    "docs/fidelity.md": (fidelity, plain, ablations, photos_and_steps),
    "docs/speed.md": (speed, growth, gpu),
    "docs/evaluation.md": (baselines, searched, leakage),
    "docs/scale.md": (scaling,),
}


def main() -> int:
    changed = False
    for page, tables in TABLES.items():
        file = ROOT / page
        text = old = file.read_text(encoding="utf-8")
        for table in tables:
            name = table.__name__
            pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
            assert re.search(pattern, text, re.S), f"{page} has no place for the table {name}"
            block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
            text = re.sub(pattern, lambda m, block=block: block, text, flags=re.S)
        changed = changed or text != old
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
    return int(changed and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
