"""LoRA files through the readers of others: the pictures are the hooks' own (the measuring itself is benchmarks/readers.py)."""

from __future__ import annotations

import pytest

from benchmarks.readers import FAMILIES, READERS, measure


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_reader_draws_what_the_hooks_draw(tmp_path, family):
    rows = list(measure(FAMILIES[family], tmp_path))
    assert len(rows) == len(READERS) + 2
    for layout, reader, error, effect in rows:
        assert effect > 0.05, "the LoRA does nothing"
        assert error < 1e-3 * effect, (layout, reader, error)
