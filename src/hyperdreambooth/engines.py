"""Work on many machines: Ray Data takes items through workers that hold a model each. The only file that knows Ray.

An item may be worked on twice, when a worker died in the middle of it: what is there already must be left as it is.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from .errors import InputError
from .progress import Progress

LOCAL = {"num_cpus": 2, "object_store_memory": 1 << 28}
"""The Ray that is started here: two workers; little shared memory, since items are but names."""
MOST_BLOCKS = 4096


class Worker:
    """Opens what it needs once, then does one item after another. What a user got wrong comes back in words."""

    def __init__(self, make: Callable[[], Callable[[Any], object]]):
        self.make = make
        self.work: Callable[[Any], object] | None = None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            work = self.work = self.work or self.make()
            work(json.loads(row["item"]))
            return {"problem": ""}
        except InputError as error:
            return {"problem": str(error)}


def on_ray(name: str, make: Callable[[], Callable[[Any], object]], items: Sequence[Any], address: str | None = None) -> None:
    """Does every item (what JSON can hold) with what `make` gives, once in each worker: one a GPU of the cluster, or one a CPU core.

    Without `address` or RAY_ADDRESS a Ray with two workers is started on this machine and ends with the work. A worker that vanishes is
    replaced and its items are done again. Raises InputError where a worker does, and where Ray isn't installed or can't be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError('the engine ray needs Ray: pip install "hyperdreambooth[ray]", or use --engine local.') from error
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **(LOCAL if where == "local" else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"there is no Ray at {where} ({str(error).splitlines()[0]}). Check --address, or leave it out.") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        cards, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        # two blocks a worker in flight: the next one waits beside the one in work
        pool = ray.data.ActorPoolStrategy(size=min(len(items), cards or cores), max_tasks_in_flight_per_actor=2)
        rows = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=min(len(items), MOST_BLOCKS))
        done = rows.map(Worker, fn_constructor_args=(make,), compute=pool, num_cpus=1, num_gpus=1 if cards else 0)
        with Progress(name, len(items)) as progress:
            for count, row in enumerate(done.iter_rows(), 1):
                if row["problem"]:
                    raise InputError(row["problem"])
                progress.update(count)
    finally:
        ray.shutdown()
