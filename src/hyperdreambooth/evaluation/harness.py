"""One way to draw, judge and keep: every method on the same people, prompts and seeds.

Pictures are kept by (method, person) beside the output, so that a run that was stopped goes on.
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
from .evaluate import GUIDANCE, IDENTITY_GUIDANCE, Atlas, Judges
from .judges import Dlib, Vision
from .methods import METHODS, Method, train

PLAIN = "a face"  # Names nobody: whoever is seen in its pictures has leaked.
LOOKALIKES = 20  # Each person's nearest of the gallery, among whom to be told apart is hardest.
MARKS = (5, 10, 25, 50, 100, 200)  # Steps after which the curves' methods are looked at.
CURVES = ("DreamBooth", "DreamBooth-LoRA 4", "hypernetwork + fine-tuning")
PIXEL = "pixel"  # Thumbnails of 16 x 16 pixels, which are compared beside what judges see in photos.


def named(judge: str, figure: str) -> str:
    """A judge's figure; those of the world's own judges have no prefix."""
    return f"{judge}.{figure}".removeprefix(".")


@dataclass
class Bench:
    """What every method is measured on. `stamp` changes with the weights and pictures that figures depend on, `faithful_stamp` with
    the faithful hypernetwork's, which only its own pictures depend on."""

    hdb: HyperDreamBooth
    atlas: Atlas
    judges: Judges
    cache: Path
    stamp: str
    faithful: HyperDreamBooth | None = None
    faithful_stamp: str = ""
    count: int = 1  # Pictures a prompt.
    extras: bool = True  # Whether to draw nobody's face and the plain person too: a search doesn't need them.
    drawn: GenerateConfig | None = None  # How pictures are drawn, where it isn't GUIDANCE.
    folk: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # What `read_people` saw in people's photos.
    texts: dict[tuple[int, bool], str] = field(default_factory=dict)
    tuned: dict[str, LoraSet] = field(default_factory=dict)  # The last people's updates: a guided method draws those of the one before it.
    looks: dict[Path, dict[str, Tensor]] = field(default_factory=dict, init=False)  # What `look` gave, by file.

    @property
    def prompts(self) -> list[str]:
        """The atlas's prompts, then twice a face that is nobody's, then twice the person without more."""
        return [*self.atlas.prompts, *([PLAIN, PLAIN, self.hdb.prompt, self.hdb.prompt] if self.extras else [])]

    @cached_property
    def prior(self) -> Tensor:
        return prior_latents(self.hdb.backbone, PLAIN, 16, seed=0)

    def steps(self, method: Method) -> int:
        return method.steps or (self.hdb.personalize_config().steps if method.kind == "relaxed" else 0)

    def marks(self, name: str, method: Method) -> list[int]:
        """The steps before the last one after which a method is looked at, for its curve."""
        begins = [0] * (method.kind == "relaxed")
        return [mark for mark in (*begins, *MARKS) if name in CURVES and mark < self.steps(method)]

    def lacks(self, method: Method) -> str:
        """What a method would need that isn't there, or ""."""
        if method.kind in ("true", "reconstruction") and not self.atlas.truths.numel():
            return "photos have no right answers"
        if method.kind in ("prediction", "relaxed") and not (self.faithful if method.faithful else self.hdb.source):
            return f"there is no such hypernetwork for {self.hdb.base}: name one with --{'faithful' if method.faithful else 'hypernetwork'}"
        full = method.kind == "full" and self.hdb.backbone.denoiser.dtype != torch.float32
        return "all weights are trained, which needs --dtype float32" if full else ""

    def people(self, method: Method, who: Sequence[int]) -> tuple[Subject | None, LoraSet | None]:
        """The people's photos, where they are trained on, with what they show in words; and what the hypernetwork predicts of them.

        The base alone tells what a photo shows, unless the method begins with a prediction.
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
            if (person, helped) not in self.texts:
                one = slice(index, index + 1)
                self.texts[person, helped] = self.hdb.describe(latents[one], predicted.select(one) if predicted else None)[0]
        texts = [[self.texts[person, helped]] for person in who]
        return Subject(latents[:, None], texts, prior=self.prior if method.prior else None), predicted

    def draw(self, who: Sequence[int], prompts: Sequence[int], loras: LoraSet | None, guided: bool = False) -> Tensor:
        """Pictures (people, prompts, count, 3, H, W), by the numbers of `prompts`; a seed follows from person, prompt and number alone.

        Raises InputError for pictures that aren't finite.
        """
        jobs = [(index, prompt, number) for index in range(len(who)) for prompt in prompts for number in range(self.count)]
        mine = loras.select(torch.tensor([index for index, _, _ in jobs], device=self.hdb.device)) if loras else None
        texts = [self.prompts[prompt].replace(PLACEHOLDER, self.hdb.identifier) for _, prompt, _ in jobs]
        config = self.drawn or dataclasses.replace(self.hdb.generate_config(), **GUIDANCE, batch=40)
        config = dataclasses.replace(config, **{**IDENTITY_GUIDANCE, "guidance": config.guidance}) if guided else config
        seeds = [who[index] * 1000 + prompt * 10 + number for index, prompt, number in jobs]
        drawn = generate(self.hdb.backbone, texts, seeds, config, personal=mine)
        if not drawn.isfinite().all():
            raise InputError("some pictures hold values that aren't finite, so there is nothing to measure. Try --dtype float32.")
        return drawn.reshape(len(who), len(prompts), self.count, *drawn.shape[1:])

    def file(self, name: str, method: Method, step: int, person: int) -> Path:
        settings = {key: value for key, value in dataclasses.asdict(method).items() if key not in ("rates", "like")}
        depends = [settings, self.stamp, self.prompts, self.count, self.faithful_stamp * method.faithful]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        begun = "" if step == self.steps(method) else "-begun"  # without it, pictures of an earlier version are of fewer prompts
        return self.cache / f"{name.replace(' ', '-').replace(',', '')}-{key}" / f"{person:03d}-{step}{begun}.safetensors"

    def missing(self, name: str, method: Method, who: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Those of the people whose pictures aren't kept yet."""
        if method.kind in ("true", "reconstruction"):
            return []
        return [person for person in who if not all(self.file(name, method, step, person).is_file() for step in steps)]

    def make(self, name: str, method: Method, who: Sequence[int], marks: Sequence[int] = ()) -> None:
        """Personalizes the people that aren't in the cache. Draws them at the end, and by the atlas's prompts alone after `marks` steps."""
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
            self.tuned = {same: loras} if loras and step == end else {}

        if method.guided and same in self.tuned:
            keep(end, self.tuned[same])
            return
        subject, predicted = self.people(method, missing)
        if 0 in (*marks, end):
            keep(0, predicted)
        if subject is not None:
            train(self.hdb, method, subject, predicted, (*marks, end), keep)

    def pictures(self, name: str, method: Method, step: int, person: int) -> Tensor:
        """What `make` drew of a person: (prompts, count, 3, H, W) in -1..1."""
        truths, backbone = self.atlas.truths[person], self.hdb.backbone
        if method.kind in ("true", "reconstruction"):
            return (truths if method.kind == "true" else backbone.decode_images(backbone.encode_images(truths)).cpu())[:, None]
        return read_tensors(self.file(name, method, step, person))[0]["pictures"].float() / 127.5 - 1

    @cached_property
    def known(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """What each judge sees in people's own photos: the one that is given (N, D), the mean of the others (N, D), and how near both are (N,)."""
        found = {}
        for label, eye in self.judges.eyes.items():
            each = [seen[label] for seen in self.folk.values()]
            each = each or list(torch.stack([eye.embed(self.atlas.references), eye.embed(self.atlas.gallery)], 1))
            others = [vectors[1:][vectors[1:].isfinite().all(1)] for vectors in each]
            near = torch.stack([(rest @ vectors[0]).mean() for rest, vectors in zip(others, each, strict=True)])
            gallery = nn.functional.normalize(torch.stack([rest.mean(0) for rest in others]), dim=-1)
            found[label] = torch.stack([vectors[0] for vectors in each]), gallery, near
        return found

    def look(self, pictures: Tensor, person: int, base: Tensor | None = None) -> dict[str, Tensor]:
        """What judges see in one person's pictures (prompts, count, 3, H, W): vectors (prompts, count, D) by judge, and figures (…, count).

        Args:
            base: the base's own pictures of nobody, where `pictures` go on with nobody's and the plain person's.
        """
        count, each, found = len(self.atlas.prompts), pictures.shape[1], dict[str, Tensor]()
        shown = (pictures if base is None else torch.cat([pictures, base])).flatten(0, 1)
        vectors = {label: eye.embed(shown) for label, eye in self.judges.eyes.items()}
        if not self.judges.classifier:
            small = nn.functional.adaptive_avg_pool2d(shown, 16).flatten(1)
            vectors[PIXEL] = nn.functional.normalize(small - small.mean(1, keepdim=True), dim=-1)
        for label, seen in vectors.items():
            mine, nobody, twice, before = seen.unflatten(0, (-1, each)).tensor_split((count, count + 2, count + 4))
            found[label], eye = mine, self.judges.eyes.get(label)
            if isinstance(eye, Vision) and eye.clip:
                texts = eye.embed_texts([" ".join(prompt.replace(PLACEHOLDER, " ").split()) for prompt in self.atlas.prompts])
                found[named(label, "prompt")] = (mine * texts[:, None]).sum(-1)
            if eye and base is not None:
                found[named(label, "leakage")] = (nobody - before) @ self.known[label][1][person]
            if label and base is not None and not isinstance(eye, Dlib):  # it looks at nothing but faces
                found[named(label, "prior_drift")] = (1 - (nobody * before).sum(-1)).clamp(min=0)
                found[named(label, "diversity")] = (1 - (twice[:1] * twice[1:]).sum(-1)).clamp(min=0)
        if judge := self.judges.classifier:
            mine, nobody, twice = (part.flatten(0, 1) for part in pictures.tensor_split((count, count + 2)))
            answers = self.atlas.truths[person].repeat_interleave(each, 0)
            values = {
                "context": metrics.context_right(judge.classify(mine), [one for one in self.atlas.asked for _ in range(each)]),
                "pixel_distance": (mine - answers).abs().mean((1, 2, 3)) / 2,
                "perceptual_distance": judge.distance(mine, answers),
                "feature_distance": 1 - (found[""].flatten(0, 1) * self.judges.eyes[""].embed(answers)).sum(-1),
                "psnr": metrics.psnr(mine, answers),
            }
            if base is not None:
                values["prior_drift"] = judge.distance(nobody, base.flatten(0, 1))
                values["diversity"] = judge.distance(twice[:each], twice[each:])
            found |= {name: value.unflatten(0, (-1, each)) for name, value in values.items()}
        return found

    def looked(self, name: str, method: Method, step: int, people: int) -> dict[str, Tensor]:
        """The same of what `make` drew of the first people, (people, ...) each."""
        files, count = [self.file(name, method, step, person) for person in range(people)], len(self.atlas.prompts)
        for person, file in enumerate(files):
            if file not in self.looks:
                drawn, base = self.pictures(name, method, step, person), None
                if len(drawn) > count:
                    base = self.pictures("base", METHODS["base"], 0, person)[count : count + 2]
                self.looks[file] = self.look(drawn, person, base)
        return {key: torch.stack([self.looks[file][key] for file in files]) for key in self.looks[files[0]]}

    def figures(self, found: Mapping[str, Tensor]) -> dict[str, Any]:
        """All figures of the first people out of what was seen of them, each as [mean, low, high] of a 95 % interval over people.

        A picture in which a judge finds no face is wrong, and is left out of its means of likeness. The people who weren't drawn fill the
        gallery up.
        """
        values = {key: value for key, value in found.items() if key not in (*self.judges.eyes, PIXEL)}
        for label, eye in self.judges.eyes.items():
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
            if isinstance(eye, Dlib):
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
        """Makes the first people's pictures; the figures after `marks` steps and at the end, with how many people and steps they are of."""
        self.make(name, method, range(people), marks)
        steps = (*marks, self.steps(method))
        return [{"people": people, "steps": step, **self.figures(self.looked(name, method, step, people))} for step in steps]

    def judged(self, pictures: Tensor, base: Tensor | None = None) -> dict[str, Any]:
        """All figures of pictures (N, prompts, count, 3, H, W) of the first people, however they were made; `base` is as for `look`, (N, ...)."""
        looks = [self.look(mine, person, None if base is None else base[person]) for person, mine in enumerate(pictures)]
        return self.figures({key: torch.stack([one[key] for one in looks]) for key in looks[0]})

    def likeness(self, methods: Mapping[str, Method], people: int, label: str) -> Tensor:
        """How alike the first people and all pictures that methods made of them are, as a judge sees it: (people, pictures)."""
        vectors = [self.looked(name, method, self.steps(method), people)[label].flatten(1, 2) for name, method in methods.items()]
        return metrics.similarity(torch.cat(vectors, 1), self.known[label][1][:people])

    def agreement(self, methods: Mapping[str, Method], people: int) -> dict[str, float | None]:
        """How far two judges order all pictures alike by their likeness to their people: Spearman's correlation."""
        return {
            f"{one} / {other}": metrics.spearman(*(self.likeness(methods, people, label).flatten() for label in (one, other)))
            for one, other in itertools.combinations(self.judges.eyes if methods else (), 2)
        }

    def worst(self, methods: Mapping[str, Method], people: int, count: int = 3) -> dict[str, dict[str, list[Image.Image]]]:
        """Every method's pictures of the people whom the last of them hits worst, by person and method."""
        if not methods:
            return {}
        alike, grids = self.likeness(dict(list(methods.items())[-1:]), people, next(iter(self.judges.eyes))).nanmean(1).nan_to_num(-1.0), {}
        for person in alike.argsort()[:count].tolist():
            drawn = {name: self.pictures(name, method, self.steps(method), person)[:, 0] for name, method in methods.items()}
            rows = {"reference": self.atlas.references[[person]], **drawn}
            shown = {name: photos.to_images(row[: len(self.atlas.prompts)]) for name, row in rows.items()}
            who = list(self.folk)[person] if self.folk else f"Person {person + 1}"
            grids[f"{who}, similarity {alike[person]:.2f}"] = shown
        return grids
