"""Generates, measures and keeps pictures in the same way for every method: on the same people, prompts and seeds.

Pictures are kept in files by method and person beside the output, so that a run that was stopped goes on.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import photos
from ..api import HyperDreamBooth
from ..checkpoint import read_tensors, save_tensors
from ..errors import InputError
from ..lora import LoraSet
from ..personal_lora import PLACEHOLDER
from ..progress import say
from ..sampling import generate
from ..settings import GenerateConfig
from ..stages.dreambooth import Subject, prior_latents
from . import metrics
from .judges import Dlib, Vision
from .methods import METHODS, Method, train
from .protocol import GUIDANCE, IDENTITY_GUIDANCE, Atlas, Judges

PLAIN = "a face"  # A prompt without the trigger: a person whom its pictures resemble has leaked into the class.
LOOKALIKES = 20  # How many of the gallery, those most like a person, "rank1_lookalikes" has to tell the person from.
MARKS = (5, 10, 25, 50, 100, 200)  # Training steps after which the methods of the curves are measured.
CURVES = ("DreamBooth", "DreamBooth-LoRA 4", "hypernetwork + fine-tuning")  # Methods with a curve over steps.
PIXEL = "pixel"  # On photos, the name of figures that compare thumbnails of 16 x 16 pixels instead of embeddings.


def named(judge: str, figure: str) -> str:
    """A figure's name with its judge's as a prefix; those of the embedded world's judges, "", have none."""
    return f"{judge}.{figure}".removeprefix(".")


