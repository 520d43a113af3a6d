"""Weight pre-optimization (paper, section 4.2): tokens for every identity of a data set.

A chunk of identities shares a batch, each sample with its own tokens, and is trained to the end and written before the next begins. All
identities see the same noise and time steps and start from the same tokens, so that their rows can be compared.

The size of a batch, and whoever else is in it, decide how its sums are rounded. So who shares a chunk follows from all identities'
names alone, never from which rows are there or whose turn it is: shards, machines and interruptions change no bit of a row.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data import FolderOfPeople, IdentityData
from ..errors import InputError
from ..lora import find_targets
from ..progress import Progress
from ..tables import Table, save_row
from ..trainable_lora import IdentityTable, LightweightLora
from ..training import Run
from ..training_settings import PreoptimizeConfig
from .dreambooth import Subject, train_on_photos


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" -> (i, n): the i-th of n shards, counted from 0."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"a shard is i/n with i from 0 to n-1, such as 0/4, not {text!r}.")
    return int(index), int(count)


def chunks_of(names: Sequence[str], size: int, shard: tuple[int, int] = (0, 1)) -> list[list[str]]:
    """All identities in their order, cut into chunks; of these every n-th from the i-th on, for the shard (i, n)."""
    return [list(names[start : start + size]) for start in range(0, len(names), size)][shard[0] :: shard[1]]


def preoptimize(
    backbone: Backbone,
    data: IdentityData | FolderOfPeople,
    config: PreoptimizeConfig,
    output: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    minutes: float | None = None,
) -> Table:
    """Makes the rows of a shard's identities, tokens (layers, width), one file each in `output`/rows. Rows that are there are kept.

    Survives a kill at any moment: a row is whole or absent, and an unfinished chunk goes on from its checkpoint. Any number of
    processes may work on one table, on the same shard too.
    """
    chunks = chunks_of(data.names, config.chunk, shard)
    make, begun = Rows(backbone, data, config, output), time.monotonic()
    with Progress("chunks", len(chunks)) as progress:
        for done, chunk in enumerate(chunks, 1):
            if minutes is not None and time.monotonic() - begun > 60 * minutes:
                break
            make(chunk)
            progress.update(done)
    return make.table


class Rows:
    """Makes the rows of a chunk of identities, those that aren't there yet."""

    def __init__(self, backbone: Backbone, data: IdentityData | FolderOfPeople, config: PreoptimizeConfig, output: str | Path):
        self.backbone, self.data, self.config, self.output = backbone, data, config, Path(output)
        targets = find_targets(backbone.components, config.targets or backbone.default_targets)
        self.lightweight = LightweightLora(targets, config.lightweight)
        self.table = Table(output, self.lightweight.fingerprint())

    def __call__(self, chunk: Sequence[str]) -> None:
        if all(map(self.table.has, chunk)):
            return
        latents = self.data.latents_of(chunk)
        if all(map(self.table.has, latents)):
            return
        # its checkpoint is found by any process that trains the same people
        state = self.output / "chunk" / hashlib.sha256(os.fsencode("/".join(latents))).hexdigest()[:16]
        try:
            tokens = self._train(list(latents.values()), state)
        except InputError:
            if not all(map(self.table.has, latents)):
                raise
            return  # another process was done with the chunk, and took the checkpoint away
        for name, row in zip(latents, tokens, strict=True):
            if not self.table.has(name):  # else it was written before an interruption, or by another process
                save_row(self.output, name, row, self.table.fingerprint)
        # the folder stays until tables are merged: another process may be about to write its own checkpoint there
        (state / "state.safetensors").unlink(missing_ok=True)

    def _train(self, photos: list[Tensor], state: Path) -> Tensor:
        most = max(map(len, photos))  # people with fewer pictures see theirs more often
        latents = torch.stack([mine[torch.arange(most) % len(mine)] for mine in photos])
        subject = Subject(latents.to(self.backbone.device).float(), self.config.prompt)
        source = IdentityTable(len(photos), self.lightweight).to(self.backbone.device)
        config, run = self.config, Run(state, name="chunk", quiet=True)
        train_on_photos(self.backbone, subject, source, self.lightweight.targets, config.levels, config.copies, config.training, run)
        return source.tokens.detach().cpu()
