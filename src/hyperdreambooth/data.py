"""Identities to train on: latents and features are computed once, prompts too where no text encoder is a target."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import photos
from .backbones import Backbone, Conditioning
from .checkpoint import read_tensors, save_tensors
from .encoder import FaceEncoder
from .errors import InputError
from .folders import list_identities
from .progress import Progress, say

# Pictures, and pixels of the base's size, that are encoded at once, at most: at 1024 pixels an autoencoder takes gigabytes for one.
LARGEST_BATCH, BATCH_PIXELS = 32, 1 << 20
PIECE = 16  # Batches that one of several processes encodes at once.
Share = Callable[[Sequence[list[str]]], object]
"""Has other processes do pieces of work, of some words each."""


class PromptCache:
    """Prompts -> conditioning. Each distinct prompt is encoded once, unless a text encoder carries a LoRA (`trains_text`)."""

    def __init__(self, backbone: Backbone, *, trains_text: bool = False):
        self.backbone, self.trains_text = backbone, trains_text
        self.known: dict[tuple[str, int], Conditioning] = {}
        self.chunks: dict[str, int] = {}
        if trains_text:
            backbone.device_memory = "high"
            backbone.place_texts(backbone.device)

    def inputs(self, prompts: Sequence[str], prefix: str) -> Conditioning:
        """What `conditioning_in` takes out of a batch again, by names that begin with `prefix`."""
        if self.trains_text:
            return {f"{prefix}tokens.{key}": value for key, value in self.backbone.tokenize(list(prompts), self.longest(prompts)).items()}
        return {f"{prefix}{key}": value for key, value in self(prompts).items()}

    def longest(self, prompts: Sequence[str]) -> int:
        """The number of chunks that all of the prompts need in one batch."""
        self.chunks |= {prompt: self.backbone.chunks([prompt]) for prompt in dict.fromkeys(prompts) if prompt not in self.chunks}
        return max(self.chunks[prompt] for prompt in prompts)

    def __call__(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Conditioning:
        """The conditioning of prompts, as long as that of the prompts that will lie `beside` them in a batch."""
        chunks = self.longest([*prompts, *beside])
        if self.trains_text:
            return self.backbone.encode_prompts(list(prompts), chunks)
        fresh = [prompt for prompt in dict.fromkeys(prompts) if (prompt, chunks) not in self.known]
        if fresh:
            with torch.no_grad():
                encoded = self.backbone.encode_prompts(fresh, chunks)
            for index, prompt in enumerate(fresh):
                self.known[prompt, chunks] = {key: value[index] for key, value in encoded.items()}
        found = [self.known[prompt, chunks] for prompt in prompts]
        return {key: torch.stack([one[key] for one in found]) for key in found[0]}


def conditioning_in(batch: dict[str, Any], prefix: str, backbone: Backbone) -> Conditioning:
    """The conditioning that `PromptCache.inputs` put into a batch; text encoders that are trained compute it here."""
    found = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    tokens = {key.removeprefix("tokens."): value for key, value in found.items() if key.startswith("tokens.")}
    return backbone.encode_tokens(tokens) if tokens else found


@dataclass
class IdentityData:
    """N pictures of some people.

    latents (N, C, h, w); features (N, positions, dim) of a frozen encoder, or, where the encoder is trained, the pictures
    themselves, (N, 3, H, W) uint8; people (N,) index into `names`; one prompt each; `reference` (N,) says which pictures
    may stand for their person as the photo.
    """

    latents: Tensor
    features: Tensor
    people: Tensor
    names: list[str]
    prompts: list[str]
    reference: Tensor

    def __post_init__(self) -> None:
        # A VAE's latents come out with their channels last in memory; the same latents read from the cache have them first. The
        # CPU's kernels sum in another order for each, and round differently, so both get one order here.
        self.latents, self.features = self.latents.contiguous(), self.features.contiguous()
        self.of_person: list[list[int]] = [[] for _ in self.names]
        for index, person in enumerate(self.people.tolist()):
            self.of_person[person].append(index)

    def latents_of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Latents (pictures, C, h, w) of each of these people."""
        number = {name: index for index, name in enumerate(self.names)}
        return {name: self.latents[self.of_person[number[name]]] for name in names}

    def split(self, count: int) -> tuple[IdentityData, IdentityData]:
        """The data of all people but the last `count`, and the data of those. Raises InputError where nobody would be left."""
        last = self.people >= len(self.names) - count
        if last.all():
            raise InputError(f"{len(self.names)} identities are too few to keep {count} for validation.")
        first = len(self.names) - count
        return self._part(~last, 0, self.names[:first]), self._part(last, first, self.names[first:])

    def _part(self, mine: Tensor, first: int, names: list[str]) -> IdentityData:
        places = mine.nonzero().flatten().tolist()
        # pictures in a row become a view: a copy would be in memory beside the whole
        keep = slice(places[0], places[-1] + 1) if places and places[-1] - places[0] < len(places) else mine
        prompts = [self.prompts[place] for place in places]
        return IdentityData(self.latents[keep], self.features[keep], self.people[keep] - first, names, prompts, self.reference[keep])

    def inputs(self, chosen: Tensor) -> Tensor:
        """The hypernetwork's inputs for the chosen pictures (B,): features, or pictures (B, 3, H, W) in -1..1; float32."""
        found = self.features[chosen]
        return found.float() / 127.5 - 1 if found.dtype == torch.uint8 else found.float()

    def pair(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """For each chosen picture (B,) the index of a picture of the same person to predict from; another one where there is one."""
        others = []
        for index in chosen.tolist():
            mine = [i for i in self.of_person[int(self.people[index])] if self.reference[i]] or [index]
            mine = [i for i in mine if i != index] or mine
            others.append(mine[int(torch.randint(len(mine), (), generator=generator))])
        return torch.tensor(others)


class FolderOfPeople:
    """The people of a folder, see `load_identities`; their pictures are encoded when they are asked for, and none is kept."""

    def __init__(self, folder: str | Path, backbone: Backbone, crop: photos.Crop = "auto"):
        self.files, self.backbone, self.crop = list_identities(folder), backbone, crop
        self.names = list(self.files)

    def latents_of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Latents (pictures, C, h, w) of each of these people. Broken pictures are named and skipped, and so is who has no others."""
        files = [(name, file) for name in names for file in self.files[name]]
        data = _grouped(files, _encode(files, self.backbone, None, self.crop, quiet=True), "")
        return data.latents_of(data.names)


def load_identities(
    folder: str | Path,
    backbone: Backbone,
    encoder: FaceEncoder | None,
    prompt: str,
    *,
    crop: photos.Crop = "auto",
    cache: str | Path | None = None,
    share: Share | None = None,
) -> IdentityData:
    """Reads `identity/picture.png`, or one picture each, and encodes every picture once.

    Broken pictures are named, counted and skipped. With `cache`, latents and features are kept there under a key of the files' names,
    sizes and dates. An encoder that is trained gets the pictures, not features. Raises InputError for an empty folder.

    Args:
        share: with `cache`, has others encode pieces: the numbers of the first picture and of that after the last one, and the file to write,
            by `encoding`.
    """
    found = list_identities(folder)
    files = [(name, file) for name, group in found.items() for file in group]
    seen_by = encoder and (getattr(encoder.model, "name_or_path", ""), encoder.trained, encoder.size)
    config = f"{getattr(backbone.pipe, 'name_or_path', '')}|{seen_by}|{crop}|{backbone.size}"
    marks = config + "".join(f"{file}|{state.st_size}|{state.st_mtime_ns}" for _, file in files for state in [file.stat()])
    stamp = hashlib.sha256(os.fsencode(marks)).hexdigest()[:16]  # names of files needn't be UTF-8
    stored = Path(cache) / f"identities-{stamp}.safetensors" if cache else None
    if stored and stored.is_file():
        tensors, _ = read_tensors(stored)
    else:
        tensors = _shared(len(files), backbone, stored, share) if stored and share else _encode(files, backbone, encoder, crop)
        if not len(tensors["kept"]):
            raise InputError(f"none of the {len(files)} pictures of {folder} could be read.")
        if stored:
            save_tensors(stored, tensors)
            shutil.rmtree(stored.with_suffix(""), ignore_errors=True)
    return _grouped(files, tensors, prompt)


def encoding(folder: str | Path, backbone: Backbone, encoder: FaceEncoder, crop: photos.Crop) -> Callable[[Sequence[str]], None]:
    """Encodes a piece of a folder's pictures into a file, for `load_identities` in another process."""
    files = [(name, picture) for name, group in list_identities(folder).items() for picture in group]

    def encode(piece: Sequence[str]) -> None:
        start, end, file = piece
        save_tensors(file, _encode(files[int(start) : int(end)], backbone, encoder, crop, quiet=True))

    return encode


def _shared(count: int, backbone: Backbone, stored: Path, share: Share) -> dict[str, Tensor]:
    """What `_encode` makes, by others. Pieces are whole batches, and those that are there already are done."""
    size = PIECE * _together(backbone)
    parts = {start: stored.with_suffix("") / f"{start:09}.safetensors" for start in range(0, count, size)}
    share([[str(start), str(min(start + size, count)), str(file)] for start, file in parts.items() if not file.is_file()])
    found = {start: read_tensors(file)[0] for start, file in parts.items()}
    kept = torch.cat([part["kept"] + start for start, part in found.items()])
    whole = [part for part in found.values() if len(part["kept"])]
    tensors = {name: torch.cat([part[name] for part in whole] or [torch.zeros(0)]) for name in ("latents", "features")}
    return {**tensors, "kept": kept}


def _together(backbone: Backbone) -> int:
    """Pictures that are encoded at once."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // backbone.size**2))


def _grouped(files: list[tuple[str, Path]], tensors: dict[str, Tensor], prompt: str) -> IdentityData:
    """The pictures that `_encode` could read, by whose they are."""
    kept = [files[i][0] for i in tensors["kept"].tolist()]
    names = list(dict.fromkeys(kept))
    number = {name: index for index, name in enumerate(names)}
    people, reference = torch.tensor([number[name] for name in kept]), torch.ones(len(kept), dtype=torch.bool)
    return IdentityData(tensors["latents"], tensors["features"], people, names, [prompt] * len(kept), reference)


def decoded(files: Sequence[Path], size: int, crop: photos.Crop, many: int, progress: str = "") -> Iterator[dict[int, Image.Image]]:
    """Pictures as `photos.prepare` makes them, by their places in `files`, out of `many` files at a time, where any of these can be read.

    Threads decode the next ones meanwhile. Broken pictures are named and counted at the end. `progress`: what is said on the way.
    """
    skipped = []
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    # Pillow's warnings are silenced here for all threads at once: each thread's own silence would end another's
    with warnings.catch_warnings(action="ignore"), threads as pool, Progress(progress, len(files), quiet=not progress) as bar:
        ahead = [pool.submit(photos.prepare, file, size, crop) for file in files[:many]]
        for start in range(0, len(files), many):
            batch, images = ahead, {}
            ahead = [pool.submit(photos.prepare, file, size, crop) for file in files[start + many : start + 2 * many]]
            for index, future in enumerate(batch, start):
                try:
                    images[index] = future.result()[0]
                except InputError as error:
                    skipped.append(str(error))
            if images:
                yield images
            bar.update(start + len(batch))
    for message in skipped:
        say(f"skipped: {message}")
    if skipped:
        say(f"{len(skipped)} of {len(files)} pictures were skipped.")


def _seen_by(encoder: FaceEncoder | None, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 as `IdentityData.features` keeps them: features, or themselves in the encoder's size."""
    if encoder is None:
        return torch.zeros(len(pixels), 0, 0)
    if not encoder.trained:
        return encoder(pixels.to(next(encoder.parameters()).device)).cpu()
    return ((encoder.resized(pixels).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _encode(
    files: list[tuple[str, Path]], backbone: Backbone, encoder: FaceEncoder | None, crop: photos.Crop, *, quiet: bool = False
) -> dict[str, Tensor]:
    """Latents and features of the pictures that can be read, and `kept`, their places in `files`.

    Which pictures share a batch follows from `files` alone, since the batch decides how sums are rounded.
    """
    many, tensors, kept = _together(backbone), dict[str, Tensor](), list[int]()
    with torch.no_grad():
        for images in decoded([file for _, file in files], backbone.size, crop, many, "" if quiet else "encoding pictures"):
            # the CPU's convolutions are faster with channels last
            pixels = photos.to_tensor(list(images.values())).contiguous(memory_format=torch.channels_last)
            for name, values in (("latents", backbone.encode_images(pixels)), ("features", _seen_by(encoder, pixels))):
                if name not in tensors:  # room for all at once: gathered as a list they would be in memory twice
                    tensors[name] = torch.empty(len(files), *values.shape[1:], dtype=values.dtype)
                tensors[name][len(kept) : len(kept) + len(values)] = values
            kept += images
    return {name: tensors.get(name, torch.zeros(0))[: len(kept)] for name in ("latents", "features")} | {"kept": torch.tensor(kept, dtype=torch.long)}