@dataclass
class Bench:
    """What every method is measured on. `stamp` is a hash of the weights, photos and settings that all pictures depend on, `faithful_stamp`
    one of the faithful hypernetwork's weights, which only the pictures of its own methods depend on."""

    hdb: HyperDreamBooth
    atlas: Atlas
    judges: Judges
    cache: Path
    stamp: str
    faithful: HyperDreamBooth | None = None
    faithful_stamp: str = ""
    count: int = 1  # Pictures of each prompt.
    extras: bool = True  # Whether to generate the prompts for leakage, prior drift and diversity too: a search doesn't need them.
    generation: GenerateConfig | None = None  # How pictures are generated; default: with GUIDANCE.
    photo_embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # From `read_people`.
    descriptions: dict[tuple[int, bool], str] = field(default_factory=dict)  # Of photos, by person and whether a prediction helped.
    last_updates: dict[str, LoraSet] = field(default_factory=dict)  # Of the method that was run last; its guided variant reuses them.
    measured: dict[Path, dict[str, Tensor]] = field(default_factory=dict, init=False)  # What `measure` returned, by the pictures' file.

    @property
    def prompts(self) -> list[str]:
        """The atlas's prompts, then twice the class without the trigger, then twice the person's plain prompt."""
        return [*self.atlas.prompts, *([PLAIN, PLAIN, self.hdb.prompt, self.hdb.prompt] if self.extras else [])]

    @cached_property
    def prior(self) -> Tensor:
        """Latents of 16 pictures of the class, for prior preservation."""
        return prior_latents(self.hdb.backbone, PLAIN, 16, seed=0)

    def steps(self, method: Method) -> int:
        """The number of steps that the method trains, 0 for none."""
        return method.steps or (self.hdb.personalize_config().steps if method.kind == "relaxed" else 0)

    def marks(self, name: str, method: Method) -> list[int]:
        """The steps before the last one after which a method of the curves is measured; [] for other methods."""
        begins = [0] * (method.kind == "relaxed")
        return [mark for mark in (*begins, *MARKS) if name in CURVES and mark < self.steps(method)]

    def lacks(self, method: Method) -> str:
        """A sentence about what the method needs and doesn't have here, or ""."""
        if method.kind in ("true", "reconstruction") and not self.atlas.truths.numel():
            return "photos have no right answers"
        if method.kind in ("prediction", "relaxed") and not (self.faithful if method.faithful else self.hdb.source):
            return f"there is no such hypernetwork for {self.hdb.base}: name one with --{'faithful' if method.faithful else 'hypernetwork'}"
        full = method.kind == "full" and self.hdb.backbone.denoiser.dtype != torch.float32
        return "all weights are trained, which needs --dtype float32" if full else ""

    def people(self, method: Method, who: Sequence[int]) -> tuple[Subject | None, LoraSet | None]:
        """The people's photos with their descriptions, None where nothing is trained; and the predicted updates that the method uses.

        The base describes the photos: alone, or with the predicted updates where the method uses them.
        """
        predicted, photo = None, self.atlas.references[list(who)]
        source = (self.faithful if method.faithful and self.faithful else self.hdb).source
        if (helped := method.kind in ("prediction", "relaxed")) and source is not None:
            with torch.no_grad():
                predicted = source(photo.to(self.hdb.device)).detach()
        if not self.steps(method):
            return None, predicted
        latents = self.hdb.backbone.encode_images(photo).float()
        for index, person in enumerate(who):
            if (person, helped) not in self.descriptions:
                one = slice(index, index + 1)
                self.descriptions[person, helped] = self.hdb.describe(latents[one], predicted.select(one) if predicted else None)[0]
        texts = [[self.descriptions[person, helped]] for person in who]
        return Subject(latents[:, None], texts, prior=self.prior if method.prior else None), predicted

    def draw(self, who: Sequence[int], prompts: Sequence[int], loras: LoraSet | None, guided: bool = False) -> Tensor:
        """Pictures (people, prompts, count, 3, H, W) in -1..1 of some of `self.prompts`, by index; without `loras`, by the base alone.

        Each one's seed follows from its person, prompt and number alone. Raises InputError for pictures that aren't finite.
        """
        jobs = [(index, prompt, number) for index in range(len(who)) for prompt in prompts for number in range(self.count)]
        mine = loras.select(torch.tensor([index for index, _, _ in jobs], device=self.hdb.device)) if loras else None
        texts = [self.prompts[prompt].replace(PLACEHOLDER, self.hdb.identifier) for _, prompt, _ in jobs]
        config = self.generation or self.hdb.generate_config(**GUIDANCE, batch=40)
        config = dataclasses.replace(config, **IDENTITY_GUIDANCE) if guided else config
        seeds = [who[index] * 1000 + prompt * 10 + number for index, prompt, number in jobs]
        drawn = generate(self.hdb.backbone, texts, seeds, config, personal=mine)
        if not drawn.isfinite().all():
            raise InputError("some pictures hold values that aren't finite, so there is nothing to measure. Try --dtype float32.")
        return drawn.reshape(len(who), len(prompts), self.count, *drawn.shape[1:])

    def file(self, name: str, method: Method, step: int, person: int) -> Path:
        """Where one person's pictures after `step` steps are kept."""
        settings = {key: value for key, value in dataclasses.asdict(method).items() if key not in ("rates", "like")}
        depends = [settings, self.stamp, self.prompts, self.count, self.faithful_stamp * method.faithful]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        partial = "" if step == self.steps(method) else "-begun"  # the name tells them apart: before the end there are fewer prompts
        return self.cache / f"{name.replace(' ', '-').replace(',', '')}-{key}" / f"{person:03d}-{step}{partial}.safetensors"

    def missing(self, name: str, method: Method, who: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Those of the people whose pictures after any of these steps aren't kept yet."""
        if method.kind in ("true", "reconstruction"):
            return []
        return [person for person in who if not all(self.file(name, method, step, person).is_file() for step in steps)]

    def make(self, name: str, method: Method, who: Sequence[int], marks: Sequence[int] = ()) -> None:
        """Personalizes the people whose pictures aren't in the cache, and generates these: all prompts at the end, those of the atlas alone
        after `marks` steps. Full DreamBooth and textual inversion take one person at a time."""
        end = self.steps(method)
        missing = self.missing(name, method, who, (*marks, end))
        if method.kind in ("full", "words") and len(missing) > 1:
            for person in missing:
                self.make(name, method, [person], marks)
            return
        if not missing:
            return
        say(f"{name}: people {missing[0] + 1} to {missing[-1] + 1}")
        same = f"{dataclasses.replace(method, guided=False)} {missing}"

        def keep(step: int, loras: LoraSet | None) -> None:
            shown = range(len(self.prompts if step == end else self.atlas.prompts))
            drawn = ((self.draw(missing, shown, loras, method.guided).cpu() + 1) * 127.5).round().to(torch.uint8)
            for person, pictures in zip(missing, drawn, strict=True):
                save_tensors(self.file(name, method, step, person), {"pictures": pictures})
            self.last_updates = {same: loras} if loras and step == end else {}

        if method.guided and same in self.last_updates:
            keep(end, self.last_updates[same])
            return
        subject, predicted = self.people(method, missing)
        if 0 in (*marks, end):
            keep(0, predicted)
        if subject is not None:
            train(self.hdb, method, subject, predicted, (*marks, end), keep)

    def pictures(self, name: str, method: Method, step: int, person: int) -> Tensor:
        """What `make` kept of a person, or true or reconstructed renders: (prompts, count, 3, H, W) in -1..1."""
        truths, backbone = self.atlas.truths[person], self.hdb.backbone
        if method.kind in ("true", "reconstruction"):
            return (truths if method.kind == "true" else backbone.decode_images(backbone.encode_images(truths)).cpu())[:, None]
        return read_tensors(self.file(name, method, step, person))[0]["pictures"].float() / 127.5 - 1

    @cached_property
    def known(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By judge, the embeddings of people's own photos: of the given one (N, D); the gallery (N, D), which is the normalized mean of the
        others; and the mean cosine between the given one and the others (N,)."""
        found = {}
        for label, embedder in self.judges.embedders.items():
            each = [seen[label] for seen in self.photo_embeddings.values()]
            each = each or list(torch.stack([embedder.embed(self.atlas.references), embedder.embed(self.atlas.gallery)], 1))
            others = [vectors[1:][vectors[1:].isfinite().all(1)] for vectors in each]
            near = torch.stack([(rest @ vectors[0]).mean() for rest, vectors in zip(others, each, strict=True)])
            gallery = nn.functional.normalize(torch.stack([rest.mean(0) for rest in others]), dim=-1)
            found[label] = torch.stack([vectors[0] for vectors in each]), gallery, near
        return found

    def measure(self, pictures: Tensor, person: int, base: Tensor | None = None) -> dict[str, Tensor]:
        """Measures one person's pictures (prompts, count, 3, H, W): embeddings (prompts, count, D) by judge, figures (..., count) by name.

        Args:
            base: the base's own pictures of the class (2, count, 3, H, W); given where `pictures` has more than the atlas's prompts.
        """
        count, each, found = len(self.atlas.prompts), pictures.shape[1], dict[str, Tensor]()
        shown = (pictures if base is None else torch.cat([pictures, base])).flatten(0, 1)
        vectors = {label: embedder.embed(shown) for label, embedder in self.judges.embedders.items()}
        if not self.judges.classifier:
            small = nn.functional.adaptive_avg_pool2d(shown, 16).flatten(1)
            vectors[PIXEL] = nn.functional.normalize(small - small.mean(1, keepdim=True), dim=-1)
        for label, seen in vectors.items():
            mine, of_class, of_person, of_base = seen.unflatten(0, (-1, each)).tensor_split((count, count + 2, count + 4))
            found[label], embedder = mine, self.judges.embedders.get(label)
            if isinstance(embedder, Vision) and embedder.clip:
                texts = embedder.embed_texts([" ".join(prompt.replace(PLACEHOLDER, " ").split()) for prompt in self.atlas.prompts])
                found[named(label, "prompt")] = (mine * texts[:, None]).sum(-1)
            if embedder and base is not None:
                found[named(label, "leakage")] = (of_class - of_base) @ self.known[label][1][person]
            if label and base is not None and not isinstance(embedder, Dlib):  # dlib sees faces alone
                found[named(label, "prior_drift")] = (1 - (of_class * of_base).sum(-1)).clamp(min=0)
                found[named(label, "diversity")] = (1 - (of_person[:1] * of_person[1:]).sum(-1)).clamp(min=0)
        if judge := self.judges.classifier:
            mine, of_class, of_person = (part.flatten(0, 1) for part in pictures.tensor_split((count, count + 2)))
            answers = self.atlas.truths[person].repeat_interleave(each, 0)
            values = {
                "context": metrics.context_right(judge.classify(mine), [one for one in self.atlas.asked for _ in range(each)]),
                "pixel_distance": (mine - answers).abs().mean((1, 2, 3)) / 2,
                "perceptual_distance": judge.distance(mine, answers),
                "feature_distance": 1 - (found[""].flatten(0, 1) * self.judges.embedders[""].embed(answers)).sum(-1),
                "psnr": metrics.psnr(mine, answers),
            }
            if base is not None:
                values["prior_drift"] = judge.distance(of_class, base.flatten(0, 1))
                values["diversity"] = judge.distance(of_person[:each], of_person[each:])
            found |= {name: value.unflatten(0, (-1, each)) for name, value in values.items()}
        return found

    def measurements(self, name: str, method: Method, step: int, people: int) -> dict[str, Tensor]:
        """`measure` for the pictures that `make` kept of the first people: the same entries, stacked to (people, ...)."""
        files, count = [self.file(name, method, step, person) for person in range(people)], len(self.atlas.prompts)
        for person, file in enumerate(files):
            if file not in self.measured:
                drawn, base = self.pictures(name, method, step, person), None
                if len(drawn) > count:
                    base = self.pictures("base", METHODS["base"], 0, person)[count : count + 2]
                self.measured[file] = self.measure(drawn, person, base)
        return {key: torch.stack([self.measured[file][key] for file in files]) for key in self.measured[files[0]]}

    def figures(self, found: Mapping[str, Tensor]) -> dict[str, Any]:
        """All figures of the first people from their `measurements`, each as [mean, low, high] of a 95 % interval over people.

        A picture in which a judge finds no face counts as not recognized, and is left out of the means of similarity. The gallery is all
        people of the atlas, however few were drawn.
        """
        values = {key: value for key, value in found.items() if key not in (*self.judges.embedders, PIXEL)}
        for label, embedder in self.judges.embedders.items():
            vectors, everybody = found[label], self.known[label][1]
            references, gallery, near = (known[: len(vectors)] for known in self.known[label])
            crowd, order = torch.cat([everybody, self.judges.strangers]), metrics.ranks(vectors, everybody)
            own = {
                "rank1": (order == 0).float(),
                "rank1_lookalikes": (metrics.lookalike_ranks(vectors, crowd, LOOKALIKES) == 0).float(),
                "auc": metrics.auc(vectors, everybody),
                "similarity": metrics.similarity(vectors, gallery),
                "copying": metrics.similarity(vectors, references) - near[:, None, None],
            }
            if isinstance(embedder, Dlib):
                own["no_face"] = vectors.isnan().any(-1).float()
            if self.judges.classifier:
                own |= {"top5": (order < 5).float(), "rank1_crowd": (metrics.ranks(vectors, crowd) == 0).float()}
            if len(self.judges.training):
                own["copied"] = metrics.copied(vectors, references, self.judges.training)
            values |= {named(label, figure): value for figure, value in own.items()}
        if self.atlas.seen:
            halves = (("seen", torch.tensor(self.atlas.seen)), ("held_out", ~torch.tensor(self.atlas.seen)))
            values |= {f"{figure}_{half}": values[figure][:, which] for figure in ("rank1", "context") for half, which in halves}
        means = {key: value.flatten(1).double().nanmean(1) for key, value in values.items()}
        means = {key: mean[mean.isfinite()] for key, mean in means.items() if mean.isfinite().any()}
        return {key: [round(float(figure), 4) for figure in metrics.interval(mean)] for key, mean in means.items()}

    def points(self, name: str, method: Method, people: int, marks: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Makes the first people's pictures. Returns the figures after `marks` steps and at the end, with people and steps."""
        self.make(name, method, range(people), marks)
        steps = (*marks, self.steps(method))
        return [{"people": people, "steps": step, **self.figures(self.measurements(name, method, step, people))} for step in steps]

    def judged(self, pictures: Tensor, base: Tensor | None = None) -> dict[str, Any]:
        """All figures of any pictures (N, prompts, count, 3, H, W) of the first N people; `base` is as for `measure`, with N in front."""
        found = [self.measure(mine, person, None if base is None else base[person]) for person, mine in enumerate(pictures)]
        return self.figures({key: torch.stack([one[key] for one in found]) for key in found[0]})

    def likeness(self, methods: Mapping[str, Method], people: int, label: str) -> Tensor:
        """A judge's similarity of the first people to all pictures that the methods made of them: (people, pictures)."""
        vectors = [self.measurements(name, method, self.steps(method), people)[label].flatten(1, 2) for name, method in methods.items()]
        return metrics.similarity(torch.cat(vectors, 1), self.known[label][1][:people])

    def agreement(self, methods: Mapping[str, Method], people: int) -> dict[str, float | None]:
        """For each pair of judges, Spearman's correlation of their similarities over all pictures."""
        return {
            f"{one} / {other}": metrics.spearman(*(self.likeness(methods, people, label).flatten() for label in (one, other)))
            for one, other in itertools.combinations(self.judges.embedders if methods else (), 2)
        }

    def worst(self, methods: Mapping[str, Method], people: int, count: int = 3) -> dict[str, dict[str, list[Image.Image]]]:
        """Every method's pictures of the people whom the last method's pictures resemble least, by person and method."""
        if not methods:
            return {}
        last, judge = dict(list(methods.items())[-1:]), next(iter(self.judges.embedders))
        similarities, grids = self.likeness(last, people, judge).nanmean(1).nan_to_num(-1.0), {}
        for person in similarities.argsort()[:count].tolist():
            drawn = {name: self.pictures(name, method, self.steps(method), person)[:, 0] for name, method in methods.items()}
            rows = {"reference": self.atlas.references[[person]], **drawn}
            shown = {name: photos.to_images(row[: len(self.atlas.prompts)]) for name, row in rows.items()}
            who = list(self.photo_embeddings)[person] if self.photo_embeddings else f"Person {person + 1}"
            grids[f"{who}, similarity {similarities[person]:.2f}"] = shown
        return grids
