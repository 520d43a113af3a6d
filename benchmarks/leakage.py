"""How much a person's LoRA leaks into other prompts: those that name no person, another trigger word, or another person's description.

    python -m benchmarks.leakage -o benchmarks/results/leakage.json

*leakage* is how much closer pictures of such prompts are to the person with the LoRA than without it, for the same seeds: a difference of cosine
similarities of the recognizer's embeddings. For comparison, the similarity of pictures of the person's own prompt is given: it is the likeness
that can leak. Rows already in the output are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.checkpoint import read_json, write_json
from hyperdreambooth.evaluation import comparison, metrics
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.methods import METHODS, train
from hyperdreambooth.evaluation.protocol import load_atlas, world_judges
from hyperdreambooth.lora import LoraSet

NOBODY = ("a face", "a sks face", "a face of a dark skinned man with long blond hair")
OWN = "a [V] face"
COMPARED = ("hypernetwork", "hypernetwork + fine-tuning", "faithful hypernetwork", "DreamBooth-LoRA 4", "DreamBooth-LoRA 4 + prior")
TOGETHER = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=20, help="test people")
    parser.add_argument("--settings", type=Path, default=Path("benchmarks/results/search.json"))
    args = parser.parse_args()
    hdb, faithful = (HyperDreamBooth.from_pretrained("toon", hypernetwork=which, device="cpu") for which in ("auto", "benchmarks/faithful"))
    atlas = dataclasses.replace(load_atlas("benchmarks/atlas", "test"), prompts=[*NOBODY, OWN])
    bench = Bench(hdb, atlas, world_judges("benchmarks/atlas"), Path(), "", faithful, count=2, extras=False)
    embedder, shown = bench.judges.embedders[""], range(len(atlas.prompts))

    def near(who: range, loras: LoraSet | None) -> Tensor:
        """Mean cosine similarity of each prompt's pictures to the person: (people, prompts)."""
        seen = embedder.embed(bench.draw(who, shown, loras).flatten(0, 2)).unflatten(0, (len(who), -1, bench.count))
        return torch.einsum("npcd,nd->np", seen, bench.known[""][1][list(who)]) / bench.count

    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {"people": args.people, "rows": {}}
    methods = comparison.with_settings({name: METHODS[name] for name in COMPARED}, args.settings)
    parts = [range(start, min(start + TOGETHER, args.people)) for start in range(0, args.people, TOGETHER)]
    base = torch.cat([near(who, None) for who in parts])
    for name, method in methods.items():
        if name in results["rows"]:
            continue
        found = []
        for who in parts:
            subject, predicted = bench.people(method, who)
            made: dict[int, LoraSet | None] = {0: predicted}
            if subject is not None:
                train(hdb, method, subject, predicted, (bench.steps(method),), made.__setitem__)
            found.append(near(who, made[bench.steps(method)]))
        figures = torch.cat(found)
        rows = {prompt: (figures - base)[:, index] for index, prompt in enumerate(NOBODY)} | {OWN: figures[:, -1]}
        results["rows"][name] = {prompt: [round(float(value), 4) for value in metrics.interval(mean)] for prompt, mean in rows.items()}
        write_json(args.output, results)
        print(name, results["rows"][name], flush=True)


if __name__ == "__main__":
    main()
