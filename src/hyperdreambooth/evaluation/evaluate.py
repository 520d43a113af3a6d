"""The protocol: one reference of each person, the same prompts and seeds for every row, judged by the embedded judges."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .. import __version__
from ..api import HyperDreamBooth
from ..checkpoint import read_json
from ..errors import InputError
from ..lora import LoraSet
from . import metrics
from .judges import Judge

GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": "off", "context_guidance": 3.0, "context_until": 0.5}
"""How pictures are drawn: prompt guidance as low as the base still leaves out what wasn't asked for."""

IDENTITY_GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": 1.5, "identity_until": 0.3}
"""The same of the rows with identity guidance."""

LOOKALIKES = 20  # Each person's nearest of the gallery, among whom to be told apart is hardest.


@dataclass
class Atlas:
    """References, gallery and right answers of N people who were never trained on, and P prompts; pictures are (…, 3, H, W) in -1..1."""

    references: Tensor  # (N, 3, H, W): the one photo that is given.
    gallery: Tensor  # (N, 3, H, W): another plain picture of each, to be recognized by.
    truths: Tensor  # (N, P, 3, H, W): each person as each prompt asks for.
    prompts: list[str]
    asked: list[dict[str, str]]  # What each prompt asks for, by kind of context.
    seen: list[bool]  # Whether hypernetworks trained on a prompt's context, or it was held out.
    people: list[int]

    def first(self, count: int | None) -> Atlas:
        """Only the first people."""
        few: dict[str, Any] = {name: getattr(self, name)[:count] for name in ("references", "gallery", "truths", "people")}
        return dataclasses.replace(self, **few)

    def only(self, prompts: Sequence[int]) -> Atlas:
        """Only these prompts, by number."""
        few: dict[str, Any] = {name: [getattr(self, name)[prompt] for prompt in prompts] for name in ("prompts", "asked", "seen")}
        return dataclasses.replace(self, truths=self.truths[:, list(prompts)], **few)


def load_atlas(folder: str | Path, split: str) -> Atlas:
    """Reads `split`.webp and `split`.json. Raises InputError where they are missing."""
    sheet, about = Path(folder) / f"{split}.webp", Path(folder) / f"{split}.json"
    if not sheet.is_file() or not about.is_file():
        raise InputError(f"{sheet} or {about} is missing: the evaluation runs in a checkout of the repository, or name one with --atlas.")
    values = read_json(about)
    side, people = values["size"], values["people"]
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    cells = pixels.reshape(len(people), side, -1, side, 3).transpose(0, 2, 4, 1, 3)
    tensor = torch.from_numpy(cells.copy()).float() / 127.5 - 1
    return Atlas(tensor[:, 0], tensor[:, 1], tensor[:, 2:], values["prompts"], values["asked"], values["seen"], people)


@dataclass
class Judges:
    """Who measures. `training` (M, D) are embeddings of training people, `strangers` (K, D) of people who fill the gallery up."""

    recogniser: Judge
    classifier: Judge
    training: Tensor | None = None
    strangers: Tensor | None = None


def predicted_loras(hdb: HyperDreamBooth, atlas: Atlas) -> LoraSet:
    """The hypernetwork's update of every person, batched."""
    assert hdb.source is not None
    with torch.no_grad():
        tokens = torch.cat([hdb.source.tokens(part.to(hdb.device)) for part in atlas.references.split(32)])
        return hdb.source.lightweight(tokens).detach()


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
        "context": right,
        "pixel_distance": (images - answers).abs().mean((-3, -2, -1)) / 2,
        "perceptual_distance": judges.classifier.distance(images.flatten(0, 2), answers.flatten(0, 2)).reshape(images.shape[:3]),
        "feature_distance": 1 - (embedded * truths[:, :, None]).sum(-1),
        "psnr": metrics.psnr(images, answers),
    }
    for name, which in (("seen", seen), ("held_out", ~seen)):
        values |= {f"{figure}_{name}": values[figure][:, which] for figure in ("rank1", "context")}
    if judges.training is not None:
        values["copied"] = metrics.copied(embedded, references, judges.training)
    return rounded({name: value for name, value in values.items() if value.numel()})


def rounded(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means and 95 % intervals, as they are written down."""
    return {name: [round(float(figure), 4) for figure in metrics.interval(value)] for name, value in values.items()}


def fingerprint(hdb: HyperDreamBooth, atlas: Atlas, judges: Judges | None = None) -> str:
    """Changes with any weight or picture that a figure depends on: rows of different weights must never share a table."""
    digest = hashlib.sha256()
    modules = [hdb.backbone.components, hdb.backbone.pipe.vae, *((judges.recogniser, judges.classifier) if judges else ())]
    modules += [hdb.source] if hdb.source is not None else []
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += [atlas.references, atlas.gallery, atlas.truths]
    tensors += [known for known in (judges.training, judges.strangers) if known is not None] if judges else []
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def environment(hdb: HyperDreamBooth) -> dict[str, Any]:
    """Versions and device, for the record."""
    return {
        "versions": {"hyperdreambooth": __version__} | {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "device": str(hdb.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
