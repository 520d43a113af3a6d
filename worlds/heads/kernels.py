"""How all kernels are compiled: without fast math and threads, so that additions keep the order of the source code."""

from __future__ import annotations

from numba import njit

kernel = njit(cache=True, error_model="numpy")
"""Division by zero gives infinity, as in numpy, instead of a check at each division."""
