"""Folders of people: which files are pictures, whose they are, and what is written beside them."""

import re
import warnings
from pathlib import Path

from PIL import Image

from .checkpoint import path_at
from .errors import InputError, refusing
from .photos import SUFFIXES, picture_formats
from .progress import say

LEFT_BY_SYSTEMS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "@eadir", "__macosx"}
CAPTIONS = (".txt", ".TXT", ".caption")


def list_identities(folder: str | Path) -> dict[str, list[Path]]:
    """Identity -> its pictures: a subfolder each (with whatever folders are in it), or a picture each.

    What is no picture, or in a folder of masks, is named and counted on stderr; captions and what systems leave in folders isn't.
    Raises InputError where there are no pictures.

    Args:
        folder: here, or an address as `path_at` takes it.
    """
    folder = path_at(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    found: dict[str, list[Path]] = {}
    refused: list[str] = []
    for entry in sorted(folder.iterdir(), key=_natural):
        inside = sorted((f for f in entry.rglob("*") if not f.is_dir()), key=_natural) if entry.is_dir() else [entry]
        for file in inside:
            parts = file.relative_to(folder).parts
            if file.suffix in CAPTIONS or any(part.startswith(".") or part.lower() in LEFT_BY_SYSTEMS for part in parts):
                continue
            if _looks_like_picture(file) and not {"mask", "masks"} & {part.lower() for part in parts[:-1]}:
                found.setdefault(entry.name if entry.is_dir() else entry.stem, []).append(file)
            else:
                refused.append("/".join(parts))
    if refused:
        say(f"{folder}: {len(refused)} files are no pictures of people and aren't taken: {', '.join(refused)}")
    if not found:
        raise InputError(f"{folder} holds no pictures. Expected: {folder}/identity/picture.png, or {folder}/identity.png, one each.")
    return found


def _looks_like_picture(file: Path) -> bool:
    """By content; a damaged file with a picture's suffix counts too, so that reading it says what is wrong."""
    if not file.is_file() or file.suffix.lower() in SUFFIXES:
        return file.is_file()  # a dangling link is none
    try:
        with warnings.catch_warnings(action="ignore"), file.open("rb") as opened, Image.open(opened, formats=picture_formats()):
            return True
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError):
        return False


def caption_of(photos: object) -> str | None:
    """The caption beside a person's only photo, NAME.txt, NAME.caption or NAME.jpg.txt, in one line. InputError: it can't be read."""
    group = photos if isinstance(photos, (list, tuple)) else [photos]
    if len(group) != 1 or not isinstance(group[0], (str, Path)):
        return None
    photo = Path(group[0])
    for file in [photo.parent / name for name in (*(photo.stem + suffix for suffix in CAPTIONS), f"{photo.name}.txt")]:
        with refusing(f"the caption {file} can't be read", OSError, UnicodeDecodeError, advice="Save it as UTF-8 text."):
            if file.is_file() and (words := file.read_text("utf-8-sig").split()):
                return " ".join(words)
    return None


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts 2.png before 10.png; the name itself decides between 1.png and 01.png."""
    # isdecimal, since "²" is a digit that int() refuses
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.lower())], path.name
