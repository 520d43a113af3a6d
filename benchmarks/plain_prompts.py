"""Prompts as users write them: one attribute without a background, two attributes, another word order, or a style.

    python -m benchmarks.plain_prompts --split validation

The protocol's prompts name a background with every hat. Here each prompt is judged by the color and shape of its attributes, in the pixels where the
ground-truth renders with and without them differ. *right* is the fraction of pictures whose mean error in these pixels, against the render with the
attributes, is under a quarter of the error of the render without them. Needs Node.js for the renderer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth, photos
from hyperdreambooth.assets import toon
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.evaluation import metrics
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.evaluation.protocol import load_atlas
from hyperdreambooth.sampling import generate
from hyperdreambooth.stages.dreambooth import Subject, personalize
from worlds.toon import pictures
from worlds.toon.atlas import PLAIN

PROMPTS: dict[str, dict[str, str]] = {
    "a [V] face wearing a santa hat": {"headwear": "santa"},
    "a [V] face wearing a hairband": {"headwear": "hairband"},
    "a [V] face wearing a cap": {"headwear": "cap"},
    "a [V] face with dark glasses": {"eyewear": "dark"},
    "an angry [V] face": {"expression": "angry"},
    "a [V] face on a purple background": {"background": "purple"},
    "a smiling [V] face wearing a santa hat": {"headwear": "santa", "expression": "smiling"},
    "a [V] face with glasses wearing a santa hat": {"headwear": "santa", "eyewear": "glasses"},
    "a poster of a [V] face": {"style": "poster"},
}


def truths(people: list[int], context: dict[str, str], runs: Path, name: str) -> Tensor:
    """Ground-truth renders of people in a context: (N, 3, 64, 64) in -1..1."""
    plan = [{"person": person, "context": {**PLAIN, **context}} for person in people]
    return pictures.to_tensor(pictures.render_plan(runs / "data" / f"plain-{name}", plan).pixels)


def right(images: Tensor, true: Tensor, without: Tensor) -> Tensor:
    """Whether the prompt's attributes are in each picture with the right color and shape: (N,) of 0 and 1."""
    changed = ((true - without).abs().amax(1, keepdim=True) > 0.2).float()
    area = changed.sum((1, 2, 3)).clamp(min=1) * 3
    off, nothing = (((picture - true).abs() * changed).sum((1, 2, 3)) / area for picture in (images, without))
    return (off < 0.25 * nothing).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--protocol", action="store_true", help="also measure the protocol's prompts, with the protocol's metrics")
    parser.add_argument("--finetuned", action="store_true", help="also measure each person after 25 steps of fine-tuning")
    parser.add_argument("--settings", type=json.loads, default={}, help='generation settings as JSON, such as {"context_until": 0}')
    parser.add_argument("--runs", type=Path, default=Path("runs/toon"))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    hdb = HyperDreamBooth.from_pretrained("toon")
    atlas = load_atlas(Path("benchmarks/atlas"), args.split).part(slice(args.people))
    recogniser = Judge.from_pretrained(toon.directory("recogniser"))
    gallery = recogniser.embed(load_atlas(Path("benchmarks/atlas"), args.split).gallery)
    with torch.no_grad():
        predicted = hdb.source(atlas.references).detach()
    loras: dict[str, Any] = {"base": None, "prediction": predicted}
    if args.finetuned:
        latents = hdb.backbone.encode_images(atlas.references).float()
        subject = Subject(latents[:, None], [[text] for text in hdb.describe(latents, predicted)])
        loras["finetuned"], _ = personalize(hdb.backbone, subject, predicted, hdb.personalize_config(), quiet=True)
    config = dataclasses.replace(hdb.generate_config(**args.settings), batch=80)
    seeds = [person * 1000 for person in range(len(atlas.people))]
    plain = truths(atlas.people, {}, args.runs, f"{args.split}-none")
    results: dict[str, Any] = {}
    for index, (prompt, context) in enumerate(PROMPTS.items()):
        true = truths(atlas.people, context, args.runs, f"{args.split}-{index}")
        for name, mine in loras.items():
            images = generate(hdb.backbone, [prompt] * len(seeds), seeds, config, personal=mine)
            embedded = recogniser.embed(images)
            figures = {
                "right": right(images, true, plain),
                "rank1": (metrics.ranks(embedded[:, None], gallery)[:, 0] == 0).float(),
                "pixel_distance": (images - true).abs().mean((1, 2, 3)) / 2,
            }
            row = results.setdefault(name, {}).setdefault(prompt, {})
            row |= {key: [round(value, 4) for value in metrics.interval(values)] for key, values in figures.items()}
            print(f"{name:12s} {prompt:48s} " + "  ".join(f"{key} {value[0]:.3f}" for key, value in row.items()), flush=True)
            if index == 0 and args.output:
                rows = [photos.to_images(picture[None])[0] for picture in images[:8]]
                photos.save_png(photos.grid([rows], [prompt], [""] * 8), args.output.with_name(f"{args.output.stem}-{name}.png"), {}, True)
    classifier = Judge.from_pretrained(toon.directory("classifier"))
    for name, mine in loras.items() if args.protocol else ():
        found: dict[str, list[Tensor]] = {"rank1": [], "context": [], "perceptual_distance": []}
        for number, prompt in enumerate(atlas.prompts):
            images = generate(hdb.backbone, [prompt] * len(seeds), [seed + 10 * number for seed in seeds], config, personal=mine)
            found["rank1"].append((metrics.ranks(recogniser.embed(images)[:, None], gallery)[:, 0] == 0).float())
            found["context"].append(metrics.context_right(classifier.classify(images), [atlas.asked[number]] * len(seeds)).float())
            found["perceptual_distance"].append(classifier.distance(images, atlas.truths[:, number]))
        row = {key: [round(value, 4) for value in metrics.interval(torch.stack(values).mean(0))] for key, values in found.items()}
        results[name]["the protocol's prompts"] = row
        print(f"{name:12s} the protocol's prompts  " + "  ".join(f"{key} {value[0]:.3f}" for key, value in row.items()), flush=True)
    if args.output:
        write_json(args.output, {"split": args.split, "people": len(seeds), "settings": dataclasses.asdict(config), "rows": results})


if __name__ == "__main__":
    main()
