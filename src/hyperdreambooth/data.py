"""Training data: identities with VAE latents and face features that are computed once, and a cache of prompt embeddings."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
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

# Limits of a batch for the autoencoder, in pictures and in pixels: at 1024 x 1024 pixels one picture takes gigabytes.
LARGEST_BATCH, BATCH_PIXELS = 32, 1 << 20
PIECE = 16  # Batches in a piece, the unit of work that one of several processes encodes into one file.
Share = Callable[[Sequence[list[str]]], object]
"""Distributes pieces of work, each given as a list of strings, to other processes and waits for them."""


class PromptCache:
    """Prompts -> conditioning. Each distinct prompt is encoded once; with `trains_text`, while a text encoder is trained, at every call."""

    def __init__(self, backbone: Backbone, *, trains_text: bool = False):
        self.backbone, self.trains_text = backbone, trains_text
        self.known: dict[tuple[str, int], Conditioning] = {}
        self.chunks: dict[str, int] = {}
        if trains_text:
            backbone.device_memory = "high"
            backbone.move_text_encoders(backbone.device)

    def inputs(self, prompts: Sequence[str], prefix: str) -> Conditioning:
        """Entries of a batch for `conditioning_in`, named with `prefix`: the conditioning, or token ids if a text encoder is trained."""
        if self.trains_text:
            return {f"{prefix}tokens.{key}": value for key, value in self.backbone.tokenize(list(prompts), self.longest(prompts)).items()}
        return {f"{prefix}{key}": value for key, value in self(prompts).items()}

    def longest(self, prompts: Sequence[str]) -> int:
        """The number of token chunks that the longest of the prompts needs, to which a batch of them is padded."""
        self.chunks |= {prompt: self.backbone.chunks([prompt]) for prompt in dict.fromkeys(prompts) if prompt not in self.chunks}
        return max(self.chunks[prompt] for prompt in prompts)

    def __call__(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Conditioning:
        """The conditioning of prompts, padded to the chunks of the longest prompt here or in `beside`, the other prompts of the batch."""
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
    """The conditioning from the entries that `PromptCache.inputs` put into a batch; token ids are encoded here, with gradients."""
    found = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    tokens = {key.removeprefix("tokens."): value for key, value in found.items() if key.startswith("tokens.")}
    return backbone.encode_tokens(tokens) if tokens else found


@dataclass
class IdentityData:
    """N pictures of some people."""

    latents: Tensor  # (N, C, h, w).
    features: Tensor  # (N, positions, dim) of a frozen encoder; if the encoder is trained, the pictures (N, 3, H, W) as uint8.
    people: Tensor  # (N,): each picture's person, as an index into `names`.
    names: list[str]
    prompts: list[str]  # One for each picture.
    reference: Tensor  # (N,) bool: whether the picture may be the photo that the hypernetwork predicts from.

    def __post_init__(self) -> None:
        # Latents from the VAE are channels-last in memory, those read from the cache are channels-first. The CPU's kernels sum in a
        # different order for each, and so round differently; one layout for both gives the same results.
        self.latents, self.features = self.latents.contiguous(), self.features.contiguous()
        self.of_person: list[list[int]] = [[] for _ in self.names]
        for index, person in enumerate(self.people.tolist()):
            self.of_person[person].append(index)

    def latents_of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The latents (pictures, C, h, w) of each of these people, by name."""
        number = {name: index for index, name in enumerate(self.names)}
        return {name: self.latents[self.of_person[number[name]]] for name in names}

    def split(self, count: int) -> tuple[IdentityData, IdentityData]:
        """The data of all people but the last `count`, and that of the last `count`. Raises InputError if there are no others."""
        first = len(self.names) - count
        last = self.people >= first
        if last.all():
            raise InputError(f"{len(self.names)} identities are too few to keep {count} for validation.")
        return self._part(~last, 0, self.names[:first]), self._part(last, first, self.names[first:])

    def _part(self, mine: Tensor, first: int, names: list[str]) -> IdentityData:
        """The pictures of the mask `mine` (N,); their people are `names`, of which the first has the index `first` here."""
        places = mine.nonzero().flatten().tolist()
        # consecutive pictures are sliced, which is a view: a copy would take memory besides the whole
        keep = slice(places[0], places[-1] + 1) if places and places[-1] - places[0] < len(places) else mine
        prompts = [self.prompts[place] for place in places]
        return IdentityData(self.latents[keep], self.features[keep], self.people[keep] - first, names, prompts, self.reference[keep])

    def inputs(self, chosen: Tensor) -> Tensor:
        """The hypernetwork's float32 inputs for the pictures `chosen` (B,), given by index: features, or (B, 3, H, W) in -1..1."""
        found = self.features[chosen]
        return found.float() / 127.5 - 1 if found.dtype == torch.uint8 else found.float()

    def pair(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """For each picture of `chosen` (B,) the index of a random reference picture of the same person: another one, if there is any."""
        others = []
        for index in chosen.tolist():
            mine = [i for i in self.of_person[int(self.people[index])] if self.reference[i]] or [index]
            mine = [i for i in mine if i != index] or mine
            others.append(mine[int(torch.randint(len(mine), (), generator=generator))])
        return torch.tensor(others)


class FolderOfPeople:
    """The people of a folder (see `list_identities`), whose pictures are encoded on request and not kept in memory."""

    def __init__(self, folder: str | Path, backbone: Backbone, crop: photos.Crop = "auto"):
        self.files, self.backbone, self.crop = list_identities(folder), backbone, crop
        self.names = list(self.files)

    def latents_of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The latents (pictures, C, h, w) of each of these people who has a readable picture; broken ones are reported and skipped."""
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
    """Encodes every picture of a folder (see `list_identities`) into latents and features.

    Broken pictures are reported and skipped. For an encoder that is trained, the data holds the pictures instead of features.
    Raises InputError if there are no pictures or none can be read.

    Args:
        encoder: computes the features; None leaves them empty.
        cache: a folder where the results are kept, under a hash of the settings, the base's precision, whether OpenCV is installed, and
            the files' names, sizes and modification times.
        share: with `cache`, has other processes encode pieces by `encoding`: [start, end, file], the range of pictures and the output.
    """
    files = [(name, file) for name, group in list_identities(folder).items() for file in group]
    features = encoder and (getattr(encoder.model, "name_or_path", ""), encoder.trained, encoder.size)
    detector = find_spec("cv2") is not None  # without OpenCV, "auto" takes the middle where it would find a face
    about = getattr(backbone.pipe, "name_or_path", ""), features, crop, backbone.size, backbone.denoiser.dtype, detector
    config = "|".join(map(str, about))
    marks = config + "".join(f"{file}|{state.st_size}|{state.st_mtime_ns}" for _, file in files for state in [file.stat()])
    stamp = hashlib.sha256(os.fsencode(marks)).hexdigest()[:16]  # file names may be invalid UTF-8
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
    """A function that encodes a piece of a folder's pictures into a file, for `load_identities` in another process (see its `share`)."""
    files = [(name, file) for name, group in list_identities(folder).items() for file in group]

    def encode(piece: Sequence[str]) -> None:
        start, end, output = piece
        save_tensors(output, _encode(files[int(start) : int(end)], backbone, encoder, crop, quiet=True))

    return encode


def _shared(count: int, backbone: Backbone, stored: Path, share: Share) -> dict[str, Tensor]:
    """The result of `_encode` for all `count` pictures, from pieces that other processes encode. Pieces that exist already are reused."""
    size = PIECE * _batch_size(backbone)
    parts = {start: stored.with_suffix("") / f"{start:09}.safetensors" for start in range(0, count, size)}
    share([[str(start), str(min(start + size, count)), str(file)] for start, file in parts.items() if not file.is_file()])
    found = {start: read_tensors(file)[0] for start, file in parts.items()}
    kept = torch.cat([part["kept"] + start for start, part in found.items()])
    whole = [part for part in found.values() if len(part["kept"])]
    tensors = {name: torch.cat([part[name] for part in whole] or [torch.zeros(0)]) for name in ("latents", "features")}
    return {**tensors, "kept": kept}


def _batch_size(backbone: Backbone) -> int:
    """The number of pictures that are encoded at once."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // backbone.size**2))


def _grouped(files: list[tuple[str, Path]], tensors: dict[str, Tensor], prompt: str) -> IdentityData:
    """`IdentityData` from the result of `_encode`, with the names of the people who have a readable picture."""
    kept = [files[i][0] for i in tensors["kept"].tolist()]
    names = list(dict.fromkeys(kept))
    number = {name: index for index, name in enumerate(names)}
    people, reference = torch.tensor([number[name] for name in kept]), torch.ones(len(kept), dtype=torch.bool)
    return IdentityData(tensors["latents"], tensors["features"], people, names, [prompt] * len(kept), reference)


def decoded(files: Sequence[Path], size: int, crop: photos.Crop, many: int, progress: str = "") -> Iterator[dict[int, Image.Image]]:
    """Yields batches of up to `many` pictures from `photos.prepare`, as index in `files` -> picture; `progress` labels a progress bar.

    Threads decode the next batch meanwhile. Broken pictures are left out and reported at the end, as is how many pictures have each note
    of `photos.prepare`; empty batches are skipped.
    """
    skipped, notes = [], Counter[str]()
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    # Warnings are silenced here for all threads at once: each thread leaving its own catch_warnings would end that of the others
    with warnings.catch_warnings(action="ignore"), threads as pool, Progress(progress, len(files), quiet=not progress) as bar:
        ahead = [pool.submit(photos.prepare, file, size, crop) for file in files[:many]]
        for start in range(0, len(files), many):
            batch, images = ahead, {}
            ahead = [pool.submit(photos.prepare, file, size, crop) for file in files[start + many : start + 2 * many]]
            for index, future in enumerate(batch, start):
                try:
                    images[index], note = future.result()
                    notes[note.replace(f"{photos.photo_name(files[index])}: ", "")] += 1
                except InputError as error:
                    skipped.append(str(error))
            if images:
                yield images
            bar.update(start + len(batch))
    for note, count in notes.items():
        if note:
            say(f"{count} picture{'s' * (count > 1)}: {note}")
    for message in skipped:
        say(f"skipped: {message}")
    if skipped:
        say(f"{len(skipped)} of {len(files)} pictures were skipped.")


def _features(encoder: FaceEncoder | None, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 as `IdentityData.features`: empty without an encoder, uint8 in its size if it is trained."""
    if encoder is None:
        return torch.zeros(len(pixels), 0, 0)
    if not encoder.trained:
        return encoder(pixels.to(next(encoder.parameters()).device)).cpu()
    return ((encoder.resized(pixels).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _encode(
    files: list[tuple[str, Path]], backbone: Backbone, encoder: FaceEncoder | None, crop: photos.Crop, *, quiet: bool = False
) -> dict[str, Tensor]:
    """`latents` and `features` of the pictures that can be read, and `kept`, their indices in `files`.

    The batches depend on `files` alone, since the pictures of a batch affect how its results are rounded.
    """
    many, tensors, kept = _batch_size(backbone), dict[str, Tensor](), list[int]()
    with torch.no_grad():
        for images in decoded([file for _, file in files], backbone.size, crop, many, "" if quiet else "encoding pictures"):
            # convolutions on the CPU are faster in this layout
            pixels = photos.to_tensor(list(images.values())).contiguous(memory_format=torch.channels_last)
            for name, values in (("latents", backbone.encode_images(pixels)), ("features", _features(encoder, pixels))):
                if name not in tensors:  # allocated once for all: a list of batches and its concatenation would be in memory together
                    tensors[name] = torch.empty(len(files), *values.shape[1:], dtype=values.dtype)
                tensors[name][len(kept) : len(kept) + len(values)] = values
            kept += images
    encoded = {name: tensors.get(name, torch.zeros(0))[: len(kept)] for name in ("latents", "features")}
    return {**encoded, "kept": torch.tensor(kept, dtype=torch.long)}
