"""Data sets of pictures in parquet files, as the model hub has most of them: unpacked into a folder of people."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .errors import InputError, refusing
from .progress import Progress, say

PEOPLE = ("identity", "identity_id", "celeb_id", "person", "person_id", "subject", "subject_id", "label", "name")
"""Columns that say who is in a picture; the first of them that is there counts."""


def unpack(files: Sequence[Path], folder: Path) -> Path:
    """Writes every picture of parquet files as it is, `folder`/person/0000 and so on, or a folder a picture where no column says who it is.

    A picture's column holds bytes, or a struct with `bytes`, as Hugging Face's data sets have it. The folder is whole or absent.
    Raises InputError where there is no such column, a file is damaged, or pyarrow isn't installed.
    """
    if folder.is_dir():
        return folder
    with refusing('parquet files need pip install "hyperdreambooth[parquet]"', ImportError):
        from pyarrow import ArrowException, parquet
    half, count = folder.with_name(f"{folder.name}.part"), Counter[str]()
    shutil.rmtree(half, ignore_errors=True)
    with refusing(f"the parquet files of {files[0].parent} can't be read", ArrowException, OSError, advice="Fetch them again."):
        opened = [parquet.ParquetFile(file.open("rb")) for file in files]
        kinds = {field.name: str(field.type) for field in opened[0].schema_arrow}  # such as "struct<bytes: binary, path: string>"
        picture = next((name for name, kind in kinds.items() if re.match(r"(struct<.*\bbytes: )?(large_)?binary", kind)), None)
        if picture is None:
            raise InputError(f"{files[0]} has no column of pictures, only {', '.join(kinds)}. Save the pictures in a folder.")
        who = next((name for name in PEOPLE if name in kinds and name != picture), None)
        said = f"the column {who} says who is in a picture" if who else f"no column says who ({', '.join(PEOPLE)}), so each is a person"
        say(f"{files[0].parent}: pictures are in the column {picture}; {said}")
        with Progress("unpacking pictures", sum(file.metadata.num_rows for file in opened)) as progress:
            columns = [picture, who] if who else [picture]
            for row in (row for file in opened for batch in file.iter_batches(64, columns=columns) for row in batch.to_pylist()):
                content, number = row[picture], sum(count.values())
                content = content.get("bytes") if isinstance(content, dict) else content
                # no two names make one folder, and none is hidden
                person = quote(str(row[who]), safe=" ") if who and row[who] is not None else f"{number:07}"
                place = half / (f"%2E{person[1:]}" if person.startswith(".") else person) / f"{count[person]:04}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content or b"")
                count[person] += 1
                progress.update(number + 1)
    half.rename(folder)
    return folder
