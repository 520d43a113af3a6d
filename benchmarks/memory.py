"""GPU memory of training, computed without a GPU: `python benchmarks/memory.py -o benchmarks/results/memory.json`.

Weights are counted from the published architectures, gradients and optimizer state from the trained parameters. Activations are the
tensors that autograd saves in a forward pass of the full-size denoiser with LoRA hooks, measured on fake tensors (shapes without memory) for one
sample and multiplied by the batch size; with gradient checkpointing they are the inputs of all blocks plus the largest block's inner activations. Not
counted are the CUDA context (about 0.5 GB), allocator fragmentation, workspaces, temporaries of the backward pass, and the averaged weights of a
hypernetwork. The figures are therefore lower bounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hyperdreambooth import backbones
from hyperdreambooth.backbones.architectures import FAMILIES, PRESETS, architecture, build
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.lora import Lora, LoraSet, Shape, applied, find_targets
from hyperdreambooth.trainable_lora import HyperNetwork
from hyperdreambooth.training_settings import HyperNetworkConfig, LightweightConfig

CLASSES: dict[str, Any] = {
    "sd": backbones.StableDiffusion,
    "sdxl": backbones.StableDiffusionXL,
    "sd3": backbones.StableDiffusion3,
    "flux": backbones.Flux,
}
LATENTS = {"sd15": (4, 64), "sdxl": (4, 128), "sd3": (16, 128), "flux": (16, 128)}
T5 = 4_762_310_656  # Parameters of T5 v1.1 XXL's encoder, a text encoder of SD 3 and Flux.
# Bytes of optimizer state for each trained parameter: two float32 moments; two 8-bit moments (quantized in blocks); for Adafactor 0, as it keeps
# one float32 for each row and column of a matrix instead.
OPTIMIZERS = {"AdamW": 8.0, "8-bit AdamW": 2.0, "Adafactor": 0.0}


class Saved:
    """Bytes that autograd saves for the backward pass; each storage is counted once, weights aren't counted."""

    def __init__(self, weights: nn.Module):
        self.weights = {p.untyped_storage()._cdata for p in weights.parameters()}
        self.seen: dict[int, tuple[int, Tensor]] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = (storage.nbytes(), tensor)  # keeps the tensor alive, so that its address isn't reused
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.seen.values())


def conditioning(family: str, batch: int, denoiser: Any) -> dict[str, Tensor]:
    """Zero tensors with the shapes of a prompt's conditioning in the published models."""
    if family == "sd":
        return {"encoder_hidden_states": torch.zeros(batch, 77, denoiser.config.cross_attention_dim)}
    if family == "sdxl":
        return {"encoder_hidden_states": torch.zeros(batch, 77, 2048), "text_embeds": torch.zeros(batch, 1280)}
    if family == "sd3":
        return {"encoder_hidden_states": torch.zeros(batch, 77 + 256, 4096), "pooled_projections": torch.zeros(batch, 2048)}
    words = {"encoder_hidden_states": torch.zeros(batch, 512, 4096), "pooled_projections": torch.zeros(batch, 768)}
    return {**words, "guidance": torch.ones(batch)}


