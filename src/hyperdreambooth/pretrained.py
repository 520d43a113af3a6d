"""A trained hypernetwork on disk: config.json, model.safetensors, and the face encoder in transformers' format.

Frozen aux matrices aren't stored, since the recipe in config.json determines them. Learned ones are in model.safetensors.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .backbones import Backbone
from .checkpoint import read_header, read_json, read_tensors, save_tensors, write_atomically, write_json
from .encoder import FaceEncoder
from .errors import InputError, in_range, some
from .formats import public_name
from .hub import download, hypernetwork_card
from .lora import Shape, canonical_modules, linear_shape
from .settings import GenerateConfig, PersonalizeConfig, parsed
from .trainable_lora import HyperNetwork, LightweightLora, PredictedLora
from .training_settings import LARGEST_LAYER, HyperNetworkConfig, LightweightConfig

FORMAT = 1
# Ranges of the defaults in a config.json: a larger value is a damaged file, and could fill a machine's memory.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rank", "copies", "count", "batch"), (1, 1024)),
    **dict.fromkeys(("width", "height"), (8, 8192)),
    **{"steps": (0, 100_000), "prior_pictures": (0, 10_000)},
}


@dataclass
class HyperNetworkInfo:
    """What a hypernetwork was trained for and with: the contents of its config.json."""

    base: str  # The base it predicts for; in config.json its name without this machine's folders.
    targets: dict[str, list[int]]  # Layer path -> [inputs, outputs].
    lightweight: dict[str, Any]
    hypernetwork: dict[str, Any]
    encoder: str = "encoder"  # The encoder's folder, relative to config.json.
    mode: Literal["pro", "faithful"] = "pro"
    prompt: str = "a [V] face"  # The prompt that names the person.
    describe: list[list[str]] = field(default_factory=list)
    """For each part of a photo's prompt the phrases to choose from, see `stages.describe`. Empty: `prompt` is used for every photo."""
    personalize: dict[str, Any] = field(default_factory=dict)  # Defaults of the fine-tuning that suit this base (chosen on validation).
    generate: dict[str, Any] = field(default_factory=dict)  # Defaults of generation that suit this base.
    familiar: float | None = None
    """The `stages.describe.strangeness` above which a photo is unlike all training data. None: not measured."""
    trained: dict[str, Any] = field(default_factory=dict)  # How it was trained, and what it reached on validation.
    data: str = ""  # What it was trained on, in words.
    license: str = ""  # The license of its weights.
    format: int = FORMAT


def build(targets: dict[str, Shape], encoder: FaceEncoder, lightweight: LightweightConfig, config: HyperNetworkConfig) -> PredictedLora:
    """An untrained hypernetwork. Its predictions are zero updates."""
    tokens = LightweightLora(targets, lightweight)
    return PredictedLora(encoder, HyperNetwork(tokens.start(), lightweight.rank * lightweight.down_dim, encoder.dim, config), tokens)


def save_hypernetwork(folder: str | Path, source: PredictedLora, info: HyperNetworkInfo, dtype: torch.dtype = torch.float16) -> Path:
    """Writes the weights in `dtype`, the encoder (if `info` names it "encoder"), a model card and the config; returns the config's path."""
    folder = Path(folder)
    about = asdict(info) | {"base": public_name(info.base)}
    tensors = {name: value.to(dtype) for name, value in source.state_dict().items() if not name.startswith("encoder.")}
    if info.encoder == "encoder":
        source.encoder.save_pretrained(folder / "encoder")
    save_tensors(folder / "model.safetensors", tensors)
    write_atomically(folder / "README.md", lambda file: file.write_text(hypernetwork_card(about), encoding="utf-8"))
    return write_json(folder / "config.json", about)  # written last, so that a folder with a config is complete


