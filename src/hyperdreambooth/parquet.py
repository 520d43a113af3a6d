"""Unpacks image data sets in Parquet files, the usual format on the Hugging Face Hub, into one folder for each person."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .errors import InputError, refusing
from .progress import Progress, say

PEOPLE = ("identity", "identity_id", "celeb_id", "person", "person_id", "subject", "subject_id", "label", "name")
"""Names of columns that identify the person in a picture; the first of these that the data set has is used."""


def unpack(files: Sequence[Path], folder: Path) -> Path:
    """Writes the encoded pictures of Parquet files unchanged to `folder`/PERSON/0000, 0001 and so on, and returns `folder`.

    Without a column of `PEOPLE` that all files have, every picture is a person of its own, as is one whose person has an empty name. The
    column of pictures holds bytes, or a struct with the field `bytes`, as in Hugging Face's data sets. The folder appears only once it is
    complete; an existing one is returned as it is.
    Raises InputError if a file has no column of pictures or is damaged, or pyarrow isn't installed.
    """
    if folder.is_dir():
        return folder
    with refusing('parquet files need pip install "hyperdreambooth[parquet]"', ImportError):
        from pyarrow import ArrowException, parquet
    half, count = folder.with_name(f"{folder.name}.part"), Counter[str]()
    shutil.rmtree(half, ignore_errors=True)
    with refusing(f"the parquet files of {files[0].parent} can't be read", ArrowException, OSError, advice="Fetch them again."):
        opened = [parquet.ParquetFile(file.open("rb")) for file in files]
        kinds = [{field.name: str(field.type) for field in file.schema_arrow} for file in opened]  # such as "struct<bytes: binary>"
        usable = [[name for name, kind in mine.items() if re.match(r"(struct<.*\bbytes: )?(large_)?binary", kind)] for mine in kinds]
        picture = next((name for name in usable[0] if all(name in mine for mine in usable)), "")
        if not picture:
            called = f" called {usable[0][0]}" if usable[0] else ""
            lacking = next(i for i, mine in enumerate(usable) if not usable[0] or usable[0][0] not in mine)
            only = f"only {', '.join(kinds[lacking])}"
            raise InputError(f"{files[lacking]} has no column of pictures{called}, {only}. Save the pictures in a folder.")
        who = next((name for name in PEOPLE if all(name in mine for mine in kinds) and name != picture), None)
        none = f"no column that every file has says who ({', '.join(PEOPLE)}), so each is a person"
        said = f"the column {who} says who is in a picture" if who else none
        say(f"{files[0].parent}: pictures are in the column {picture}; {said}")
        with Progress("unpacking pictures", sum(file.metadata.num_rows for file in opened)) as progress:
            columns = [picture, who] if who else [picture]
            for row in (row for file in opened for batch in file.iter_batches(64, columns=columns) for row in batch.to_pylist()):
                content, number = row[picture], sum(count.values())
                content = content.get("bytes") if isinstance(content, dict) else content
                # percent-encoding keeps different names apart; a leading dot is encoded too, since hidden folders are skipped
                person = quote(str(row[who]), safe=" ") if who and row[who] not in (None, "") else f"{number:07}"
                place = half / (f"%2E{person[1:]}" if person.startswith(".") else person) / f"{count[person]:04}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content or b"")
                count[person] += 1
                progress.update(number + 1)
    half.rename(folder)
    return folder
