"""Modules that are trained and return a LoraSet: `IdentityTable`, `PredictedLora` (with the hypernetwork) and `RelaxedLora`.

The first two use lightweight DreamBooth (paper, section 4.1), where a few numbers, a *token*, stand for the LoRA of a layer:

    down = down_token @ down_aux      (rank, a) @ (a, in)
    up   = up_aux @ up_token          (out, b) @ (b, rank)

The aux matrices have orthonormal rows (down) and columns (up). Frozen ones are rebuilt anywhere from their recipe;
learnable ones (*pro*) are shared by all identities and stored in the hypernetwork's checkpoint. A layer's token has
(a + b) * rank numbers, the down part first, whatever the layer's size.

Of each module, the parameters that require gradients are trained, and `state_dict()` is saved.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .encoder import FaceEncoder
from .errors import InputError
from .lora import Lora, LoraSet, Shape
from .training_settings import HyperNetworkConfig, LightweightConfig


def orthonormal(rows: int, columns: int, key: str) -> Tensor:
    """A random matrix (rows, columns) with orthonormal rows (rows <= columns), a function of `key` alone; float32.

    Drawn and orthogonalized in float64, since float32 draws and QR differ between CPUs, and with a generator of its own, so that
    the global generator neither affects it nor is advanced.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    matrix = torch.empty(columns, rows, dtype=torch.float64)
    return nn.init.orthogonal_(matrix, generator=torch.Generator().manual_seed(seed)).mT.float().contiguous()


