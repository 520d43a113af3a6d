"""Reads and writes the library's files, safetensors and JSON, under a temporary name first; and a training's checkpoint as one such file.

A checkpoint is one file, so that it is whole or absent: the tensors (model, optimizer, averaged weights) have prefixed names, everything
else is JSON in the header.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError, refusing

OTHER_FILES: dict[str, str] = json.loads((Path(__file__).parent / "assets" / "files.json").read_text(encoding="utf-8"))
"""Files that are mistaken for safetensors: a pattern of their first bytes -> what they are, as the rest of a sentence."""
MAX_HEADER_BYTES = 100_000_000  # The limit of safetensors itself.
ADDRESS = re.compile(r"([a-z][a-z\d+-]+):/+(.+)")
"""A remote file or folder, such as s3://bucket/faces; or s3:/bucket/faces, which `Path` makes of it."""


def path_at(place: str | Path) -> Path:
    """A local file or folder as a `Path`, or a remote one that fsspec can open as a `UPath`, which has the same methods. Nothing is copied.

    Raises InputError where the extra `remote`, or fsspec's package for that file system, isn't installed.
    """
    address = ADDRESS.fullmatch(str(place))
    if not address:
        return Path(place)
    kinds, advice = (ImportError, ValueError), 'It needs pip install "hyperdreambooth[remote]", and fsspec\'s package for that file system.'
    with refusing(f"{address[1]}://{address[2]} can't be opened", *kinds, advice=advice):
        from upath import UPath

        return cast(Path, UPath(f"{address[1]}://{address[2]}"))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary)` and renames the temporary file to `path`, which is returned; on any error no file is left behind.

    The temporary file is in a folder beside `path`, since a rename is atomic only within one file system. It has the same name, because
    some writers choose a format by the suffix. For a remote `path` it is a local file, which is then uploaded. Raises InputError where the
    folder can't be written or the disk is full.
    """
    path = path_at(path)
    here = isinstance(path, Path)
    kinds = OSError, safetensors.SafetensorError  # the second is how safetensors reports a full disk
    with refusing(f"{path} can't be written", *kinds, advice="Free some space or name another place."):
        if here:
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent if here else None) as scratch:
            temporary = Path(scratch) / path.name
            write(temporary)
            if not here:
                path.write_bytes(temporary.read_bytes())  # object stores write a file atomically
                return path
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)  # safetensors lets only the owner read its files
            temporary.replace(path)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON, atomically. Bytes of file names that aren't valid UTF-8 become escapes, which read back the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda file: file.write_bytes(text.encode(errors="backslashreplace")))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises InputError where it is missing, another value, or has numbers that aren't finite."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    with refusing(f"{path} can't be read", OSError):
        text = path_at(path).read_bytes()
    with refusing(f"{path} isn't JSON", ValueError, RecursionError, advice="Was it cut off while copying?"):
        value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def escaped(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with bytes that aren't valid UTF-8, such as a file name's, as escapes (`\\udcfc`), since safetensors refuses them."""
    return {key: value.encode(errors="backslashreplace").decode() for key, value in metadata.items()}


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file, atomically, with the same bytes for the same content. Tensors may be on any device and not contiguous."""
    about = escaped(metadata or {})
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    def write(file: Path) -> None:
        save_file(ready, file, metadata=about)
        with file.open("r+b") as opened:  # safetensors writes the metadata in random order
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            header |= {"__metadata__": dict(sorted(header["__metadata__"].items()))} if about else {}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            opened.seek(8)
            opened.write(text if len(text) == size else b"")

    return write_atomically(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: its tensors (on the CPU) and its header's metadata.

    The tensors are copies: in the memory-mapped file they would change with it, and their alignment could make the CPU's kernels
    round differently. Raises InputError for a file that is missing, truncated, or not safetensors.
    """
    path = path_at(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    header = read_header(path)[1]
    try:
        tensors = load_file(path) if isinstance(path, Path) else load_bytes(cast(Any, path).read_bytes())
        return {name: tensor.clone() for name, tensor in tensors.items()}, header
    except (safetensors.SafetensorError, OSError) as error:
        raise damaged(path, error) from error


class Entry(NamedTuple):
    """A tensor of a file: its shape, and its dtype by safetensors' name ("F16")."""

    shape: tuple[int, ...]
    kind: str


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Reads a safetensors file's header: its tensors' shapes and dtypes, and the metadata. Raises InputError as `read_tensors` does."""
    path = path_at(path)
    try:
        # not by safetensors, which maps the whole file into memory first: that fails for a file larger than the free memory
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start - 8, MAX_HEADER_BYTES)))
            # the open file's size where possible, since another process may replace the file meanwhile
            size = os.fstat(file.fileno()).st_size if isinstance(path, Path) else cast(Any, path).stat().st_size
        metadata = dict(header.pop("__metadata__", None) or {})
        end = start + max((one["data_offsets"][1] for one in header.values()), default=0)
        if size != end:
            raise ValueError(f"{size:,} bytes instead of {end:,}")
        return {name: Entry(tuple(map(int, one["shape"])), str(one["dtype"])) for name, one in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(path: str | Path, error: Exception) -> InputError:
    """An InputError for a file that isn't whole safetensors: it says what the file is by its first bytes, or what `error` says."""
    what = f"{(str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')}. Was it cut off while copying?"
    if path_at(path).is_file():
        with path_at(path).open("rb") as file:
            start = file.read(64)
        text = start.decode("latin-1")
        if all(byte in b"\t\n\r" or byte >= 32 for byte in start):
            what = "is a text file. Was another one meant?"
        what = next((known for mark, known in OTHER_FILES.items() if re.match(mark, text, re.I)), what)
    return InputError(f"{path} is not a whole safetensors file: {'it ' * what.startswith('is ')}{what}")


def stamp_of(*what: Any) -> str:
    """A hash of tensors, bytes and other values (by their `repr`), which identifies what a training was begun with."""
    digest = hashlib.sha256()
    for value in what:
        data: Any = value if isinstance(value, bytes) else repr(value).encode()
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def save(
    path: str | Path, model: Mapping[str, Tensor], optimizer: dict[str, Any], average: Mapping[str, Tensor], meta: dict[str, Any]
) -> Path:
    """Writes the state of a training: weights, a torch optimizer's `state_dict()`, averaged weights, and JSON `meta`."""
    tensors = {f"{kind}/{name}": value for kind, part in (("model", model), ("average", average)) for name, value in part.items()}
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    groups = json.dumps(optimizer["param_groups"], default=float)  # on CUDA the learning rate is a tensor
    return save_tensors(path, tensors, {"meta": json.dumps(meta), "param_groups": groups})


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Reads what `save` wrote: (model, optimizer state_dict, average, meta)."""
    seen = None
    while seen != (now := os.stat(path).st_mtime_ns if os.path.isfile(path) else 0):
        seen = now  # read again where another process replaced the file meanwhile: header and tensors could be of different steps
        tensors, header = read_tensors(path)
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "optimizer":
            index, key = rest.split("/", 1)
            state.setdefault(int(index), {})[key] = value
        else:
            weights[kind][rest] = value
    optimizer = {"state": state, "param_groups": json.loads(header["param_groups"])}
    return weights["model"], optimizer, weights["average"], json.loads(header["meta"])
