"""Measures how many finished pictures one core draws per second: `python -m worlds.heads.speed`.

"same" draws several contexts per person, as a training set does; "new" draws a new person in every picture.
"""

from __future__ import annotations

import argparse
import time

from . import context, person, render


def rate(count: int, each: int, size: int) -> float:
    """Pictures per second of process time: `count` pictures, `each` per person, in random contexts."""
    start = time.process_time()
    for k in range(count):
        render(person(1000 + k // each), context(k), size)
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    rate(16, 4, options.size)  # compiles
    for name, each in (("same person, 8 contexts each", 8), ("same person, 4 contexts each", 4), ("new person each", 1)):
        print(f"{name}: {rate(options.count, each, options.size):.1f} pictures per second of one core's time")


if __name__ == "__main__":
    main()