def activations(name: str, dtype: torch.dtype, *, checkpointing: bool, batch: int = 1, rank: int = 4) -> int:
    """Bytes that a forward pass of the denoiser saves for the backward pass, where each sample has its own float32 LoRA."""
    family = FAMILIES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            parts = build(name)
            key = "unet" if "unet" in parts else "transformer"
            root = nn.ModuleDict({key: parts[key]}).requires_grad_(False)
            denoiser: Any = root[key]
            outside, inside = Saved(root), [0]

            def run(module: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
                inner = Saved(root)
                for value in [*arguments, *more.values()]:
                    if isinstance(value, Tensor):
                        outside.add(value)
                with inner.watching():
                    output = module(*arguments, **more)
                for known in outside.seen:
                    inner.seen.pop(known, None)
                inside[0] = max(inside[0], inner.bytes)
                return output

            if checkpointing:
                denoiser.enable_gradient_checkpointing(run)
            shapes = find_targets(root, PRESETS[family]["attention+ff"])
            single = torch.float32
            loras = LoraSet(
                {
                    path: Lora(
                        torch.zeros(batch, rank, shape.inputs, dtype=single, requires_grad=True),
                        torch.zeros(batch, shape.outputs, rank, dtype=single, requires_grad=True),
                    )
                    for path, shape in shapes.items()
                }
            )
            channels, side = LATENTS[name]
            base: Any = SimpleNamespace(denoiser=denoiser, unit=8, device=torch.device("cpu"))
            noisy = torch.zeros(batch, channels, side, side, dtype=single)
            with applied(root, loras), outside.watching():
                CLASSES[family].predict(base, noisy, torch.zeros(batch), conditioning(family, batch, denoiser))
            return outside.bytes + inside[0]
    finally:
        torch.set_default_dtype(before)


def forward_tflop(name: str) -> float:
    """TFLOP (10^12 operations) of a forward pass of the denoiser for one sample, without a LoRA; a multiply-add counts as two."""
    family = FAMILIES[name]
    components = architecture(name)
    denoiser: Any = components["unet" if "unet" in components else "transformer"]
    base: Any = SimpleNamespace(denoiser=denoiser, unit=8, device=torch.device("meta"))
    channels, side = LATENTS[name]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        noisy, steps = torch.zeros(1, channels, side, side), torch.zeros(1)
        CLASSES[family].predict(base, noisy, steps, conditioning(family, 1, denoiser))
    return counter.get_total_flops() / 1e12


def trained(shapes: dict[str, Shape], what: str) -> tuple[int, int]:
    """The number of trained parameters, and the number of row and column statistics that Adafactor keeps of them."""
    if what.startswith("personalize"):
        matrices = [side for shape in shapes.values() for side in ((4, shape.inputs), (shape.outputs, 4))]
    else:
        config = LightweightConfig()
        matrices = [side for s in shapes.values() for side in ((config.down_dim, s.inputs), (s.outputs, config.up_dim))]
        with torch.device("meta"):
            start = torch.zeros(len(shapes), config.width)
            decoder = HyperNetwork(start, config.down_dim, 384, HyperNetworkConfig())
        matrices += [(p.shape[0], p[0].numel()) for p in decoder.parameters() if p.ndim]
    return sum(a * b for a, b in matrices), sum(a + b for a, b in matrices)


def row(name: str, what: str, batch: int, dtype: torch.dtype, *, checkpointing: bool, cache: dict[Any, int]) -> dict[str, Any]:
    components, family = architecture(name), FAMILIES[name]
    weights = sum(p.numel() for p in components.parameters()) + 84_000_000 + (T5 if family in ("sd3", "flux") else 0)
    numbers, factored = trained(find_targets(components, PRESETS[family]["attention+ff"]), what)
    key = (name, dtype, checkpointing)
    if key not in cache:
        cache[key] = activations(name, dtype, checkpointing=checkpointing)
    kept = batch * cache[key]
    fixed = weights * dtype.itemsize + kept + 8 * numbers  # float32 copies of the trained parameters and their gradients
    gigabyte = 1e9
    return {
        "base": name,
        "stage": what,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "weights_gb": round(weights * dtype.itemsize / gigabyte, 2),
        "activations_gb": round(kept / gigabyte, 2),
        "trained_millions": round(numbers / 1e6, 1),
        **{f"{opt}_gb": round((fixed + (per * numbers or 4 * factored)) / gigabyte, 1) for opt, per in OPTIMIZERS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    tflop = {name: round(forward_tflop(name), 2) for name in LATENTS}
    print(tflop, flush=True)
    half, rows = torch.bfloat16, []
    cache: dict[Any, int] = {}
    for name, what, batch, dtype in [
        ("sd15", "personalize", 4, torch.float32),
        ("sd15", "personalize", 4, half),
        ("sd15", "train-hypernetwork (pro)", 4, half),
        ("sd15", "train-hypernetwork (pro)", 16, half),
        ("sdxl", "personalize", 1, half),
        ("sdxl", "personalize", 4, half),
        ("sdxl", "train-hypernetwork (pro)", 4, half),
        ("sdxl", "train-hypernetwork (pro)", 16, half),
        ("sd3", "personalize", 4, half),
        ("flux", "personalize", 1, half),
        ("flux", "personalize", 4, half),
    ]:
        for checkpointing in (False, True):
            rows.append(row(name, what, batch, dtype, checkpointing=checkpointing, cache=cache))
            print(rows[-1], flush=True)
    write_json(args.output, {"rows": rows, "forward_tflop": tflop})
    print(args.output)


if __name__ == "__main__":
    main()
