"""The protocol: one reference of each person, the same prompts and seeds for every row, judged by the embedded judges."""

import dataclasses
import hashlib
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import HyperDreamBooth
from ..lora import LoraSet
from . import metrics
from .atlas import Atlas
from .judges import Judge

GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": "off", "context_guidance": 3.0, "context_until": 0.5}
"""How pictures are drawn: prompt guidance as low as the base still leaves out what wasn't asked for."""

IDENTITY_GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": 1.5, "identity_until": 0.3}
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


def predicted_loras(hdb: HyperDreamBooth, atlas: Atlas) -> LoraSet:
    """The hypernetwork's update of every person, batched."""
    assert hdb.source is not None
    with torch.no_grad():
        tokens = torch.cat([hdb.source.tokens(part.to(hdb.device)) for part in atlas.references.split(32)])
        loras: LoraSet = hdb.source.lightweight(tokens)
    return loras.detach()


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
