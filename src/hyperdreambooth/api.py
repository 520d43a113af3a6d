"""The Python API.

from hyperdreambooth import HyperDreamBooth
hdb = HyperDreamBooth.from_pretrained("toon")
me = hdb.personalize("face.png", steps=25)
me.save("me.safetensors")
images = hdb.generate("a pencil sketch of a [V] face", me, seed=0)
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import formats, photos
from .assets import toon
from .backbones import Backbone, best_for, load_backbone, wrap
from .errors import InputError
from .folders import caption_of, list_identities
from .hub import push
from .lora import LoraSet
from .personal_lora import PLACEHOLDER, RARE_TOKEN, PersonalLora
from .pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork
from .progress import say
from .sampling import generate
from .settings import SCRATCH, GenerateChoices, GenerateConfig, PersonalizeChoices, PersonalizeConfig, resolve
from .stages.describe import describe, strangeness
from .stages.dreambooth import Subject, finish, personalize
from .trainable_lora import PredictedLora

Photos = Sequence[str | Path | Image.Image] | str | Path | Image.Image | Tensor  # Files, pictures, or `read_photos`'s tensor.
OnStep = Callable[[int, LoraSet], bool] | None


class HyperDreamBooth:
    """A base and, where there is one for it, its hypernetwork: makes personal LoRAs and draws with them."""

    def __init__(self, backbone: Backbone, base: str, source: PredictedLora | None = None, info: HyperNetworkInfo | None = None):
        self.backbone, self.base, self.source, self.info = backbone, base, source, info
        known = backbone.pipe.tokenizer.get_vocab() if getattr(backbone.pipe, "tokenizer", None) else {}
        self.identifier = PLACEHOLDER if PLACEHOLDER in known else RARE_TOKEN
        self.prompt = info.prompt if info else f"a {PLACEHOLDER} face"

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path = "toon",
        *,
        hypernetwork: str | Path | None = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        prediction: str = "auto",
        parts: Sequence[str | Path] = (),
        quantize: str | None = None,
    ) -> HyperDreamBooth:
        """Opens a base and its hypernetwork.

        Args:
            base: "toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint, or a hub id.
            hypernetwork: a directory or hub id; None for none; "auto" takes the shipped one for toon, none elsewhere.
            device: cuda, mps or cpu; by default the first of these that is available.
            dtype: the frozen base's precision; by default bfloat16 on a CUDA card that supports it, float16 on older ones, float32
                elsewhere and for toon, which is small.
            prediction, parts, quantize: as `load_backbone` takes them.
        """
        backbone = load_backbone(base, **best_for(base, device, dtype), prediction=prediction, parts=parts, quantize=quantize)
        if hypernetwork == "auto":
            hypernetwork = toon.directory("hypernetwork") if str(base) == "toon" else None
        return cls._opened(backbone, str(base), hypernetwork)

    @classmethod
    def from_pipeline(cls, pipe: Any, *, hypernetwork: str | Path | None = None) -> HyperDreamBooth:
        """The same with a pipeline of diffusers that is loaded already, which keeps its device and precision.

        Its models are frozen. Raises InputError for a pipeline of a family that isn't supported.
        """
        name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
        return cls._opened(wrap(pipe, name), name, hypernetwork)

    @classmethod
    def _opened(cls, backbone: Backbone, base: str, hypernetwork: str | Path | None) -> HyperDreamBooth:
        if hypernetwork is None or str(hypernetwork) == "none":
            return cls(backbone, base)
        source, info = load_hypernetwork(hypernetwork, backbone)
        return cls(backbone, base, source.to(backbone.device), info)

    def __repr__(self) -> str:
        dtype = str(self.backbone.denoiser.dtype).removeprefix("torch.")
        mode = self.info.mode if self.info else "none"
        return f"HyperDreamBooth({self.base!r}, family={self.backbone.family}, hypernetwork={mode}, device={self.device}, dtype={dtype})"

    def push_to_hub(self, name: str, *, public: bool = False) -> str:
        """Uploads the hypernetwork and its card to the hub as `user/name`; returns the address. Raises InputError."""
        if self.source is None or self.info is None:
            raise InputError(f"there is no hypernetwork for {self.base} here to upload.")
        with tempfile.TemporaryDirectory() as folder:
            save_hypernetwork(folder, self.source, self.info)
            return push(folder, name, public=public)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def person(self, loras: LoraSet, prompt: str | None = None, *, metadata: Mapping[str, str] | None = None, **more: Any) -> PersonalLora:
        """A PersonalLora of this base from one person's update, without a batch dimension. `more`: further fields of PersonalLora."""
        about = {**(metadata or {}), **formats.base_metadata(self.backbone.pipe, self.base, self.backbone.size)}
        return PersonalLora(loras, self.base, **{"identifier": self.identifier, "prompt": prompt or self.prompt, **more}, metadata=about)

    def personalize_config(self, choices: PersonalizeChoices | PersonalizeConfig | None = None, **changes: Any) -> PersonalizeConfig:
        """The settings of a fine-tuning, by precedence: `changes`, `choices`, the hypernetwork's own, general defaults."""
        own = ("hypernetwork", self.info.personalize if self.info else {}), ("from scratch", {} if self.source else SCRATCH)
        return resolve(PersonalizeConfig, ("given", changes), ("given", choices or {}), *own)

    def generate_config(self, choices: GenerateChoices | GenerateConfig | None = None, **changes: Any) -> GenerateConfig:
        """The settings of generation, by precedence: `changes`, `choices`, the hypernetwork's own, the family's, general defaults."""
        own = ("hypernetwork", self.info.generate if self.info else {}), ("family", self.backbone.generation)
        return resolve(GenerateConfig, ("given", changes), ("given", choices or {}), *own)

    def read_photos(self, files: Photos, *, crop: photos.Crop = "auto", face: int | None = None) -> tuple[Tensor, list[str]]:
        """Photos in the base's size, (n, 3, H, W) in -1..1, and notes on them, see `photos.read_photos`."""
        return photos.read_photos(files, self.backbone.size, crop, face)

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Photos (n, 3, H, W) of one person -> tokens (layers, width), a mean over photos. Raises InputError without a hypernetwork."""
        if self.source is None:
            raise InputError(f"there is no hypernetwork for {self.base}: give one, or fine-tune from scratch (`--hypernetwork none`).")
        return self.source.tokens(pixels.to(self.device)).mean(0)

    def describe(self, latents: Tensor, predicted: LoraSet | None = None) -> list[str]:
        """Prompts that describe photos, latents (N, C, h, w), in words of the hypernetwork that fit best by the base's loss; without such
        words, `prompt`. `predicted`: updates of the people, a batch of 1 or N."""
        slots = self.info.describe if self.info else []
        texts = describe(self.backbone, latents, slots, predicted) if slots else [self.prompt] * len(latents)
        return [text.replace(PLACEHOLDER, self.identifier) for text in texts]

    def unlike(self, latents: Tensor) -> str:
        """A warning where the `strangeness` of photos, latents (N, C, h, w), is above the hypernetwork's limit `familiar`, else ""."""
        limit = self.info.familiar if self.info else None
        if not limit or (found := strangeness(self.backbone, latents, self.prompt).max().item()) <= limit:
            return ""
        unlike = f"this photo is unlike anything that {self.base} was trained on"
        figures = f"its loss is {found:.2f}, familiar pictures stay under {limit:.2f}"
        return f"{unlike} ({figures}): what is drawn won't look like the person. Take a base that can draw such photos (--base)."

    def naming(self, prompt: str | None) -> str | None:
        """A caption as a prompt: one that doesn't name the person has the person's own prompt put before it; None stays None."""
        return f"{self.prompt}, {prompt}" if prompt and PLACEHOLDER not in prompt else prompt

    def personalize(
        self,
        files: Photos,
        *,
        prompt: str | None = None,
        directory: str | Path | None = None,
        on_step: OnStep = None,
        quiet: bool = False,
        config: PersonalizeChoices | PersonalizeConfig | None = None,
        **changes: Any,
    ) -> PersonalLora:
        """A person's LoRA from one photo or several: predict, fine-tune, merge.

        Args:
            changes: any field of PersonalizeChoices, such as `steps` (0 keeps the prediction; default: 25, or 300 without a hypernetwork).
            config: the same as one object; `changes` win over it.
            prompt: what the photos show, such as "a [V] face wearing a cap on a blue background": what it names isn't learned as
                part of the person. Default: what `describe` finds in each.
            directory: where checkpoints are kept, from which an interrupted fine-tuning of the same photos resumes.
            on_step: called after every fine-tuning step with the number of steps done and the person's update so far, which
                `generate` takes; if it returns True, fine-tuning ends there. Called in this thread, between two steps.
        """
        config = self.personalize_config(config, **changes)
        pixels, notes = self.read_photos(files, crop=config.crop, face=config.face)
        return self._people([pixels], [notes], [prompt], config, directory=directory, on_step=on_step, quiet=quiet)[0]

    def personalize_all(
        self,
        people: Mapping[str, Photos] | str | Path,
        *,
        side_by_side: int | None = None,
        on_refused: Callable[[str, InputError], None] | None = None,
        quiet: bool = False,
        config: PersonalizeChoices | PersonalizeConfig | None = None,
        **changes: Any,
    ) -> Iterator[tuple[str, PersonalLora]]:
        """Personalizes many people, several in one batch, each as `personalize` would alone; yields (name, LoRA) as they are done.

        Args:
            people: a folder (see `folders.list_identities`; a caption beside a person's only photo is its prompt), or name -> photos.
            side_by_side: people in a batch; halved where memory runs out. Default: 32 on a GPU, 8 elsewhere.
            on_refused: called with a name and the error where a photo can't be read; by default prints it on stderr. The others go on.
        """
        config = self.personalize_config(config, **changes)
        known = list_identities(people) if isinstance(people, (str, Path)) else people
        count = side_by_side or self.backbone.side_by_side
        ready: dict[tuple[int, int], list[tuple[str, Tensor, list[str], str | None]]] = {}
        for number, (name, files) in enumerate(known.items(), 1):
            try:
                pixels, notes = self.read_photos(files, crop=config.crop, face=config.face)
                prompt = self.naming(caption_of(files))
                # people of one batch have the same number of photos, and of chunks, as the denoiser attends to empty ones too
                chunks = self.backbone.chunks([(prompt or self.prompt).replace(PLACEHOLDER, self.identifier)])
                ready.setdefault((len(pixels), chunks), []).append((name, pixels, notes, prompt))
            except InputError as error:
                (on_refused or (lambda who, why: say(f"{who} is left out: {why}")))(name, error)
            for group in list(ready.values()):
                while len(group) >= count or (group and number == len(known)):
                    batch, group[:] = group[:count], group[count:]
                    try:
                        names, pictures, said, texts = zip(*batch, strict=True)
                        made = self._people(pictures, said, texts, config, quiet=quiet)
                    except torch.OutOfMemoryError:
                        if len(batch) == 1:
                            raise
                        count = max(1, len(batch) // 2)
                        group[:0] = batch
                        continue
                    yield from zip(names, made, strict=True)

    @torch.inference_mode(False)  # this turns gradients on too: callers such as web servers turn them off
    def _people(
        self,
        pixels: Sequence[Tensor],
        notes: Sequence[list[str]],
        prompts: Sequence[str | None],
        config: PersonalizeConfig,
        *,
        directory: str | Path | None = None,
        on_step: OnStep = None,
        quiet: bool = False,
    ) -> list[PersonalLora]:
        """Personalizes people in one batch, by n photos (n, 3, size, size) each, n being the same for all. `on_step`: for one person."""
        clocks, count, each = [time.perf_counter()], len(pixels), len(pixels[0])
        tokens = torch.stack([self.predict(mine) for mine in pixels]) if self.source else None
        predicted = self.source.lightweight(tokens).detach() if self.source else None
        clocks.append(time.perf_counter())
        latents = torch.stack([self.backbone.encode_images(mine).float() for mine in pixels])  # float32, whatever the base's precision
        warnings = [self.unlike(mine) for mine in latents]
        for text in filter(None, () if quiet else itertools.chain(*notes, warnings)):
            say(text)
        texts = []
        for index, (prompt, warning) in enumerate(zip(prompts, warnings, strict=True)):
            given = (prompt or self.prompt).replace(PLACEHOLDER, self.identifier)
            mine = predicted.select(slice(index, index + 1)) if predicted else None
            plain = prompt or warning or config.steps == 0
            texts.append([given] * each if plain else self.describe(latents[index], mine))
        clocks.append(time.perf_counter())
        step = (lambda done, loras: on_step(done, loras.select(0))) if on_step else None
        more: dict[str, Any] = {"directory": directory, "on_step": step, "quiet": quiet}
        loras, report = personalize(self.backbone, Subject(latents, texts), predicted, config, **more)
        clocks.append(time.perf_counter())
        merged = [finish(loras.select(index)) for index in range(count)]
        ends = zip(("predict", "describe", "finetune", "export"), itertools.pairwise([*clocks, time.perf_counter()]), strict=True)
        seconds = {name: (after - before) / count for name, (before, after) in ends}
        made = []
        for index, mine in enumerate(merged):
            own: dict[str, Any] = {"shown": texts[index], "warning": warnings[index], "losses": report.losses, "seconds": seconds}
            if self.source and predicted is not None and tokens is not None:
                own |= {"predicted": predicted.select(index), "tokens": tokens[index].cpu(), "lightweight": self.source.lightweight}
            made.append(self.person(mine, notes=notes[index], **own, metadata={"hyperdreambooth.steps": str(report.steps)}))
        return made

    def load(self, path: str | Path) -> PersonalLora:
        """A LoRA (a file, a folder or a hub id), or a token file of this hypernetwork, as a PersonalLora.

        Raises InputError where it is neither, or made for another base.
        """
        path = formats.find_lora(path)
        if formats.is_tokens(path):
            if self.source is None:
                raise InputError(f"{path} is a token file, and there is no hypernetwork here to read it with. Name its own.")
            return self.from_tokens(formats.read_tokens(path, self.source.lightweight))
        file = formats.read_lora(path, self.backbone.components)
        loras = file.loras.map(lambda tensor: tensor.to(self.device, torch.float32))
        identifier = file.metadata.get("hyperdreambooth.identifier") or self.identifier
        prompt = file.metadata.get("modelspec.trigger_phrase", "").replace(identifier, PLACEHOLDER)
        return self.person(loras, prompt, identifier=identifier, metadata=file.metadata, convolutions=file.convolutions)

    def from_tokens(self, tokens: Tensor) -> PersonalLora:
        """Tokens (layers, width) of this hypernetwork, or a blend of them, as a PersonalLora. Raises InputError without a hypernetwork."""
        if self.source is None:
            raise InputError(f"there is no hypernetwork for {self.base}, so its tokens mean nothing here.")
        predicted = self.source.lightweight(tokens[None].to(self.device)).detach().select(0)
        return self.person(finish(predicted), predicted=predicted, tokens=tokens, lightweight=self.source.lightweight)

    def mix(self, people: Sequence[tuple[PersonalLora, float]]) -> PersonalLora:
        """Blends several people, each with a weight, into one.

        It is the weighted sum of their tokens where all of them have tokens (which leave fine-tuning out), else of their updates.
        Raises InputError for nobody.
        """
        if not people:
            raise InputError("there is nobody to mix.")
        tokens = [person.tokens * weight for person, weight in people if person.tokens is not None]
        if self.source and len(tokens) == len(people):
            return self.from_tokens(torch.stack(tokens).sum(0))
        total = sum((person.loras.scaled(weight) for person, weight in people), LoraSet())
        convolutions = frozenset[str]().union(*(person.convolutions for person, _ in people))
        return self.person(finish(total), identifier=people[0][0].identifier, convolutions=convolutions)

    def generate(
        self,
        prompts: Sequence[str] | str,
        person: PersonalLora | LoraSet | str | Path | None = None,
        *,
        styles: Sequence[formats.Style] = (),
        on_picture: Callable[[int], None] | None = None,
        config: GenerateChoices | GenerateConfig | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Pictures, `count` for each prompt, in order.

        Args:
            person: a PersonalLora, a LoRA file or a token file; None generates with the base alone.
            styles: LoRAs of any kind, for every guidance branch: each a file, a folder or a hub id, or (one of these, strength).
            changes: any field of GenerateChoices, such as `steps`, `seed` (of each prompt's first picture; the next ones count up) and
                `count`; they win over `config`.
        """
        wanted = [prompts] if isinstance(prompts, str) else list(prompts)
        if not wanted:
            raise InputError(f'there is no prompt. Write what to draw, such as "{self.prompt}".')
        config = self.generate_config(config, **changes)
        person = self.load(person) if isinstance(person, (str, Path)) else person
        if person is not None and not isinstance(person, (PersonalLora, LoraSet)):
            one = f"one person at a time: a PersonalLora, a LoRA or token file, or None, not a {type(person).__name__}"
            raise InputError(f"generate draws {one}. Call it for each person, or blend several with mix.")
        loras, identifier = (person.loras, person.identifier) if isinstance(person, PersonalLora) else (person, self.identifier)
        without = [prompt for prompt in wanted if PLACEHOLDER not in prompt and identifier not in prompt]
        if loras and without:
            say(f'"{without[0]}" doesn\'t name the person: write {PLACEHOLDER} where the person belongs.')
        texts = [prompt.replace(PLACEHOLDER, identifier) for prompt in wanted for _ in range(config.count)]
        seeds = [config.seed + i for _ in wanted for i in range(config.count)]
        with formats.styled(self.backbone.pipe, styles):
            pixels = generate(self.backbone, texts, seeds, config, personal=loras, on_picture=on_picture)
        return photos.to_images(pixels)

    def picture_metadata(self, prompt: str, seed: int, config: GenerateConfig, loras: Sequence[tuple[str, float]]) -> dict[str, str]:
        """Metadata of a generated PNG: how it was made, and that it is generated."""
        made = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("seed", "count", "batch", "origins")}
        made |= {"base": formats.public_name(self.base), "loras": [[formats.public_name(name), weight] for name, weight in loras]}
        return photos.generated({"prompt": prompt, "seed": seed, **made})
