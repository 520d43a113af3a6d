"""How everything here is compiled: no fast math and no threads, so that the order of every addition is the one written down."""

from __future__ import annotations

from numba import njit

kernel = njit(cache=True, error_model="numpy")
"""Division by zero gives infinity, as in numpy, instead of a check at each division."""
