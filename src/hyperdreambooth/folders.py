"""Folders of photos: which files are pictures, which person each belongs to, and the captions beside them."""

import os
import re
import warnings
from pathlib import Path
from typing import cast
from urllib.parse import quote

from PIL import Image

from .checkpoint import path_at
from .errors import InputError, refusing
from .photos import SUFFIXES, picture_formats
from .progress import say

SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "@eadir", "__macosx"}
CAPTIONS = (".txt", ".TXT", ".caption")


def list_identities(folder: str | Path) -> dict[str, list[Path]]:
    """Maps each identity to its pictures: a subfolder with all pictures in it (at any depth), or a single picture, is one identity.

    Files that aren't pictures, and those in folders named mask or masks, are left out and listed on stderr; captions, hidden files and
    those of operating systems are left out silently. Raises InputError if there is no such folder or no picture in it, and where two
    people would have one name, such as anna.jpg and anna.png. Names that aren't valid UTF-8 are percent-encoded.

    Args:
        folder: a local path, or an address that `path_at` accepts.
    """
    folder = path_at(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    found: dict[str, list[Path]] = {}
    owners: dict[str, Path] = {}  # The subfolder or picture that each name is from.
    refused: list[str] = []
    for entry in sorted(folder.iterdir(), key=_natural):
        name = _encodable(entry.name if entry.is_dir() else entry.stem)
        inside = sorted((f for f in entry.rglob("*") if not f.is_dir()), key=_natural) if entry.is_dir() else [entry]
        for file in inside:
            parts = file.relative_to(folder).parts
            if file.suffix in CAPTIONS or any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in parts):
                continue
            if _looks_like_picture(file) and not {"mask", "masks"} & {part.lower() for part in parts[:-1]}:
                if owners.setdefault(name, entry) != entry:
                    both = f"{owners[name].name} and {entry.name} are both called {name}"
                    raise InputError(f"{folder}: {both}. Rename one, or put a person's pictures into a folder of their own.")
                found.setdefault(name, []).append(file)
            else:
                refused.append("/".join(parts))
    if refused:
        say(f"{folder}: {len(refused)} files are no pictures of people and aren't taken: {', '.join(refused)}")
    if not found:
        raise InputError(f"{folder} holds no pictures. Expected: {folder}/identity/picture.png, or {folder}/identity.png, one each.")
    return found


def _encodable(name: str) -> str:
    """A file's name, percent-encoded byte by byte where it isn't valid UTF-8, which files and tables of people couldn't hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return quote(os.fsencode(name), safe=" ")
    return name


def _looks_like_picture(file: Path) -> bool:
    """Whether a file is a picture by suffix or content; a damaged one with such a suffix counts, so that reading it says what is wrong."""
    if not file.is_file() or file.suffix.lower() in SUFFIXES:
        return file.is_file()  # False for a dangling symbolic link
    try:
        with warnings.catch_warnings(action="ignore"), file.open("rb") as opened, Image.open(opened, formats=picture_formats()):
            return True
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError):
        return False


def caption_of(photos: object) -> str | None:
    """A single photo's caption in one line, from NAME.txt, NAME.caption or NAME.jpg.txt beside it. InputError if it can't be read."""
    group = photos if isinstance(photos, (list, tuple)) else [photos]
    if len(group) != 1 or not (isinstance(group[0], (str, Path)) or hasattr(group[0], "protocol")):  # a UPath
        return None
    photo = Path(group[0]) if isinstance(group[0], str) else cast(Path, group[0])
    for file in [photo.parent / name for name in (*(photo.stem + suffix for suffix in CAPTIONS), f"{photo.name}.txt")]:
        with refusing(f"the caption {file} can't be read", OSError, UnicodeDecodeError, advice="Save it as UTF-8 text."):
            if file.is_file() and (words := file.read_text("utf-8-sig").split()):
                return " ".join(words)
    return None


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A sort key that puts 2.png before 10.png; the exact name decides between 1.png and 01.png."""
    # isdecimal, not isdigit: "²" is a digit that int() refuses
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.lower())], path.name
