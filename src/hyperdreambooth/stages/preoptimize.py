"""Weight pre-optimization (paper, section 4.2): tokens for every identity of a data set.

A chunk of identities shares a batch, each sample with its own tokens. A chunk is trained to the end and written,
row by row, before the next begins: no optimizer ever moves a row whose identity isn't in the batch. All identities see
the same noise and time steps and start from the same tokens, so that their rows can be compared.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import Backbone
from ..checkpoint import read_json, read_tensors, save_tensors, write_json
from ..config import parsed
from ..data import IdentityData
from ..errors import InputError
from ..lightweight import LightweightLora
from ..lora import Hooks, find_targets
from ..progress import Progress
from ..trainable_lora import IdentityTable
from ..training import Run, fit
from ..training_settings import LightweightConfig, PreoptimizeConfig
from .dreambooth import PhotoLosses, Subject, draw_photos, trains_text


def preoptimize(
    backbone: Backbone,
    data: IdentityData,
    config: PreoptimizeConfig,
    output: str | Path,
    *,
    on_row: Callable[[str, Tensor], None] | None = None,
    minutes: float | None = None,
) -> dict[str, Tensor]:
    """Tokens (layers, width) by identity; one file a row in `output`/rows. Rows that are there are kept.

    Survives a kill at any moment: a row is whole or absent, and an unfinished chunk resumes from its checkpoint with the same
    identities, since the size of a batch decides how its sums are rounded.
    """
    rows = Path(output) / "rows"
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    lightweight = LightweightLora(targets, config.lightweight)
    fingerprint = lightweight.fingerprint()
    table = read_table(output, fingerprint) if rows.is_dir() else {}
    state = Path(output) / "chunk"
    begun = read_json(state / "chunk.json").get("names", []) if (state / "chunk.json").is_file() else []
    if not begun or not set(begun) <= set(data.names):
        begun = []
        shutil.rmtree(state, ignore_errors=True)
    todo = [name for name in data.names if name not in table and name not in begun]
    chunks = [begun] * bool(begun) + [todo[start : start + config.chunk] for start in range(0, len(todo), config.chunk)]
    deadline = time.monotonic() + 60 * minutes if minutes is not None else None
    with Progress("identities", len(data.names), len(table)) as progress:
        for chunk in chunks:
            if deadline is not None and time.monotonic() > deadline:
                break
            write_json(state / "chunk.json", {"names": chunk})
            tokens = _train_chunk(backbone, data, [data.names.index(name) for name in chunk], lightweight, config, state)
            for name, row in zip(chunk, tokens, strict=True):
                if name in table:
                    continue  # it was written before an interruption
                save_row(output, name, row, fingerprint)
                table[name] = row
                if on_row:
                    on_row(name, row)
            shutil.rmtree(state, ignore_errors=True)
            progress.update(len(table))
    return table


def _train_chunk(
    backbone: Backbone, data: IdentityData, chunk: list[int], lightweight: LightweightLora, config: PreoptimizeConfig, state: Path
) -> Tensor:
    # people with fewer pictures see theirs more often
    most = max(len(data.of_person[person]) for person in chunk)
    latents = torch.stack([torch.stack([data.latents[data.of_person[p][i % len(data.of_person[p])]] for i in range(most)]) for p in chunk])
    device = next(backbone.components.parameters()).device
    subject = Subject(latents.to(device).float(), config.prompt)
    source = IdentityTable(len(chunk), lightweight).to(device)
    draw = draw_photos(
        backbone, subject, config.levels, config.copies, trains_text=trains_text(lightweight.targets, backbone), seed=config.training.seed
    )
    run = Run(directory=state, device=device, name="chunk", quiet=True)
    with Hooks(backbone.components, lightweight.targets) as hooks:
        fit(PhotoLosses(backbone, 1.0, hooks), source, draw, config.training, run)
    return source.tokens.detach().cpu()


@dataclass
class TableConfig:
    """What the rows of a table belong to, out of the config.json that `preoptimize` and `train-light` write beside them."""

    base: str
    prompt: str
    targets: tuple[str, ...]
    lightweight: LightweightConfig


def read_table_config(folder: str | Path) -> TableConfig:
    """Raises InputError where there is no such config.json, or it is wrong."""
    file = Path(folder) / "config.json"
    values = read_json(file)
    config = values.get("config")
    if not isinstance(config, dict):
        raise InputError(f"{file} is neither of a table of `preoptimize` nor of a run of `train-light`: it has no settings under config.")
    known = {key: config[key] for key in ("prompt", "targets", "lightweight") if key in config}
    return parsed(TableConfig, {"base": values.get("base"), **known}, str(file))


def save_row(folder: str | Path, name: str, tokens: Tensor, fingerprint: str) -> Path:
    """Writes one identity's tokens (layers, width), whole or not at all."""
    return save_tensors(Path(folder) / "rows" / f"{name}.safetensors", {"tokens": tokens}, {"fingerprint": fingerprint, "identity": name})


def read_table(folder: str | Path, fingerprint: str) -> dict[str, Tensor]:
    """The rows of a pre-optimized table: identity -> tokens (layers, width). Refuses rows of another fingerprint."""
    table = {}
    # a kill may leave a temporary file, whose name begins with a dot
    for file in sorted((Path(folder) / "rows").glob("[!.]*.safetensors")):
        tensors, header = read_tensors(file)
        if header.get("fingerprint") != fingerprint:
            raise InputError(
                f"{file} was pre-optimized for other targets, token sizes or aux seed (fingerprint {header.get('fingerprint')}, here {fingerprint}). Use its config, or another folder."
            )
        tokens = tensors.get("tokens")
        if "identity" not in header or tokens is None or tokens.ndim != 2 or not tokens.is_floating_point() or not tokens.isfinite().all():
            raise InputError(f"{file} is damaged: it should hold one identity's tokens, finite numbers (layers, width).")
        table[header["identity"]] = tokens
    return table
