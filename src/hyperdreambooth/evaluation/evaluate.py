"""The protocol: one reference of each person, the same prompts and seeds for every row, judged by the embedded judges."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import HyperDreamBooth
from ..errors import InputError
from ..lora import LoraSet
from ..progress import Progress
from . import metrics
from .atlas import Atlas
from .judges import Judge

ROWS = ("true", "reconstruction", "base", "prediction", "prediction+guidance", "finetuned", "finetuned+guidance", "faithful")
GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": "off"}
"""How pictures are drawn: prompt guidance as low as the base still leaves out what wasn't asked for."""

IDENTITY_GUIDANCE: dict[str, Any] = {**GUIDANCE, "identity_guidance": 1.5, "identity_until": 0.3}
"""The same of the rows with identity guidance."""

LOOKALIKES = 20
"""Each person's nearest of the gallery, among whom to be told apart is hardest."""


@dataclass
class Judges:
    """Who measures. `training` (M, D) are embeddings of training people, `strangers` (K, D) of people who fill the gallery up."""

    recogniser: Judge
    classifier: Judge
    training: Tensor | None = None
    strangers: Tensor | None = None


def evaluate(
    hdb: HyperDreamBooth,
    atlas: Atlas,
    judges: Judges,
    rows: tuple[str, ...] = ROWS,
    *,
    pictures: int = 2,
    faithful: HyperDreamBooth | None = None,
    done: dict[str, Any] | None = None,
    on_row: Callable[[str, dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures by row, and each row's pictures (N, P, pictures, 3, H, W).

    Args:
        pictures: a prompt and person.
        done: rows that were measured before; they are kept and not drawn again.
        on_row: called when a row is done.
    """
    results, drawn = dict(done or {}), {}
    made: dict[str, LoraSet] = {}

    def loras(kind: str) -> LoraSet:
        if kind not in made:
            made[kind] = predicted_loras(faithful if kind == "faithful" and faithful else hdb, atlas)
            if kind == "finetuned":
                made[kind] = finetuned_loras(hdb, atlas, made[kind])
        return made[kind]

    for row in rows:
        if row in results or (row == "faithful" and faithful is None):
            continue
        if row in ("true", "reconstruction"):
            images = atlas.truths[:, :, None]
            if row == "reconstruction":
                flat = images.flatten(0, 2)
                images = torch.cat(
                    [hdb.backbone.decode_images(hdb.backbone.encode_images(part)).cpu() for part in flat.split(64)]
                ).unflatten(0, images.shape[:3])
        else:
            kind = row.split("+")[0]
            guided = row.endswith("+guidance")
            images = draw(hdb, atlas, loras(kind) if kind != "base" else None, pictures, guided, row)
        if not images.isfinite().all():
            raise InputError(
                f"row {row}: some pictures hold values that aren't finite, so there is nothing to measure. Try --dtype float32."
            )
        results[row] = judge(images, atlas, judges)
        drawn[row] = images
        if on_row:
            on_row(row, results[row])
    return results, drawn


def predicted_loras(hdb: HyperDreamBooth, atlas: Atlas) -> LoraSet:
    """The hypernetwork's update of every person, batched."""
    assert hdb.source is not None
    with torch.no_grad():
        tokens = torch.cat([hdb.source.tokens(part.to(hdb.device)) for part in atlas.references.split(32)])
        loras: LoraSet = hdb.source.lightweight(tokens)
    return loras.detach()


def finetuned_loras(hdb: HyperDreamBooth, atlas: Atlas, predicted: LoraSet, batch: int = 20) -> LoraSet:
    """The fine-tuned update of every person; people of a batch don't affect one another."""
    from ..stages.dreambooth import Subject
    from ..stages.personalize import personalize

    latents = hdb.backbone.encode_images(atlas.references)[:, None].float()
    parts = []
    with Progress("fine-tuning people", len(latents)) as progress:
        for start in range(0, len(latents), batch):
            part = slice(start, start + batch)
            few = predicted.select(part)
            subject = Subject(latents[part], [[text] for text in hdb.describe(latents[part, 0], few)])
            tuned, _ = personalize(hdb.backbone, subject, few, hdb.personalize_config(), quiet=True)
            parts.append(tuned)
            progress.update(min(start + batch, len(latents)))
    return LoraSet(
        {
            path: dataclasses.replace(lora, down=torch.cat([p[path].down for p in parts]), up=torch.cat([p[path].up for p in parts]))
            for path, lora in parts[0].items()
        }
    )


def draw(hdb: HyperDreamBooth, atlas: Atlas, loras: LoraSet | None, pictures: int, guided: bool, name: str, batch: int = 80) -> Tensor:
    """Pictures (N, P, pictures, 3, H, W); a picture's seed follows from its person, prompt and number alone."""
    from ..stages.generate import generate

    people, prompts = len(atlas.references), len(atlas.prompts)
    config = dataclasses.replace(hdb.generate_config(), **(IDENTITY_GUIDANCE if guided else GUIDANCE), batch=batch)
    jobs = [(person, prompt, number) for person in range(people) for prompt in range(prompts) for number in range(pictures)]
    parts = []
    with Progress(name, len(jobs)) as progress:
        for start in range(0, len(jobs), batch):
            chunk = jobs[start : start + batch]
            who = torch.tensor([person for person, _, _ in chunk])
            mine = loras.select(who.to(hdb.device)) if loras else None
            texts = [atlas.prompts[prompt] for _, prompt, _ in chunk]
            seeds = [person * 1000 + prompt * 10 + number for person, prompt, number in chunk]
            parts.append(generate(hdb.backbone, texts, seeds, config, personal=mine))
            progress.update(start + len(chunk))
    return torch.cat(parts).reshape(people, prompts, pictures, *parts[0].shape[1:])


def judge(images: Tensor, atlas: Atlas, judges: Judges) -> dict[str, Any]:
    """All figures of one row of pictures (N, P, k, 3, H, W), each as [mean, low, high] of a 95 % interval over people.

    The N are the first of the atlas's people; the others fill the gallery up.
    """
    gallery = judges.recogniser.embed(atlas.gallery)
    atlas = dataclasses.replace(atlas.first(len(images)), gallery=atlas.gallery)
    references = judges.recogniser.embed(atlas.references)
    truths = judges.recogniser.embed(atlas.truths.flatten(0, 1)).unflatten(0, atlas.truths.shape[:2])
    embedded = judges.recogniser.embed(images.flatten(0, 2)).unflatten(0, images.shape[:3])
    order = metrics.ranks(embedded, gallery)
    crowd = gallery if judges.strangers is None else torch.cat([gallery, judges.strangers])
    answers = atlas.truths[:, :, None].expand_as(images)
    asked = [atlas.asked[prompt] for _ in atlas.people for prompt in range(len(atlas.prompts)) for _ in range(images.shape[2])]
    right = metrics.context_right(judges.classifier.classify(images.flatten(0, 2)), asked).reshape(images.shape[:3])
    seen = torch.tensor(atlas.seen)
    values = {
        "rank1": (order == 0).float(),
        "top5": (order < 5).float(),
        "rank1_crowd": (metrics.ranks(embedded, crowd) == 0).float(),
        "rank1_lookalikes": (metrics.lookalike_ranks(embedded, crowd, LOOKALIKES) == 0).float(),
        "auc": metrics.auc(embedded, gallery),
        "similarity": metrics.similarity(embedded, gallery[: len(images)]),
        "rank1_seen": (order == 0).float()[:, seen],
        "rank1_held_out": (order == 0).float()[:, ~seen],
        "context": right,
        "context_seen": right[:, seen],
        "context_held_out": right[:, ~seen],
        "pixel_distance": (images - answers).abs().mean((-3, -2, -1)) / 2,
        "perceptual_distance": judges.classifier.distance(images.flatten(0, 2), answers.flatten(0, 2)).reshape(images.shape[:3]),
        "feature_distance": 1 - (embedded * truths[:, :, None]).sum(-1),
        "psnr": metrics.psnr(images, answers),
    }
    if judges.training is not None:
        values["copied"] = metrics.copied(embedded, references, judges.training)
    return rounded({name: value for name, value in values.items() if value.numel()})


def rounded(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means and 95 % intervals, as they are written down."""
    return {name: [round(float(figure), 4) for figure in metrics.interval(value)] for name, value in values.items()}


def fingerprint(hdb: HyperDreamBooth, atlas: Atlas, judges: Judges) -> str:
    """Changes with any weight or picture that a figure depends on: rows of different weights must never share a table."""
    digest = hashlib.sha256()
    modules = [hdb.backbone.components, hdb.backbone.pipe.vae, judges.recogniser, judges.classifier]
    modules += [hdb.source] if hdb.source is not None else []
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += [atlas.references, atlas.gallery, atlas.truths, *(t for t in (judges.training, judges.strangers) if t is not None)]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def environment(hdb: HyperDreamBooth) -> dict[str, Any]:
    """Versions and device, for the record."""
    import diffusers
    import transformers

    from .. import __version__

    versions = {
        "hyperdreambooth": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "versions": versions,
        "device": str(hdb.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
