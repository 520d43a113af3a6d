"""Tables of pre-optimized tokens: one file for each identity while a table is made, later a few files with many identities each.

    TABLE/config.json                    base, prompt, targets and token sizes of all rows
    TABLE/rows/NAME.safetensors          tokens (layers, width) of one identity
    TABLE/packed/HASH.safetensors        tokens (N, layers, width) of N identities, whose names are in the file's header
    TABLE/packed/index.json              which identities are in which packed file

A row's file is written atomically, and every process computes the same bytes for it; so any number of processes may write into one table.
The folder may be remote, see `checkpoint.path_at`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .checkpoint import path_at, read_header, read_json, read_tensors, save_tensors, write_json
from .errors import InputError
from .settings import parsed
from .training_settings import LightweightConfig

PACK_BYTES = 1 << 28  # The largest size of a packed file. Merging takes a few times as much memory.


@dataclass
class TableConfig:
    """The base and settings that a table's rows were made with, from the config.json that `preoptimize` and `train-light` write."""

    base: str
    prompt: str
    targets: tuple[str, ...]
    lightweight: LightweightConfig


def read_table_config(folder: str | Path) -> TableConfig:
    """Reads a table's config.json. Raises InputError where it is missing, wrong, or of another command."""
    file = path_at(folder) / "config.json"
    values = read_json(file)
    config = values.get("config")
    if not isinstance(config, dict):
        raise InputError(f"{file} is neither of a table of `preoptimize` nor of a run of `train-light`: it has no settings under config.")
    known = {key: config[key] for key in ("prompt", "targets", "lightweight") if key in config}
    return parsed(TableConfig, {"base": values.get("base"), **known}, str(file))


def save_row(folder: str | Path, name: str, tokens: Tensor, fingerprint: str) -> Path:
    """Writes one identity's tokens (layers, width) into a file of their own, atomically."""
    file = path_at(folder) / "rows" / f"{name}.safetensors"
    return save_tensors(file, {"tokens": tokens}, {"fingerprint": fingerprint, "identity": name})


class Table(Mapping[str, Tensor]):
    """Identity -> tokens (layers, width), which are read from disk on each access: memory doesn't grow with the table.

    The folder is listed once, at first use. Raises InputError for rows of another fingerprint, and for damaged ones.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder, self.fingerprint = path_at(folder), fingerprint
        self.opened: dict[Path, Any] = {}

    @cached_property
    def packed(self) -> dict[str, tuple[Path, int]]:
        """Identity -> its packed file and its index in that."""
        index = self.folder / "packed" / "index.json"
        found: dict[str, tuple[Path, int]] = {}
        for name in read_json(index).get("files", ()) if index.is_file() else ():
            if not (index.parent / name).is_file():
                raise InputError(f"{index} names {name}, which is missing. Copy it again, or delete {index.name} to do without.")
        for file in sorted(index.parent.glob("[!.]*.safetensors")):
            names = json.loads(self._header(file).get("identities", "[]"))
            found |= {name: (file, place) for place, name in enumerate(names)}
        return found

    @cached_property
    def loose(self) -> dict[str, Path]:
        """Identity -> its own file. Names that begin with a dot are files that are still being written."""
        files = sorted((self.folder / "rows").glob("[!.]*.safetensors"))
        return {self._header(file).get("identity", file.stem): file for file in files}

    def _header(self, file: Path) -> dict[str, str]:
        header = read_header(file)[1]
        if header.get("fingerprint") != self.fingerprint:
            prints = f"fingerprint {header.get('fingerprint')}, here {self.fingerprint}"
            raise InputError(f"{file} is for other targets, token sizes or aux seed ({prints}). Use its config, or another folder.")
        return header

    def has(self, name: str) -> bool:
        """Whether that identity has a row now; unlike `in` it also finds rows that other processes wrote since the folder was listed."""
        file = self.folder / "rows" / f"{name}.safetensors"
        return name in self.packed or (file.is_file() and bool(self._header(file)))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.packed:
            return _row(self.loose[name])
        file, place = self.packed[name]
        if file not in self.opened:
            self.opened[file] = safetensors.safe_open(str(_fetched(file)), framework="pt")
        return _checked(self.opened[file].get_slice("tokens")[place], file)

    def __contains__(self, name: object) -> bool:
        return name in self.packed or name in self.loose

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.packed.keys() | self.loose.keys()))

    def __len__(self) -> int:
        return len(self.packed.keys() | self.loose.keys())


def _fetched(file: Path) -> Path:
    """A local file itself, or a local copy of a remote one, which is kept until the process ends."""
    if isinstance(file, Path):
        return file
    import fsspec

    return Path(fsspec.open_local(f"simplecache::{file}"))


def _row(file: Path) -> Tensor:
    return _checked(read_tensors(file)[0].get("tokens"), file)


def _checked(tokens: Tensor | None, file: Path) -> Tensor:
    if tokens is None or tokens.ndim != 2 or not tokens.is_floating_point() or not tokens.isfinite().all():
        raise InputError(f"{file} is damaged: it should hold tokens, finite numbers (layers, width). Delete it and make it again.")
    return tokens


def read_table(folder: str | Path, fingerprint: str) -> Table:
    """A table whose folder is listed already. Raises InputError for rows of another fingerprint, and for damaged files."""
    table = Table(folder, fingerprint)
    len(table)
    return table


def merge(folder: str | Path, fingerprint: str, *, file_bytes: int = PACK_BYTES) -> Table:
    """Packs the rows that have files of their own into a few files, and deletes the single files once the packed rows equal them.

    Killed at any moment and run again it gives the same result, since a packed file's name is a hash of its content. Raises InputError for
    rows that are damaged, of another fingerprint or size, and where a row differs from the same identity's packed one.
    """
    table, place = Table(folder, fingerprint), path_at(folder) / "packed"
    new = sorted(table.loose.keys() - table.packed.keys())
    many = max(1, file_bytes // (table[new[0]].nbytes or 1)) if new else 1
    for names in (new[start : start + many] for start in range(0, len(new), many)):
        rows = {name: table[name] for name in names}
        first = rows[names[0]]
        if odd := [name for name, row in rows.items() if (row.shape, row.dtype) != (first.shape, first.dtype)]:
            raise InputError(f"{table.loose[odd[0]]} has other sizes than {table.loose[names[0]]}. Delete the wrong one and make it again.")
        tokens, identities = torch.stack([*rows.values()]), json.dumps(names)
        digest = hashlib.sha256(identities.encode() + tokens.numpy().tobytes()).hexdigest()[:16]
        save_tensors(place / f"{digest}.safetensors", {"tokens": tokens}, {"fingerprint": fingerprint, "identities": identities})
    table.packed = Table(folder, fingerprint).packed
    files: dict[str, list[str]] = {}
    for name, (file, _) in table.packed.items():
        files.setdefault(file.name, []).append(name)
    if files:
        write_json(place / "index.json", {"fingerprint": fingerprint, "identities": len(table.packed), "files": files})
    for name, file in table.loose.items():
        if not torch.equal(_row(file), table[name]):
            raise InputError(f"{file} differs from the packed row of {name}: by settings, or by the kind of device. Delete one.")
        file.unlink()
    return read_table(folder, fingerprint)