class LightweightLora(nn.Module):
    """Tokens (B, layers, width) -> LoraSet of B updates. Raises InputError where an aux dimension is larger than the layer's own."""

    def __init__(self, targets: Mapping[str, Shape], config: LightweightConfig):
        super().__init__()
        self.targets = {path: Shape(*shape) for path, shape in targets.items()}
        self.config = config
        for path, shape in self.targets.items():
            if config.down_dim > shape.inputs or config.up_dim > shape.outputs:
                sizes = f"{config.down_dim} and {config.up_dim} don't fit {path} ({shape.inputs} inputs, {shape.outputs} outputs)"
                raise InputError(f"aux dimensions {sizes}. Lower down_dim and up_dim, or leave that layer out of the targets.")
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
        """The initial tokens of all identities, (layers, width): a random down part, its rows of norm 1 on average, and a zero up part.

        With zeros in both parts no gradient would flow (a saddle point). With a random down part for each identity, the weight loss
        would have to fit factors that are arbitrary.
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
        """Everything that determines frozen aux matrices, as JSON values."""
        return {"targets": {path: list(shape) for path, shape in self.targets.items()}, **asdict(self.config)}

    def fingerprint(self) -> str:
        """Identifies the aux matrices that tokens belong to: a hash of the recipe and of learned matrices (in float16, as saved)."""
        digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode())
        if self.config.learnable:
            for path in self.targets:
                for matrix in self.aux(path):
                    digest.update(matrix.detach().cpu().half().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class IdentityTable(nn.Module):
    """One row of tokens for each identity; all start from the same tokens. Rows (B,) -> LoraSet of B updates."""

    def __init__(self, count: int, lightweight: LightweightLora):
        super().__init__()
        self.lightweight = lightweight
        self.tokens = nn.Parameter(lightweight.start().expand(count, -1, -1).clone())

    def forward(self, rows: Tensor) -> LoraSet:
        return cast(LoraSet, self.lightweight(self.tokens[rows]))


class HyperNetwork(nn.Module):
    """Features (B, positions, feature_dim) -> tokens (B, layers, width), refined over several passes (paper, section 4.2).

        tokens = start;  repeat: tokens = tokens + head(decoder(layer_embedding + embed(tokens), features))

    Every target layer is one query of a transformer decoder that attends to the features. The head of the up part starts at
    zero, so an untrained hypernetwork predicts updates of zero, yet gradients flow (the down part starts random).
    `start`: the tokens (layers, width) before the first pass. They are learned, and shared by all identities.
    """

    def __init__(self, start: Tensor, down_width: int, feature_dim: int, config: HyperNetworkConfig):
        super().__init__()
        layers, width = start.shape
        self.config = config
        self.start = nn.Parameter(start.clone())
        with torch.random.fork_rng(devices=[]):  # initializing a module must not change the state of the global generator
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, config.dim))
            self.layers = nn.Parameter(torch.randn(layers, config.dim) * 0.02)
            self.embed = nn.Linear(width, config.dim)
            block = nn.TransformerDecoderLayer(
                config.dim, config.heads, 2 * config.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.decoder = nn.TransformerDecoder(block, config.blocks, norm=nn.LayerNorm(config.dim))
            # a head for each layer, since the same token stands for another update in every layer
            self.head = nn.Parameter(torch.randn(layers, config.dim, width) * 0.02 / config.dim**0.5)
        with torch.no_grad():
            self.head[:, :, down_width:] = 0

    def forward(self, features: Tensor) -> Tensor:
        memory = self.features(features)
        tokens = self.start.expand(len(features), -1, -1)
        for _ in range(self.config.passes):
            hidden = self.decoder(self.layers + self.embed(tokens), memory)
            tokens = tokens + torch.einsum("bld,ldw->blw", hidden, self.head)
        return tokens


class PredictedLora(nn.Module):
    """Encoder, hypernetwork and aux matrices: photos (B, 3, H, W) in -1..1, or features (B, positions, dim) -> LoraSet of B updates."""

    def __init__(self, encoder: FaceEncoder, hypernetwork: HyperNetwork, lightweight: LightweightLora):
        super().__init__()
        self.encoder, self.hypernetwork, self.lightweight = encoder, hypernetwork, lightweight

    def tokens(self, photos: Tensor) -> Tensor:
        """Photos or their features -> tokens (B, layers, width)."""
        return cast(Tensor, self.hypernetwork(self.encoder(photos) if photos.ndim == 4 else photos))

    def forward(self, photos: Tensor) -> LoraSet:
        return cast(LoraSet, self.lightweight(self.tokens(photos)))


class RelaxedLora(nn.Module):
    """Rank relaxation (paper, section 4.3): a predicted update beside a trainable one of higher rank.

    order="residual": the prediction is frozen, and a residual of rank r (down random, up zero) is trained and added to it.
    order="merged": the factors of both are concatenated first, and all of them are trained.
    `targets`: the layers that are trained. With a prediction they are some of its own (default: all); its others stay as predicted.
    Without a prediction the residual is an ordinary LoRA from scratch, a batch of `people`.
    """

    def __init__(
        self,
        predicted: LoraSet | None,
        rank: int,
        *,
        targets: Mapping[str, Shape] | None = None,
        order: Literal["residual", "merged"] = "residual",
        seed: int = 0,
        people: int = 1,
    ):
        super().__init__()
        predicted = (predicted or LoraSet()).detach()
        targets = targets or predicted.shapes()
        if not targets:
            raise ValueError("neither a prediction nor targets")
        for index, lora in enumerate(predicted.values()):  # buffers move with the module, and aren't saved
            self.register_buffer(f"predicted_down_{index}", lora.down, persistent=False)
            self.register_buffer(f"predicted_up_{index}", lora.up, persistent=False)
        self.frozen, self.paths, self.order = list(predicted), list(targets), order
        self.downs, self.ups = nn.ParameterList(), nn.ParameterList()
        for path, shape in targets.items():
            rows = min(rank, shape.inputs)
            down = orthonormal(rows, shape.inputs, f"{seed}/{path}/residual") * math.sqrt(1 / 3)  # the scale of nn.Linear's initialization
            reference = predicted.get(path)
            device = reference.down.device if reference else down.device
            batch = reference.down.shape[:-2] if reference else (people,)
            fresh = Lora(*(matrix.to(device).expand(*batch, -1, -1) for matrix in (down, torch.zeros(shape.outputs, rows))))
            if reference and order == "merged":
                fresh = reference + fresh
            self.downs.append(nn.Parameter(fresh.down.clone()))
            self.ups.append(nn.Parameter(fresh.up.clone()))

    @property
    def predicted(self) -> LoraSet:
        """The frozen prediction; empty without one."""
        matrices = list(self.buffers(recurse=False))
        return LoraSet({path: Lora(*both) for path, *both in zip(self.frozen, matrices[::2], matrices[1::2], strict=True)})

    def forward(self, batch: object = None) -> LoraSet:
        trained = LoraSet({path: Lora(down, up) for path, down, up in zip(self.paths, self.downs, self.ups, strict=True)})
        return LoraSet({**self.predicted, **trained}) if self.order == "merged" else self.predicted + trained
