"""Quality by number of photos (1 or 3) and of fine-tuning steps (0 to 100): the shipped hypernetwork on validation people.

    python -m benchmarks.photos_and_steps -o benchmarks/results/photos-and-steps.json

Each number of steps is a separate fine-tuning, otherwise with the shipped settings. The two additional photos are plain ones with other
backgrounds and expressions, sometimes with glasses. Rows already in the output are kept. Needs Node.js for the renderer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.checkpoint import read_json, write_json
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.protocol import load_atlas, world_judges
from hyperdreambooth.lora import LoraSet
from hyperdreambooth.stages.dreambooth import Subject, personalize
from worlds.pixels import to_tensor
from worlds.toon import hypernetworks
from worlds.toon.pictures import FIRST

STEPS = (0, 5, 10, 25, 50, 100)
FIGURES = ("rank1", "rank1_crowd", "similarity", "context_seen", "context_held_out", "perceptual_distance", "copied")
TOGETHER = 8  # People who are fine-tuned in one batch.


def photos_of(references: Tensor, count: int, runs: Path) -> Tensor:
    """The first photos of the first validation people, (people, count, 3, 64, 64) in -1..1."""
    plan = hypernetworks.load_pictures(runs / "data" / "hyper-validation", FIRST["validation"], 150)
    others = [to_tensor(plan[np.arange(len(references)) * 4 + number]) for number in range(2)]
    return torch.stack([references, *others], 1)[:, :count]


@torch.no_grad()
def read(hdb: HyperDreamBooth, photos: Tensor) -> tuple[Subject, LoraSet]:
    """Photos (P, n, 3, H, W) as input for fine-tuning, and the updates that are predicted for each person from all their photos."""
    assert hdb.source is not None
    predicted = hdb.source.lightweight(torch.stack([hdb.predict(mine) for mine in photos])).detach()
    latents = torch.stack([hdb.backbone.encode_images(mine).float() for mine in photos])
    texts = [hdb.describe(mine, predicted.select(slice(index, index + 1))) for index, mine in enumerate(latents)]
    return Subject(latents, texts), predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--runs", type=Path, default=Path("runs/toon"))
    args = parser.parse_args()
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu")
    atlas = load_atlas("benchmarks/atlas", "validation")
    bench = Bench(hdb, atlas, world_judges("benchmarks/atlas"), Path(), "", extras=False)
    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {"people": args.people, "rows": {}}
    for count in (1, 3):
        photos = photos_of(atlas.references[: args.people], count, args.runs)
        parts = []
        for start in range(0, args.people, TOGETHER):
            part = photos[start : start + TOGETHER]
            parts.append((range(start, start + len(part)), *read(hdb, part)))
        for steps in STEPS:
            name = f"{count} photo{'s' * (count > 1)}, {steps} steps"
            if name in results["rows"]:
                continue
            config, drawn = hdb.personalize_config(steps=steps), []
            for who, subject, predicted in parts:
                loras = personalize(hdb.backbone, subject, predicted, config, quiet=True)[0]
                drawn.append(bench.draw(who, range(len(atlas.prompts)), loras))
            found = bench.judged(torch.cat(drawn))
            results["rows"][name] = {figure: found[figure] for figure in FIGURES}
            write_json(args.output, results)
            print(name, results["rows"][name], flush=True)


if __name__ == "__main__":
    main()
