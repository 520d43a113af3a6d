"""The change that a LoRA file makes to each layer, for all kinds of adapters.

    LoRA    up @ down; for convolutions also with a core of the kernel's size between the two (`mid`); also with a bias
    LoHa    w1 * w2, elementwise, where each factor may be a low-rank product itself
    LoKr    kron(w1, w2), likewise
    full    the difference itself, of a weight (`diff`) or a bias (`diff_b`)
    DoRA    any of these, after which each output's weight vector is rescaled to the norm in `dora_scale` (PEFT: `magnitude`)

An update is scaled by alpha / rank and by the strength; a DoRA's is scaled before the norms are set, as in PEFT.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lokr.layer import make_kron, make_weight_cp
from torch import Tensor

from ..checkpoint import read_tensors
from ..errors import InputError, refusing, some
from ..lora import linear_shape
from .keys import TABLES, Names, Place, plain_path, split


@dataclass(frozen=True)
class Adapter:
    """A file's change of one layer: its tensors (float32) by `keys.split`'s names, the base's layers that it changes, and alpha / rank."""

    layer: str
    parts: dict[str, Tensor]
    places: list[Place]
    scale: float

    @property
    def kind(self) -> str:
        """The kind of adapter, in words (such as "a LoKr"); "" for a plain LoRA of a linear layer."""
        known = TABLES["adapters"].items()
        found = next((kind for mark, kind in known if any(re.match(mark, part) for part in self.parts)), "")
        return found or ("" if self.parts["down"].shape[2:].numel() == 1 else "a LoRA of convolutions")

    def update(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight's unscaled update, in its shape or as a matrix; a scalar zero for none. Raises KeyError for a missing part."""

        def factor(whole: str, left: str, right: str, core: str) -> Tensor:
            if whole in parts:
                return parts[whole]
            a, b = parts[left].flatten(1), parts[right].flatten(1)
            return cast(Tensor, make_weight_cp(parts[core], a.T if left == "up" else a, b)) if core in parts else a @ b

        if any(part.startswith("hada") for part in parts):
            return factor("", "hada_w1_a", "hada_w1_b", "hada_t1") * factor("", "hada_w2_a", "hada_w2_b", "hada_t2")
        if any(part.startswith("lokr") for part in parts):
            factors = (factor(f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}") for n in (1, 2))
            return cast(Tensor, make_kron(*factors))
        if parts.keys() <= {"bias", "diff_b", "dora_scale", "magnitude"}:
            return torch.zeros(())
        return factor("diff", "up", "down", "mid")

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """The change of the layer's `weight` (out, in, ...), in float32."""
        parts = {name: part.to(weight.device) for name, part in self.parts.items()}
        change = self.update(parts)
        change = (change.reshape(weight.shape) if change.ndim else change.expand_as(weight)) * (self.scale * strength)
        if (lengths := parts.get("magnitude", parts.get("dora_scale"))) is None:
            return change
        axis = int("magnitude" not in parts and lengths.ndim > 1 and lengths.shape[0] == 1)  # 1: a norm per input, as in older trainers
        norms = torch.linalg.vector_norm(weight + change, dim=[dim for dim in range(weight.ndim) if dim != axis], keepdim=True)
        return (weight + change) * (lengths.reshape(norms.shape) / norms) - weight

    def bias(self, strength: float) -> Tensor | None:
        """The change of the layer's bias (out,), or None."""
        bias = self.parts.get("diff_b", self.parts.get("bias"))
        return None if bias is None else bias * strength * (1.0 if "diff_b" in self.parts else self.scale)


def read_adapters(path: str | Path, names: Names | None = None) -> tuple[list[Adapter], dict[str, str]]:
    """A LoRA file's adapters, one for each of its layers, and its metadata.

    Args:
        names: of the base's layers; without it each adapter's one place is the path that `plain_path` makes of the layer's name.

    Raises InputError for a file that is no LoRA, of an unknown kind, for another base, or damaged.
    """
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise InputError(f"{path} holds no tensors.")
    config = _peft_config(Path(path), metadata, tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, part = split(name)
        if part not in ("", "alpha") and not tensor.is_floating_point():
            raise InputError(f"{path}: {name} holds no floating-point numbers ({tensor.dtype}). Get the file in float16 or bfloat16.")
        if part in parts.setdefault(layer, {}) and part:
            raise InputError(f"{path}: the {part} of {layer} comes twice, the second time as {name}.")
        parts[layer][part or name] = tensor.float()
    if unknown := list(parts.pop("", {})):
        _refuse_names(str(path), unknown, tensors)
    places = {layer: names.find(layer) if names else [Place(plain_path(layer))] for layer in parts}
    if any(places.values()):  # some trainers also write untrained layers: zero updates of layers that the base lacks are left out
        changes = {layer: [part for name, part in own.items() if name in ("up", "diff", "diff_b")] for layer, own in parts.items()}
        zero = {layer for layer, own in changes.items() if own and not places[layer] and not any(part.any() for part in own)}
        parts = {layer: own for layer, own in parts.items() if layer not in zero}
    if names and (absent := [layer for layer in parts if not places[layer]]):
        _refuse_layers(str(path), absent, len(parts), metadata, type(names.model).__name__)
    adapters, taken = [], dict[str, str]()
    for layer, own in parts.items():
        scale = _scale(own, config, places[layer][0].path, f"{path}: {layer}")
        adapters.append(Adapter(layer, {name: part for name, part in own.items() if name != "alpha"}, places[layer], scale))
        _check(adapters[-1], names, f"{path}: {layer}")
        if twice := [place.path for place in places[layer] if place.path in taken]:
            raise InputError(f"{path}: {twice[0]} comes twice, as {taken[twice[0]]} and as {layer}.")
        taken |= {place.path: layer for place in places[layer]}
    return adapters, metadata


def _check(adapter: Adapter, names: Names | None, where: str) -> None:
    """Raises InputError unless an adapter's parts are complete, finite, and fit each other and the base's layer."""
    parts = adapter.parts
    several = [mark for mark in ("hada", "lokr", "diff$", "up$|down$") if any(re.match(mark, part) for part in parts)]
    if len(several) > 1 or {"bias", "diff_b"} <= parts.keys():
        raise InputError(f"{where} is several kinds of adapter in one ({', '.join(parts)}), which no tool reads.")
    if not all(part.isfinite().all() and (part * adapter.scale).isfinite().all() for part in parts.values()):
        raise InputError(f"{where} isn't finite (with its scale of {adapter.scale:g}). Its training diverged, or the file is damaged.")
    try:  # on the meta device, for the shape alone
        update = adapter.update({name: part.to("meta") for name, part in parts.items()})
    except KeyError as error:
        raise InputError(f"{where} has no {error.args[0]} matrix. Is the file whole?") from error
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        shapes = ", ".join(f"{name} {' x '.join(map(str, part.shape))}" for name, part in parts.items())
        raise InputError(f"{where} is broken: its parts don't fit together ({shapes}). Is the file whole?") from error
    if names is None:
        return
    modules = [names.modules[place.path] for place in adapter.places]
    # the weight of a quantized layer is stored in another shape than the layer's
    sizes = [linear_shape(module) or (module.weight.shape[1:].numel(), len(module.weight)) for module in modules]
    outputs, inputs = sum(size for _, size in sizes), sizes[0][0]
    theirs = (len(update), update.numel() // max(1, len(update))) if update.ndim else (outputs, inputs)
    lengths, bias = parts.get("magnitude", parts.get("dora_scale")), adapter.bias(1)
    if theirs != (outputs, inputs) or (lengths is not None and lengths.numel() not in (outputs, *modules[0].weight.shape[1:2])):
        raise InputError(
            f"{where} has another size: {theirs[1]} x {theirs[0]} there, {inputs} x {outputs} here. It was made for another base "
            "of this family (as SD 2 is beside SD 1), or by another trainer's rules. Open its own base."
        )
    if bias is not None and (bias.numel() != outputs or any(module.bias is None for module in modules)):
        raise InputError(f"{where} has a bias that this base's layer can't take. Open its own base.")


def _peft_config(path: Path, metadata: dict[str, str], names: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration, which has the scale of files without `.alpha`: in the header (by diffusers) or adapter_config.json (by PEFT).

    It is removed from `metadata`: the scale is folded into `up`, and a copy that is saved with it would be scaled twice.
    """
    text, where = metadata.pop("lora_adapter_metadata", None), f"{path}: lora_adapter_metadata"
    beside, known = path.with_name("adapter_config.json"), "adapter_model.safetensors"
    if text is None and beside.is_file() and (path.name == known or all(name.startswith("base_model.model.") for name in names)):
        text, where = beside.read_text(encoding="utf-8"), str(beside)
    with refusing(f"{where} isn't a JSON object, so the LoRA's scale is unknown", TypeError, ValueError):
        config = dict(json.loads(text or "{}"))
    for key, start in config.items():  # these initializations change the base's weights before the training
        if key.endswith("init_lora_weights") and re.match("pissa|olora|corda|loftq|lora_ga", str(start)):
            what = f"adds to a base whose weights were changed first (init_lora_weights {start})"
            raise InputError(f"{path} {what}. Convert it by PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).")
    return config


def _scale(parts: Mapping[str, Tensor], config: dict[str, Any], path: str, where: str) -> float:
    """A layer's alpha / rank, by its own alpha, or else by PEFT's configuration (diffusers stores one per component); 1 without either."""
    ranked = [parts[name] for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in parts]
    if not ranked:
        return 1.0
    component, _, rest = path.partition(".")
    found = (config.get(f"{component}.{name}", config.get(name)) for name in ("lora_alpha", "alpha", "alpha_pattern", "use_rslora"))
    alpha, lycoris, patterns, rslora = found
    kinds = ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, re.error
    with refusing(f"{where} has no scale that makes sense: its alpha, or PEFT's configuration, is wrong", *kinds):
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise ValueError(f"alpha holds {parts['alpha'].numel()} numbers, expected one")
        if "alpha" in parts:
            return parts["alpha"].item() / len(ranked[0])
        # PEFT's patterns are regular expressions that the end of a path matches
        matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", rest))
        alpha = next(matching, lycoris if alpha is None else alpha)
        return 1.0 if alpha is None else float(alpha) / (math.sqrt(len(ranked[0])) if rslora else len(ranked[0]))


def _refuse_names(path: str, unknown: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError for names that no LoRA layout has, and says what the file is where it is known."""
    for mark, what in TABLES["kinds"].items():
        marked = [name for name in unknown if re.search(mark, name)]
        if marked and (len(unknown) == len(tensors) or "LoRA file" not in what):
            kind, _, advice = what.partition(". ")
            raise InputError(f"{path} {kind}: it holds {some(marked)}. {advice}.")
    if len(unknown) == len(tensors) <= 2 and all(tensor.ndim <= 2 and "." not in name for name, tensor in tensors.items()):
        raise InputError(f"{path} is a Textual Inversion embedding, no LoRA (it holds {some(unknown)}). Name a LoRA file.")
    none = "of no LoRA layout that diffusers, PEFT or ComfyUI read. Convert it, or merge it into a plain LoRA"
    raise InputError(f"{path}: {some(unknown)}: {none}.")


def _refuse_layers(path: str, absent: Sequence[str], count: int, metadata: Mapping[str, str], base: str) -> None:
    """Raises InputError for a file of `count` layers, some `absent` in the base, and guesses its family. `base`: the denoiser's class."""
    declared = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    guessed = (name for mark, name in TABLES["families"].items() if any(re.search(mark, layer) for layer in absent))
    family = next(guessed, "")
    if "T5" not in family:
        family = declared or ", or ".join(filter(None, (family, "one of its kind, but larger" if len(absent) < count else "")))
    kind = f"for another base ({family})" if family else "for another base, or names its layers as no tool reads them"
    raise InputError(f"{path} is a LoRA {kind}: of its {count} layers this one, a {base}, lacks {some(absent)}. Open its own base.")
