"""Upper bounds to measure before hours are spent on training a hypernetwork.

    python -m worlds.toon.gates --people 20
    python -m worlds.toon.gates --people 20 --faithful    how well faithful tokens are predicted, and how well they could be

Measures rank-1 and contexts on validation people: of true renders, of reconstructions, of the prediction, and of pictures made with
tokens that were optimized for that person (starting from the prediction, on the one photo, with the same layers, width and aux).
No hypernetwork can exceed the last: if it is low, add targets, widen the tokens, or train the base longer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.data import IdentityData
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.protocol import Atlas, load_atlas, world_judges
from hyperdreambooth.lora import Hooks, LoraSet
from hyperdreambooth.stages.dreambooth import PhotoLosses, Subject, draw_photos, preoptimize
from hyperdreambooth.trainable_lora import IdentityTable, LightweightLora
from hyperdreambooth.training import Run, fit
from hyperdreambooth.training_settings import NoiseLevels, TrainingConfig

from .. import hypernetworks


def optimized(hdb: HyperDreamBooth, atlas: Atlas, steps: int) -> LoraSet:
    """LoRAs from tokens optimized for each person, all people in one batch."""
    assert hdb.source is not None
    latents = hdb.backbone.encode_images(atlas.references).float()
    with torch.no_grad():
        words = hdb.describe(latents, hdb.source(atlas.references))
    table = IdentityTable(len(latents), hdb.source.lightweight.requires_grad_(False))
    with torch.no_grad():
        table.tokens.copy_(hdb.source.tokens(atlas.references))
    subject = Subject(latents[:, None], [[text] for text in words])
    draw = draw_photos(hdb.backbone, subject, NoiseLevels(), 2, trains_text=False, seed=0)
    config = TrainingConfig(steps=steps, learning_rate=2e-2, cooldown=0.5, max_grad_norm=0.0, log_every=25)
    run = Run(groups=[{"params": [table.tokens], "eps": 1e-8 / len(latents)}], name="tokens")
    with Hooks(hdb.backbone.components, hdb.source.lightweight.targets) as hooks:
        fit(PhotoLosses(hdb.backbone, 1.0, hooks), table, draw, config, run)
    loras: LoraSet = table(torch.arange(len(latents)))
    return loras.detach()


def updates(lightweight: LightweightLora, tokens: Tensor) -> Tensor:
    """Tokens (N, layers, width) -> flattened up @ down (N, numbers): the update in the coordinates of the aux matrices (orthonormal)."""
    down, up = lightweight.split(tokens)
    return (up @ down).flatten(1)


def explained(found: Tensor, wanted: Tensor) -> float:
    """R2 of updates (N, numbers): 1 is exact, 0 is no better than the mean over people."""
    return (1 - (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


def faithful(atlas: Atlas, steps: int = 50) -> None:
    """Prints the R2 of predicted tokens on validation people, and of a second pre-optimization with another seed as an upper bound."""
    hdb = HyperDreamBooth.from_pretrained("toon", hypernetwork="benchmarks/faithful")
    assert hdb.source is not None
    latents = hdb.backbone.encode_images(atlas.references).float()
    everyone = torch.arange(len(latents))
    data = IdentityData(latents, latents, everyone, [str(p) for p in atlas.people], [hdb.prompt] * len(latents), everyone >= 0)
    light = LightweightLora(hdb.source.lightweight.targets, hdb.source.lightweight.config)
    found = []
    for seed in (13, 14):
        config = hypernetworks.table_config(steps)
        config.training.seed = seed
        with tempfile.TemporaryDirectory() as folder:
            table = preoptimize(hdb.backbone, data, config, folder)
        found.append(updates(light, torch.stack([table[name] for name in data.names])))
    with torch.no_grad():
        predicted = updates(light, hdb.source.tokens(atlas.references))
    print(f"R2 of predicted tokens {explained(predicted, found[0]):.3f}, of another seed's {explained(found[1], found[0]):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--faithful", action="store_true")
    args = parser.parse_args()
    folder = Path("benchmarks/atlas")
    atlas = load_atlas(folder, "validation").part(slice(args.people))
    if args.faithful:
        faithful(atlas)
        return
    hdb = HyperDreamBooth.from_pretrained("toon")
    rebuilt = torch.cat([hdb.backbone.decode_images(hdb.backbone.encode_images(part)) for part in atlas.truths.flatten(0, 1).split(64)])
    rows = {"true": atlas.truths[:, :, None], "reconstruction": rebuilt.unflatten(0, atlas.truths.shape[:2])[:, :, None]}
    bench = Bench(hdb, atlas, world_judges(folder), folder, "", extras=False)
    everyone, prompts = range(len(atlas.people)), range(len(atlas.prompts))
    assert hdb.source is not None
    with torch.no_grad():
        predicted = hdb.source(atlas.references)
    for name, loras in (("prediction", predicted), ("optimized tokens", optimized(hdb, atlas, args.steps))):
        for guided in (False, True):
            rows[name + (" + guidance" if guided else "")] = bench.draw(everyone, prompts, loras, guided)
    for name, images in rows.items():
        figures = bench.judged(images)
        shown = ("rank1", "rank1_crowd", "context_seen", "context_held_out", "perceptual_distance")
        print(f"{name:30s}" + "  ".join(f"{key} {figures[key][0]:.3f}" for key in shown), flush=True)


if __name__ == "__main__":
    main()
