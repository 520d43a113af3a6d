"""The metrics, as pure functions. Most return one value for each picture, (N, ...) with the N people first; means are taken later."""

import math

import torch
from torch import Tensor


def ranks(embedded: Tensor, gallery: Tensor) -> Tensor:
    """For each picture (N, ..., D) how many others of the gallery are at least as similar as its own person: (N, ...); 0 is right.

    The gallery (M, D) begins with the N people themselves; strangers may follow. Ties and NaN count as more similar, so that a recognizer
    which can't tell people apart recognizes nobody.
    """
    similarities = embedded @ gallery.mT
    shape = [len(embedded)] + [1] * (similarities.ndim - 1)
    own = similarities.gather(-1, torch.arange(len(embedded)).reshape(shape).expand(*similarities.shape[:-1], 1))
    return (~(similarities < own)).sum(-1) - 1


def lookalike_ranks(embedded: Tensor, gallery: Tensor, count: int) -> Tensor:
    """`ranks` among each person and the `count` others of the gallery who are most similar to that person: (N, ...)."""
    own = gallery[: len(embedded)]
    similarities = (own @ gallery.mT).fill_diagonal_(-torch.inf)
    nearest = gallery[similarities.topk(min(count, len(gallery) - 1)).indices]
    crowds = torch.cat([own[:, None], nearest], 1)
    return torch.cat([ranks(pictures[None], crowd) for pictures, crowd in zip(embedded, crowds, strict=True)])


def similarity(embedded: Tensor, gallery: Tensor) -> Tensor:
    """Cosine similarity of each picture (N, ..., D) and its own person's gallery picture (N, D): (N, ...)."""
    shape = [len(gallery)] + [1] * (embedded.ndim - 2) + [gallery.shape[-1]]
    return (embedded * gallery.reshape(shape)).sum(-1)


def auc(embedded: Tensor, gallery: Tensor) -> Tensor:
    """For each picture (N, ..., D) the share of all wrong pairs that are less similar than the picture and its own person: (N, ...).

    A wrong pair is a picture and another person of the gallery (M, D), which begins with the N people. The mean is the area under the
    ROC curve of "the same person?"; ties count half. A picture without a face (NaN) is in no wrong pair, and its own share is 0.
    """
    similarities = (embedded @ gallery.mT).reshape(len(embedded), -1, len(gallery))
    people = torch.arange(len(embedded))
    wrong = torch.ones_like(similarities, dtype=torch.bool)
    wrong[people, :, people] = False
    scores = similarities[wrong & similarities.isfinite()].sort().values
    own = similarities[people, :, people].contiguous().nan_to_num(-torch.inf)
    below, upto = torch.searchsorted(scores, own), torch.searchsorted(scores, own, right=True)
    return ((below + upto) / 2 / max(1, len(scores))).reshape(embedded.shape[:-1])


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Spearman's rank correlation of two figures (N,), where both are finite; ties share their mean rank. None where it isn't defined."""
    both = one.isfinite() & other.isfinite()
    ranked = []
    for values in (one[both].double(), other[both].double()):
        known = values.sort().values
        ranked.append((torch.searchsorted(known, values) + torch.searchsorted(known, values, right=True)).double())
    found = torch.corrcoef(torch.stack(ranked))[0, 1].item() if both.sum() > 2 else math.nan
    return round(found, 3) if math.isfinite(found) else None


def copied(embedded: Tensor, references: Tensor, training: Tensor) -> Tensor:
    """Whether a picture (N, ..., D) is more similar to any training person (M, D) than to its own reference (N, D): (N, ...) of 0 and 1."""
    return ((embedded @ training.mT).amax(-1) > similarity(embedded, references)).float()


def context_right(found: list[dict[str, str]], asked: list[dict[str, str]]) -> Tensor:
    """Whether the contexts found in a picture include all that its prompt asks for: (N,) of 0 and 1."""
    return torch.tensor([float(all(f[kind] == value for kind, value in a.items())) for f, a in zip(found, asked, strict=True)])


def psnr(pictures: Tensor, truths: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (N, ..., 3, H, W) in -1..1: (N, ...)."""
    return -10 * ((pictures - truths).square().mean((-3, -2, -1)) / 4).clamp(min=1e-10).log10()


def interval(values: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and limits of the 95 % interval of values (N, ...), by bootstrap over people (the first dimension)."""
    people = values.flatten(1).double().mean(1) if values.ndim > 1 else values.double()
    draws = torch.randint(len(people), (resamples, len(people)), generator=torch.Generator().manual_seed(seed))
    means = people[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return people.mean().item(), low, high
