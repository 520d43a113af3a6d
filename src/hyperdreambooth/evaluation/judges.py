"""The embedded world's judges, used only to measure: a recognizer of identities and a classifier of contexts.

They share no weights, seed or architecture with the encoder that predicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConvNextV2Config, ConvNextV2Model

from ..checkpoint import read_json, read_tensors, save_tensors, write_json


class Judge(nn.Module):
    """A small ConvNeXt V2 with linear heads on its pooled features: pictures (N, 3, H, W) in -1..1 -> logits a head.

    `heads` maps a name to the names of its outputs; a recognizer has one head, "identity", whose outputs have no names.
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
        """Unit vectors (N, dim) whose dot product says how alike two people are."""
        return torch.cat([nn.functional.normalize(self(chunk)["identity"], dim=-1) for chunk in pixels.split(batch)])

    @torch.no_grad()
    def classify(self, pixels: Tensor, batch: int = 256) -> list[dict[str, str]]:
        """The context of each picture: {"style": "sketch", "background": "white", ...}."""
        found: list[dict[str, str]] = []
        for chunk in pixels.split(batch):
            best = {name: logits.argmax(-1).tolist() for name, logits in self(chunk).items()}
            found += [{name: self.spec["heads"][name][best[name][i]] for name in best} for i in range(len(chunk))]
        return found

    @torch.no_grad()
    def distance(self, pictures: Tensor, others: Tensor, batch: int = 256) -> Tensor:
        """How different two lots of pictures (N, 3, H, W) look: (N,), 0 for the same, 2 at most.

        As LPIPS does (Zhang et al., 2018): squared differences of unit feature vectors, a mean over positions and stages.
        """
        parts, unit = [], nn.functional.normalize
        for pair in zip(pictures.split(batch), others.split(batch), strict=True):
            one, other = (self.backbone(pixel_values=pixels, output_hidden_states=True).hidden_states for pixels in pair)
            stages = [(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(one, other, strict=True)]
            parts.append(torch.stack(stages).mean(0))
        return torch.cat(parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors (fp16)."""
        write_json(Path(folder) / "config.json", self.spec)
        save_tensors(Path(folder) / "model.safetensors", {name: value.half() for name, value in self.state_dict().items()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        spec = read_json(Path(folder) / "config.json")
        judge = cls(spec["backbone"], spec["heads"])
        tensors, _ = read_tensors(Path(folder) / "model.safetensors")
        judge.load_state_dict({name: value.float() for name, value in tensors.items()})
        return judge.eval().requires_grad_(False)
