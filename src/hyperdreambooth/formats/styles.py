"""LoRAs of style in a base while it draws: merged into its weights, which are put back afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora import applied
from .adapters import read_adapters
from .keys import Names
from .lora_file import find_lora, plain

Style = str | Path | tuple[str | Path, float]
"""A LoRA: a file, a folder or a repository with one, or (one of these, strength)."""

CARRIERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The components that a LoRA may change."""


@contextmanager
@torch.no_grad()
def styled(pipe: Any, styles: Sequence[Style]) -> Iterator[None]:
    """The pipeline with these LoRAs of any kind in it until the context closes.

    Afterwards, also after an error, the weights are what they were, bit for bit; they stay where they lie in memory. Several files add up:
    each one's change is that of the untouched weight. Weights that nothing can be added to (quantized ones) take plain LoRAs by hooks.

    Raises InputError for a file that is no LoRA, or for another base.
    """
    if not styles:
        yield
        return
    root = nn.ModuleDict({name: part for name, part in pipe.components.items() if name in CARRIERS and part is not None})
    names = Names(root)
    pairs = [(find_lora(name), strength) for name, strength in (one if isinstance(one, tuple) else (one, 1.0) for one in styles)]
    opened = [(path, read_adapters(path, names)[0], strength) for path, strength in pairs]
    originals: dict[Tensor, Tensor] = {}

    def add(parameter: Tensor, change: Tensor) -> None:
        # elsewhere than beside the base, where memory is short
        originals.setdefault(parameter, parameter.to("cpu", copy=True))
        parameter.copy_(parameter.float() + change.to(parameter.device))

    with ExitStack() as stack:
        try:
            for path, adapters, strength in opened:
                modules = [names.modules[place.path] for adapter in adapters for place in adapter.places]
                if not all(module.weight.is_floating_point() and module.weight.itemsize > 1 for module in modules):
                    why = "and to this base's quantized weights only plain LoRAs can be added. Open it with --dtype bfloat16"
                    stack.enter_context(applied(root, plain(path, adapters, why).scaled(strength)))
                    continue
                for adapter in adapters:
                    layers = [names.modules[place.path] for place in adapter.places]
                    count, first = sum(len(layer.weight) for layer in layers), layers[0].weight
                    rows = [place.outputs(count) for place in adapter.places]
                    whole = torch.empty(count, *first.shape[1:], device=first.device)
                    for layer, own in zip(layers, rows, strict=True):
                        whole[own] = originals.get(layer.weight, layer.weight).to(whole)
                    change, bias = adapter.delta(whole, strength), adapter.bias(strength)
                    for layer, own in zip(layers, rows, strict=True):
                        add(layer.weight, change[own])
                        if bias is not None:
                            add(layer.bias, bias[own])
            yield
        finally:
            for parameter, original in originals.items():
                parameter.copy_(original)
