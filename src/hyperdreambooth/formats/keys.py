"""Finds a base's layers by the names of LoRA tensors, in all spellings that are in use.

A name is a layer's, then the tensor's part in it: `unet.mid_block...to_q.lora_A.weight`, `lora_unet_mid_block_..._to_q.alpha`. Layers are
found by diffusers' names with any known prefix and separator. Names of the code that a base was first published with are translated by
diffusers (`lora_state_dict`), except SD 3's, which it doesn't know. There one layer may be several of diffusers' (query, key, value).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

from ..errors import InputError
from ..lora import canonical, canonical_modules, unwrapped

TABLES = json.loads((Path(__file__).parents[1] / "assets" / "loras.json").read_text(encoding="utf-8"))
"""Regular expressions for components' prefixes, and for recognizing adapters, families and other files; SD 3's original names; headers."""
PART = re.compile(
    r"(.+?)\.(?:lora_(A|B|down|up|mid)(?:(?:\.[\w-]+)?\.weight)?|lora_(?:B|up)(?:\.[\w-]+)?\.(bias)|(down|up)\.weight|lora_(magnitude)_vector(?:\.[\w-]+)*"
    r"|(alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
)
PARTS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
ROWS = 3072 * 7  # Outputs of the layer that `_by_diffusers` has converted: the only number that diffusers accepts for Flux's `linear1`.


def split(name: str) -> tuple[str, str]:
    """A tensor's name -> its layer and its part: down, up, mid, bias, alpha, dora_scale, magnitude, diff, diff_b, and LoHa's and LoKr's
    own; both "" for an unknown spelling."""
    if not re.search(r"(double|single)_blocks\.\d+\.processor\.", name):  # XLabs' names, which diffusers converts as a whole
        old = StateDictType.DIFFUSERS_OLD if "self_attn" in name else StateDictType.DIFFUSERS
        name = next(iter(convert_unet_state_dict_to_peft(convert_state_dict_to_peft({name: None}, old))))
    found = PART.fullmatch(name)
    layer, part = (found[1], found[found.lastindex or 0]) if found else ("", "")
    return layer, PARTS.get(part, part)


def split_prefix(layer: str) -> tuple[str | None, str]:
    """A layer's name -> the component that its prefixes stand for (None without such a prefix), and the rest of the name."""
    component = None
    while prefix := next((prefix for prefix in TABLES["prefixes"] if re.match(prefix, layer)), None):
        component, layer = component or TABLES["prefixes"][prefix], re.sub(f"^(?:{prefix})", "", layer)
    return component, layer


def underscored(name: str) -> str:
    """A layer's name with underscores for all separators and without `text_model`: the same for all spellings."""
    return re.sub(r"[._]+", "_", name).removeprefix("text_model_")


