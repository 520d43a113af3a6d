"""Ablations of the hypernetwork at one short training budget: each variant changes one setting, or a few, of a common configuration.

    python -m benchmarks.ablations -o benchmarks/results/ablations.json

Every variant is trained from scratch on pictures of the first people of the toon world, for 300 steps of 32 pictures, with the shipped base and the
shipped encoder. The encoder stays frozen; it was trained together with the shipped hypernetwork, on more people, so it favors no variant. Then LoRAs of
32 validation people are predicted from one photo each, and pictures are generated for every second prompt of the protocol. Such a short budget shows
how fast a variant learns, not its final quality. Rows already in the output are kept; an interrupted training resumes. Needs Node.js for the renderer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.assets import toon
from hyperdreambooth.checkpoint import read_json, write_json
from hyperdreambooth.data import IdentityData
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.protocol import load_atlas, world_judges
from hyperdreambooth.stages.dreambooth import preoptimize
from hyperdreambooth.stages.train_hypernetwork import train_hypernetwork
from hyperdreambooth.training import Run
from hyperdreambooth.training_settings import LightweightConfig, NoiseLevels, TrainHypernetworkConfig
from worlds import hypernetworks as shared
from worlds.toon import hypernetworks
from worlds.toon.train import Toon

FROZEN = {"mode": "faithful", "weight_loss": 0.0}
PAPER = LightweightConfig(rank=1, down_dim=64, up_dim=32)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "common": ("learnable aux, rank 4, 2 passes, 2,000 people, another picture as target", {}),
    "frozen aux": ("random aux matrices, as in the paper", FROZEN),
    "frozen aux, rank 1": ("the paper's size of an update", {**FROZEN, "lightweight": PAPER}),
    "frozen aux, rank 1, weight loss": (
        "and its weight loss, for 128 people who were pre-optimized",
        {"mode": "faithful", "lightweight": PAPER},
    ),
    "rank 1": ("", {"lightweight": PAPER}),
    "half the aux dims": ("32 and 16 instead of 64 and 32", {"lightweight": LightweightConfig(rank=4, down_dim=32, up_dim=16)}),
    "1 pass": ("", {"passes": 1}),
    "4 passes": ("", {"passes": 4}),
    "same picture": ("predicts from the very picture that it denoises", {"same": True}),
    "no price on what is shared": ("", {"shared": 0.0}),
    "noise levels uniform": ("instead of high ones", {"levels": NoiseLevels(uniform=1.0)}),
    "prior preservation": ("three in ten prompts name nobody, and keep what the base draws", {"prior": 0.3}),
    "the prompt's layers too": (
        "attn2's to_k and to_v, with prior preservation",
        {"prior": 0.3, "targets": (*shared.TARGETS, *shared.READING)},
    ),
    "the prompt's layers too, no price": (
        "the same, and what is shared costs nothing",
        {"prior": 0.3, "targets": (*shared.TARGETS, *shared.READING), "shared": 0.0},
    ),
    "the prompt's layers alone": (
        "attn2, with prior preservation",
        {"prior": 0.3, "targets": ("unet.*.attn2.to_q", "unet.*.attn2.to_out.0", *shared.READING)},
    ),
    "125 people": ("", {"people": 125}),
    "500 people": ("", {"people": 500}),
}
FIGURES = ("rank1", "similarity", "context", "perceptual_distance", "leakage")


def config_of(changes: Mapping[str, Any], steps: int) -> TrainHypernetworkConfig:
    """The common configuration with a variant's changes."""
    common = shared.pro_config(steps, batch=32)
    training = dataclasses.replace(common.training, optimizer="adamw", learning_rate=1e-3, warmup=20, cooldown=0.5, validate_every=0)
    size = dataclasses.replace(common.hypernetwork, passes=changes.get("passes", common.hypernetwork.passes))
    own = {key: value for key, value in changes.items() if key not in ("passes", "people", "same")}
    return dataclasses.replace(common, **{"training": training, "hypernetwork": size, "train_encoder": False, "weight_loss": 1e-3, **own})


def everyone_alone(data: IdentityData) -> IdentityData:
    """The same pictures, each labeled as a different person, so that every update is predicted from the picture that it denoises."""
    count = len(data.people)
    return dataclasses.replace(data, people=torch.arange(count), names=[str(i) for i in range(count)], reference=torch.ones(count) > 0)


@contextmanager
def drawing_with(hdb: HyperDreamBooth, source: Any) -> Iterator[None]:
    before, hdb.source = hdb.source, source
    try:
        yield
    finally:
        hdb.source = before


def judged(hdb: HyperDreamBooth, count: int) -> Callable[[Any], dict[str, Any]]:
    """A function from a hypernetwork to its figures on the first `count` validation people."""
    whole = load_atlas("benchmarks/atlas", "validation")
    atlas = whole.part(prompts=slice(None, None, 2))
    bench, who = Bench(hdb, atlas, world_judges("benchmarks/atlas"), Path(), ""), range(count)
    base = bench.draw(who, range(len(atlas.prompts), len(atlas.prompts) + 2), None)  # for two prompts that name no person

    def figures(source: Any) -> dict[str, Any]:
        with drawing_with(hdb, source), torch.no_grad():
            tokens: Tensor = source.tokens(atlas.references[:count])
            drawn = bench.draw(who, range(len(bench.prompts)), source.lightweight(tokens).detach())
            found = bench.judged(drawn, base)
        return {name: found[name] for name in FIGURES}

    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help=f"variants to run, of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--people", type=int, default=32, help="number of validation people")
    parser.add_argument("--runs", type=Path, default=Path("runs/toon"))
    args = parser.parse_args()
    hdb, chain, runs = HyperDreamBooth.from_pretrained("toon", device="cpu"), Toon(args.runs), args.runs / "ablations"
    encoder = FaceEncoder.from_pretrained(toon.directory("hypernetwork") / "encoder")
    album = hypernetworks.album(hypernetworks.load_pictures(args.runs / "data" / "ablations", 0, 2000), 2000)
    data = shared.identity_data(album, encoder, chain.components)
    validation, figures = chain.identity_data(encoder, "validation"), judged(hdb, args.people)
    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {"steps": args.steps, "batch": 32, "rows": {}}
    for name in args.only:
        if name in results["rows"]:
            continue
        said, changes = VARIANTS[name]
        config, few = config_of(changes, args.steps), data.split(2000 - changes["people"])[0] if "people" in changes else data
        table: Any = {"": torch.empty(0)} if config.mode == "faithful" else None
        if config.mode == "faithful" and config.weight_loss:
            photos = shared.photos_of(data.split(2000 - 128)[0])
            table = preoptimize(hdb.backbone, photos, shared.table_config(50), runs / "table")
        source, report = train_hypernetwork(
            hdb.backbone, encoder, everyone_alone(few) if changes.get("same") else few, config,
            run=Run(runs / name.replace(" ", "-").replace(",", "")), validation=validation, table=table,
        )  # fmt: skip
        gain = report.validations[-1]
        row = {"changes": said, "identity_gain": round(gain["identity_gain"], 4), "interval": round(gain["identity_gain_interval"], 4)}
        results["rows"][name] = row | figures(source)
        write_json(args.output, results)
        print(name, results["rows"][name], flush=True)


if __name__ == "__main__":
    main()
