"""LoRA files in the readers of other libraries must give the pictures of the library's hooks (measured by benchmarks/readers.py)."""

from __future__ import annotations

import pytest

from benchmarks.readers import FAMILIES, READERS, measure


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_reader_draws_what_the_hooks_draw(tmp_path, family):
    rows = list(measure(FAMILIES[family], tmp_path))
    assert len(rows) == len(READERS) + 2
    for layout, reader, error, effect in rows:
        assert effect > 0.05, "the LoRA has no effect"
        assert error < 1e-3 * effect, (layout, reader, error)