@torch.inference_mode(False)  # weights that are made in inference mode can't take part in a training
def load_hypernetwork(folder: str | Path, backbone: Backbone | None = None) -> tuple[PredictedLora, HyperNetworkInfo]:
    """Reads a hypernetwork from a folder or a hub id; with `backbone`, checks that this base has the layers that it predicts.

    Raises InputError where it is no hypernetwork, of a newer format, for another base, or damaged. No memory is allocated for it
    before the sizes in config.json have been compared to those of the tensors.
    """
    if not Path(folder).exists() and str(folder).count("/") == 1:
        folder = download(str(folder))
    folder = Path(folder)
    info = read_info(folder)
    lightweight = parsed(LightweightConfig, info.lightweight, f"{folder / 'config.json'}: lightweight")
    config = parsed(HyperNetworkConfig, info.hypernetwork, f"{folder / 'config.json'}: hypernetwork")
    targets = {path: Shape(*shape) for path, shape in info.targets.items()}
    if backbone is not None:
        check_targets(targets, backbone, str(folder))
    encoder = FaceEncoder.from_pretrained(folder / info.encoder)
    file = folder / "model.safetensors"
    with torch.device("meta"):  # shapes, no memory
        planned = build(targets, encoder, lightweight, config).state_dict()
    wanted = {name: tuple(value.shape) for name, value in planned.items() if not name.startswith("encoder.")}
    found = {name: entry.shape for name, entry in read_header(file)[0].items() if not name.startswith("encoder.")}
    if wrong := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        sizes = f"{wanted.get(wrong[0], 'none')} by the config, {found.get(wrong[0], 'none')} in the file"
        raise InputError(f"{file} doesn't fit its config.json: {wrong[0]} ({sizes}) and {len(wrong) - 1} more.")
    tensors = {name: value for name, value in read_tensors(file)[0].items() if name in wanted}
    if damaged := [name for name, value in tensors.items() if not (value.is_floating_point() and value.float().isfinite().all())]:
        raise InputError(f"{file} is damaged: {some(damaged)} should be finite numbers.")
    source = build(targets, encoder, lightweight, config)
    source.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return source.eval(), info


def read_info(folder: Path) -> HyperNetworkInfo:
    """A hypernetwork's config.json. Raises InputError where it is missing, of a newer format, or wrong in any field."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json, so it isn't a hypernetwork. `train-hypernetwork` makes one.")
    values = read_json(file)
    version = values.get("format", FORMAT)
    if "hypernetwork" not in values or (isinstance(version, (int, float)) and version > FORMAT):
        raise InputError(f"{file} isn't a hypernetwork of format {FORMAT} or older.")
    info = parsed(HyperNetworkInfo, values, str(file))
    if not info.targets or not (folder / info.encoder).is_dir():
        raise InputError(f"{file}: targets must name layers, and encoder a folder beside it, not {info.encoder!r}.")
    for path, shape in info.targets.items():
        if len(shape) != 2:
            raise InputError(f"{file}: targets: {path} must have two sizes, inputs and outputs, not {len(shape)}.")
        for size in shape:
            in_range(size, 1, LARGEST_LAYER, f"{file}: targets: {path}")
    if not all(info.describe):
        raise InputError(f"{file}: describe: every part of the prompt needs at least one phrase.")
    for part, kind in (("personalize", PersonalizeConfig), ("generate", GenerateConfig)):
        given = {name: value for name, value in getattr(info, part).items() if value is not None}
        for name, value in vars(parsed(kind, given, f"{file}: {part}")).items():
            if isinstance(value, (int, float)):
                in_range(value, *LIMITS.get(name, (-1e6, 1e6)), f"{file}: {name}")
    return info


def check_targets(targets: dict[str, Shape], backbone: Backbone, name: str) -> None:
    """Raises InputError unless `backbone` has every layer of `targets`, in the same size. `name`: of the hypernetwork."""
    modules = canonical_modules(backbone.components)
    here = {path: linear_shape(modules[path]) if path in modules else None for path in targets}
    other = [
        f"{path} ({' x '.join(map(str, shape))} there, {' x '.join(map(str, here[path] or ['none']))} here)"
        for path, shape in targets.items()
        if here[path] != shape
    ]
    if other:
        differ = f"{len(other)} of its {len(targets)} layers differ: {some(other)}"
        raise InputError(f"{name} was made for another base: {differ}. Open its own base.")
