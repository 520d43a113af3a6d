"""Lightweight DreamBooth (paper, section 4.1): a LoRA as a few numbers a layer, its *token*.

    down = down_token @ down_aux      (rank, a) @ (a, in)
    up   = up_aux @ up_token          (out, b) @ (b, rank)

The aux matrices have orthonormal rows (down) and columns (up). Frozen, they are rebuilt anywhere from their recipe;
learnable (*pro*), they are shared by all identities and stored in the hypernetwork's checkpoint. One layer is one token
of (a + b) * rank numbers, the down part first, whatever the layer's size.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .errors import InputError
from .lora import Lora, LoraSet, Shape
from .training_settings import LightweightConfig


def orthonormal(rows: int, columns: int, key: str) -> Tensor:
    """A random matrix with orthonormal rows (rows <= columns), a function of `key` alone; float32.

    Drawn and orthogonalised in float64 from a generator of its own: float32 draws and QR differ between CPUs, and the
    global generator must neither matter nor move.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    draw = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(draw)
    return (q * r.diagonal().sign()).mT.float().contiguous()


class LightweightLora(nn.Module):
    """Tokens (B, layers, width) -> LoraSet with a batch dimension.

    Raises InputError where an aux dimension is larger than the layer's own.
    """

    def __init__(self, targets: Mapping[str, Shape], config: LightweightConfig):
        super().__init__()
        self.targets = {path: Shape(*shape) for path, shape in targets.items()}
        self.config = config
        for path, shape in self.targets.items():
            if config.down_dim > shape.inputs or config.up_dim > shape.outputs:
                raise InputError(
                    f"aux dimensions {config.down_dim} and {config.up_dim} don't fit {path}, which has {shape.inputs} inputs and "
                    f"{shape.outputs} outputs. Lower down_dim and up_dim, or leave that layer out of the targets."
                )
            down = orthonormal(config.down_dim, shape.inputs, f"{config.seed}/{path}/down")
            up = orthonormal(config.up_dim, shape.outputs, f"{config.seed}/{path}/up").mT.contiguous()
            for name, matrix in ((self.name(path, "down"), down), (self.name(path, "up"), up)):
                if config.learnable:
                    self.register_parameter(name, nn.Parameter(matrix))
                else:
                    self.register_buffer(name, matrix, persistent=False)

    @staticmethod
    def name(path: str, side: str) -> str:
        """A matrix's name in the state dict, which can't contain dots."""
        return f"{path.replace('.', '/')}/{side}"

    def aux(self, path: str) -> tuple[Tensor, Tensor]:
        """A layer's aux matrices: down (a, in) and up (out, b)."""
        return getattr(self, self.name(path, "down")), getattr(self, self.name(path, "up"))

    @property
    def token_shape(self) -> tuple[int, int]:
        """(layers, width)."""
        return len(self.targets), self.config.width

    def start(self) -> Tensor:
        """The tokens from which every identity starts, (layers, width): one shared random down of unit rows, up zero.

        Zero in both would be a saddle without gradient; a random down for each identity would leave the weight loss to
        fit factors that are arbitrary.
        """
        rank, width = self.config.rank, self.config.down_dim
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        down = torch.randn(len(self.targets), rank, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        tokens = torch.zeros(self.token_shape)
        tokens[:, : rank * width] = down.flatten(1).float()
        return tokens

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (..., width) -> down tokens (..., rank, a) and up tokens (..., b, rank)."""
        config = self.config
        down, up = tokens.split([config.rank * config.down_dim, config.rank * config.up_dim], -1)
        return down.unflatten(-1, (config.rank, config.down_dim)), up.unflatten(-1, (config.up_dim, config.rank))

    def forward(self, tokens: Tensor) -> LoraSet:
        down, up = self.split(tokens)
        loras = LoraSet()
        for index, path in enumerate(self.targets):
            down_aux, up_aux = self.aux(path)
            loras[path] = Lora(down[..., index, :, :] @ down_aux, up_aux @ up[..., index, :, :])
        return loras

    def recipe(self) -> dict[str, object]:
        """Everything that frozen aux matrices follow from, as JSON."""
        return {"targets": {path: list(shape) for path, shape in self.targets.items()}, **asdict(self.config)}

    def fingerprint(self) -> str:
        """Identifies the aux matrices that tokens belong to: a hash of the recipe, or of the learnt matrices' contents (as fp16, as they are shipped)."""
        digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode())
        if self.config.learnable:
            for path in self.targets:
                for matrix in self.aux(path):
                    digest.update(matrix.detach().cpu().half().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
