"""Low-rank updates as plain tensors, and how they are applied in training and sampling.

    update = up @ down            down (*batch, rank, in), up (*batch, out, rank), with no scale (alpha) beside them

A leading batch dimension gives every sample of a batch an update of its own. `applied` adds updates by forward
hooks, kept open through `backward()`: exact under gradient checkpointing, autocast and classifier-free guidance, and
on top of any PEFT adapter. Finished LoRAs are files in the usual formats; nothing here is needed to use them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError, some


@dataclass(frozen=True)
class Lora:
    """The update of one linear layer. `down`: (rank, in) or (B, rank, in). `up`: (out, rank) or (B, out, rank)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[-2]

    def is_finite(self) -> bool:
        return bool(self.down.isfinite().all() and self.up.isfinite().all())

    def delta(self) -> Tensor:
        """The update as a full matrix, (..., out, in), for merging and tests. Hooks never form it."""
        return self.up @ self.down

    def __add__(self, other: Lora) -> Lora:
        """The sum of two updates: their factors are concatenated along the rank."""
        return Lora(torch.cat([self.down, other.down], -2), torch.cat([self.up, other.up], -1))

    def added(self, output: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """output (B, ..., out) + up @ down @ x for x (B, ..., in), in the precision of `output`.

        Args:
            weights: (B,) factors of the samples' updates.

        A batch of updates is tiled over a multiple of as many samples. Raises ValueError for another number of samples.
        """
        down, up = self.down, self.up
        if down.ndim == 3 and len(down) == 1:  # one update for all samples: plain matrices instead of copies
            down, up = down[0], up[0]
        if down.ndim == 3 and len(down) != len(x):
            if len(x) % len(down):
                raise ValueError(f"{len(down)} updates for a batch of {len(x)}: it must be a multiple")
            down, up = (matrix.repeat(len(x) // len(down), 1, 1) for matrix in (down, up))
        flat = x.to(down.dtype).reshape(len(x), -1, x.shape[-1]) if down.ndim == 3 else x.to(down.dtype)
        hidden = flat @ down.mT
        if weights is not None:
            hidden = hidden * weights.to(hidden).reshape(-1, *[1] * (hidden.ndim - 1))
        if hidden.dtype != output.dtype:
            return output + (hidden @ up.mT).reshape(output.shape).to(output.dtype)
        # added within the matrix product: for many people, a separate tensor of the updates' outputs would fill the memory
        if down.ndim == 3:
            return torch.baddbmm(output.reshape(len(x), -1, up.shape[-2]), hidden, up.mT).reshape(output.shape)
        return torch.addmm(output.reshape(-1, up.shape[-2]), hidden.reshape(-1, up.shape[-1]), up.mT).reshape(output.shape)


class LoraSet(dict[str, Lora]):
    """Updates by layer path, such as `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`."""

    def map(self, change: Callable[[Tensor], Tensor]) -> LoraSet:
        """Applies `change` to every tensor."""
        return LoraSet({path: Lora(change(lora.down), change(lora.up)) for path, lora in self.items()})

    def shapes(self) -> dict[str, Shape]:
        """The layers' dimensions."""
        return {path: Shape(lora.down.shape[-1], lora.up.shape[-2]) for path, lora in self.items()}

    def detach(self) -> LoraSet:
        return self.map(torch.Tensor.detach)

    def __add__(self, other: LoraSet) -> LoraSet:
        """The sum, layer by layer; a layer that only one of them has keeps that one's update."""
        merged = dict(self) | dict(other)
        return LoraSet({path: self[path] + other[path] if path in self and path in other else lora for path, lora in merged.items()})

    def scaled(self, weight: float) -> LoraSet:
        """The update times `weight`."""
        return LoraSet({path: Lora(lora.down, lora.up * weight) for path, lora in self.items()})

    def select(self, index: int | slice | Tensor) -> LoraSet:
        """One sample's updates out of a batch (an int), or several samples', still batched (a slice, or indices)."""
        return self.map(lambda tensor: tensor[index])


class Shape(NamedTuple):
    """A linear layer's dimensions."""

    inputs: int
    outputs: int


def unwrapped(layer: nn.Module) -> Any:
    """The layer itself, without PEFT's wrapper if it has one."""
    return getattr(layer, "base_layer", layer)


def linear_shape(module: nn.Module) -> Shape | None:
    """The dimensions of a linear layer or a 1 x 1 convolution, which is a linear layer at every pixel; None for other modules."""
    layer = unwrapped(module)
    if isinstance(layer, nn.Linear):
        return Shape(layer.in_features, layer.out_features)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1:
        return Shape(layer.in_channels, layer.out_channels)
    return None


def canonical(path: str) -> str:
    """A layer's path as LoRA files have it: inside a text encoder, with `text_model.` exactly once.

    transformers 5.23 dropped that part from `CLIPTextModel`'s module paths (not from `CLIPTextModelWithProjection`'s).
    """
    component, _, rest = path.partition(".")
    if component.startswith("text_encoder") and rest.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"{component}.text_model.{rest}"
    return path


def canonical_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The modules of `root` by canonical path.

    Raises InputError for a model whose attention projections were fused: a fused layer bypasses `to_q`, `to_k`, `to_v`.
    """
    modules = {canonical(path): module for path, module in root.named_modules()}
    for path, module in modules.items():
        if getattr(module, "fused_projections", False):
            raise InputError(f"{path} has fused projections, which bypass its LoRA targets: call unfuse_qkv_projections() first.")
    return modules


def find_targets(root: nn.Module, patterns: Sequence[str]) -> dict[str, Shape]:
    """The linear layers whose canonical path matches any of the glob patterns, in the model's order.

    Raises InputError for a pattern that matches nothing, or a module that isn't linear, and for a fused model.
    """
    modules: dict[str, Any] = canonical_modules(root)
    found: set[str] = set()
    for pattern in patterns:
        hits, wrong = fnmatch.filter(modules, pattern), f"target pattern {pattern!r} matches"
        if not hits:
            raise InputError(f"{wrong} no layer of {', '.join(dict(root.named_children()))}. See `hyperdreambooth targets BASE`.")
        for path in hits:
            if not isinstance(unwrapped(modules[path]), nn.Linear):
                kind = type(modules[path]).__name__
                raise InputError(f"{wrong} {path}, a {kind}: only linear layers can carry a LoRA. Narrow the pattern.")
        found.update(hits)
    return {path: Shape(module.in_features, module.out_features) for path, module in modules.items() if path in found}


def layers_of(root: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of `root` at these canonical paths. Raises InputError for a path that it doesn't have."""
    modules, wanted = canonical_modules(root), list(paths)
    missing = [path for path in wanted if path not in modules]
    if missing:
        raise InputError(f"this LoRA is for another base: of its {len(wanted)} layers this one lacks {some(missing)}.")
    return {path: modules[path] for path in wanted}


class Hooks:
    """Forward hooks on some layers of a model, which add the update that was set last; opened once for many steps.

    A context manager: keep it open through `backward()`. The factors of an update are cast to their layer's precision when they
    are set; activations stay as they are.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str]):
        self.layers = layers_of(root, paths)
        # updates of a quantized layer, whose weight isn't a float, get the precision of the model's other weights
        plain = next((weight.dtype for weight in root.parameters() if can_be_added_to(weight)), torch.float32)
        weights = {path: unwrapped(layer).weight for path, layer in self.layers.items()}
        self.dtypes = {
            path: weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else plain for path, weight in weights.items()
        }
        self.current: Mapping[str, Lora] = {}
        self.weights: Tensor | None = None
        self.handles = [layer.register_forward_hook(partial(self._add, path)) for path, layer in self.layers.items()]

    def set(self, loras: Mapping[str, Lora], weights: Tensor | None = None) -> None:
        """Sets the update that is added from now on; a layer that isn't in it keeps its own output. An empty one turns the hooks off.

        Args:
            loras: updates by layer path; a batch of n is tiled over a larger batch of samples: update i for samples i, i + n, ...
            weights: (B,) factors of the samples' updates; 0 leaves a sample to the base (identity guidance).
        """
        self.current = {path: Lora(lora.down.to(self.dtypes[path]), lora.up.to(self.dtypes[path])) for path, lora in loras.items()}
        self.weights = weights

    def _add(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        lora = self.current.get(path)
        if lora is None:
            return output
        if isinstance(unwrapped(module), nn.Conv2d):  # its channels come first
            return lora.added(output.movedim(1, -1), args[0].movedim(1, -1), self.weights).movedim(-1, 1)
        return lora.added(output, args[0], self.weights)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.set({})


def can_be_added_to(weight: Tensor) -> bool:
    """Whether an update can be added to a layer's weight: not to a quantized one, which is packed in bytes or a subclass of Tensor."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1


@contextmanager
def applied(root: nn.Module, loras: Mapping[str, Lora], weights: Tensor | None = None) -> Iterator[None]:
    """Adds the updates to the layers of `root` by `Hooks` until the context closes. Keep it open through `backward()`."""
    with Hooks(root, loras) as hooks:
        hooks.set(loras, weights)
        yield


def mergeable(root: nn.Module, loras: Mapping[str, Lora]) -> bool:
    """Whether `merged` can take these updates: one person's, of weights that aren't quantized, with device memory for their copies."""
    layers = [unwrapped(layer) for layer in layers_of(root, loras).values()]
    if any(type(layer) not in (nn.Linear, nn.Conv2d) or not can_be_added_to(layer.weight) for layer in layers):
        return False
    cuda = [layer.weight for layer in layers if layer.weight.is_cuda]
    enough = not cuda or 2 * sum(weight.nbytes for weight in cuda) < torch.cuda.mem_get_info(cuda[0].device)[0]
    return enough and all(lora.down.ndim == 2 for lora in loras.values())


@contextmanager
@torch.no_grad()
def merged(root: nn.Module, loras: Mapping[str, Lora]) -> Iterator[None]:
    """Adds one person's updates to the weights of `root`'s layers until the context closes, so that a forward pass costs nothing extra.

    Afterwards, also after an error, the weights are restored bit for bit from copies, since subtracting an update drifts in half
    precision. The weights keep their addresses in memory, so a recorded CUDA graph uses the changed values.
    """
    originals: dict[Tensor, Tensor] = {}
    try:
        for path, layer in layers_of(root, loras).items():
            weight = unwrapped(layer).weight
            originals.setdefault(weight, weight.detach().clone())
            weight.copy_(weight.float() + loras[path].delta().to(weight.device).float().reshape(weight.shape))
        yield
    finally:
        for weight, original in originals.items():
            weight.copy_(original)


def update_norms(loras: LoraSet) -> Tensor:
    """Squared Frobenius norm of each sample's whole update, (B,), without forming an (out, in) matrix."""
    # |up down|^2 = trace((up^T up) (down down^T))
    return sum(((lora.up.mT @ lora.up) * (lora.down @ lora.down.mT)).sum((-2, -1)) for lora in loras.values())  # type: ignore[return-value]


def shared_norm(loras: LoraSet) -> Tensor:
    """Squared Frobenius norm of the mean update of all people, estimated without bias from a batch: a scalar.

    It is the mean inner product of the updates of two different samples. The squared norm of the batch's own mean would be larger by
    the products of samples with themselves. The estimate may be negative; for fewer than two samples it is NaN.
    """
    norms = update_norms(loras)
    # the sum of all updates is one update of their joint rank
    total = {path: Lora(lora.down.flatten(0, 1), lora.up.movedim(0, 1).flatten(1)) for path, lora in loras.items()}
    return (update_norms(LoraSet(total)) - norms.sum()) / (len(norms) * (len(norms) - 1))


def compress(lora: Lora, tolerance: float = 1e-6) -> Lora:
    """The same update with orthogonal factors and the smallest rank that represents it (paper, section 4.3: merge and decompose).

    QR of both factors, then an SVD of the small core, never of the (out, in) matrix, in float64; the singular values go into `up`.
    Those under `tolerance` times the largest are zero to float precision and are dropped. Raises ValueError for a batch of updates.
    """
    if lora.down.ndim != 2:
        raise ValueError(f"compress takes one sample's update; select() it first: {tuple(lora.down.shape)}")
    left, upper = torch.linalg.qr(lora.up.double())
    right, lower = torch.linalg.qr(lora.down.double().mT)
    u, values, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    rank = max(1, int((values > tolerance * values[0]).sum()))
    up = left @ (u[:, :rank] * values[:rank])
    return Lora((vh[:rank] @ right.mT).to(lora.down.dtype), up.to(lora.up.dtype))