class Place(NamedTuple):
    """A layer of the base, and which outputs of the file's layer belong to it: of `total` equal shares those in `rows` (None: all)."""

    path: str
    rows: Tensor | None = None
    total: int = 1

    def outputs(self, count: int) -> Tensor:
        """The indices of this layer's outputs among `count` outputs of the file's layer, in this layer's order."""
        if self.rows is None:
            return torch.arange(count)
        place = torch.full((self.total,), -1).index_copy(0, self.rows, torch.arange(len(self.rows)))
        place = place[torch.arange(count) * self.total // count]
        return place.argsort(stable=True)[int((place < 0).sum()) :]


class Names:
    """Finds a base's layers by any of their names. `root`: its denoiser and text encoders under the pipeline's own names."""

    def __init__(self, root: nn.Module):
        parts = dict(root.named_children())
        self.denoiser = "transformer" if "transformer" in parts else "unet"
        self.model: Any = parts.get(self.denoiser)
        t5 = next((name for name, part in parts.items() if "T5" in type(part).__name__), "t5")
        self.components = {"denoiser": self.denoiser, "t5": t5}
        self.modules: dict[str, Any] = {}
        self.paths: dict[str, str] = {}
        for path, module in canonical_modules(root).items():
            base = unwrapped(module)
            if isinstance(getattr(base, "weight", None), Tensor) and ".base_layer" not in path and ".lora_" not in path:
                self.modules[path] = base
                component, _, rest = path.partition(".")
                self.paths[f"{component}.{underscored(rest)}"] = path

    def find(self, layer: str) -> list[Place]:
        """The base's layers that a file's layer changes: none if the base has no such layer, several if the file has them as one."""
        component, rest = split_prefix(layer)
        name = underscored(rest)
        places = [self.components.get(component, component)] if component else [self.denoiser, "text_encoder", "text_encoder_2"]
        for spelling in (f"{place}.{name}" for place in places):
            path = self.paths.get(spelling) or self.paths.get(f"{spelling}_0" if spelling.endswith("_to_out") else "")
            if path:
                return [Place(path)]
        if places[0] != self.denoiser:
            return []
        return self._original_sd3(name) or self._by_diffusers(layer if ".processor." in rest else f"lora_unet_{name}")

    def _original_sd3(self, name: str) -> list[Place]:
        """The layers that a layer of SD 3's original code, such as `joint_blocks_0_x_block_attn_qkv`, consists of in diffusers."""
        block, dot, part = re.sub(r"^joint_blocks_(\d+)_", r"transformer_blocks_\1_.", name).rpartition(".")
        ours = TABLES["sd3"].get(part, "").split()
        paths = [self.paths[f"{self.denoiser}.{block}{one}"] for one in ours if f"{self.denoiser}.{block}{one}" in self.paths]
        if not paths or len(paths) != len(ours) or ("_blocks" in name and not dot):
            return []
        # diffusers has shift and scale in the opposite order in the last layers
        swapped = paths[0].endswith(("norm_out.linear", f"blocks.{self.model.config.num_layers - 1}.norm1_context.linear"))
        shares = (torch.tensor([3, 4, 5, 0, 1, 2]),) if swapped else torch.arange(6).chunk(len(paths))
        return [Place(path, rows, 6) for path, rows in zip(paths, shares, strict=True)]

    def _by_diffusers(self, layer: str) -> list[Place]:
        """The layers to which diffusers' converter of LoRA files moves each output of this one, found by a LoRA of numbered outputs."""
        kohya = "lora_" if layer.startswith("lora_") else ""
        probe = {f"{layer}.{kohya}down.weight": torch.ones(1, 1), f"{layer}.{kohya}up.weight": torch.arange(ROWS).float()[:, None]}
        try:
            if self.denoiser == "unet":
                answer = StableDiffusionLoraLoaderMixin.lora_state_dict(probe, unet_config=self.model.config)[0]
            else:
                answer = FluxLoraLoaderMixin.lora_state_dict(probe)
        except (ValueError, LookupError, RuntimeError, AttributeError, NotImplementedError):
            return []  # the converter doesn't know this layer
        found = []
        for key, rows in answer.items():
            place, part = split(key)
            # the converter names the upsampler of a block without attention as if it were an attention
            spelling = re.sub(r"attentions_\d+_conv$", "upsamplers_0_conv", underscored(split_prefix(place)[1]))
            if part == "up" and f"{self.denoiser}.{spelling}" in self.paths:
                found.append(Place(self.paths[f"{self.denoiser}.{spelling}"], rows[:, 0].long(), ROWS))
        return found


def plain_path(layer: str) -> str:
    """A layer's canonical path as far as its name alone determines it, without a base; kohya's names stay as they are."""
    component, rest = split_prefix(layer)
    transformer = (component == "denoiser" and layer.startswith("transformer.")) or rest.startswith(("transformer_blocks.", "single_"))
    found = ("transformer" if transformer else "unet") if component in (None, "denoiser") else component
    return layer if layer.startswith("lora_") else canonical(f"{found}.{rest}")


def kohya_name(path: str, *, two_text_encoders: bool) -> str:
    """A canonical path -> kohya's name: `lora_unet_...`; `lora_te_...`, or `lora_te1_...` and `lora_te2_...` of two encoders.

    Raises InputError for the layers of a transformer (SD 3, Flux): kohya names those by the original code, where query,
    key and value are one layer, so an update of one of them alone has no name there.
    """
    component, _, rest = canonical(path).partition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if two_text_encoders else "lora_te", "text_encoder_2": "lora_te2"}
    if component not in prefix:
        raise InputError(f"kohya's layout has no name for {path}. Write diffusers' layout, which ComfyUI opens for these bases.")
    return f"{prefix[component]}_{rest.replace('.', '_')}"


def check_layout(layout: str, components: Iterable[str]) -> None:
    """Raises InputError if a base of these components can't be written in `layout`. To be called before the training."""
    if layout == "kohya" and "transformer" in components:
        kohya_name("transformer.transformer_blocks", two_text_encoders=True)
