"""Who does a command's pieces of work: this process, one after another, or Ray Data, with a worker on each card of a cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InputError
from ..progress import Progress
from .options import WithBase

MOST_BLOCKS = 4096  # Of Ray's: pieces that are handed out together, where there are more.
NAMES = ("toon", "auto", "none", "dreambooth", "hyperdreambooth")  # Of what commands know; a folder that is called so isn't meant.
PATHS = (
    "base",
    "hypernetwork",
    "folder",
    "photos",
    "output",
    "validation_folder",
    "encoder",
    "people",
    "atlas",
    "faithful",
    "prompts",
    "settings",
)
"""Settings of commands that may be paths."""
Work = Callable[[list[str]], Any]
"""Does a piece of work, some names, and gives what JSON takes. A piece that was done before, in part or whole, may come again."""


@dataclass(kw_only=True)
class WithEngine(WithBase):
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: Ray Data, with the extra `ray`: a worker on each card of a cluster, or two workers on this machine."""
    address: str | None = None  # ray: a running cluster, such as auto or ray://head:10001. Every machine must see all folders.

    def check_engine(self) -> None:
        """Before any work is done: raises InputError for an address without its engine."""
        if self.address and self.engine != "ray":
            raise InputError("--address is a Ray cluster's: give --engine ray too.")


Args = TypeVar("Args", bound=WithEngine)


def each(args: Args, pieces: Sequence[list[str]], here: Work, there: Callable[[Args], Work], what: str) -> Iterator[Any]:
    """What comes of each piece: in their order, or by Ray in any. `here` does them in this process, `there(args)` is opened by a worker."""
    results = on_ray(args, pieces, there) if args.engine == "ray" and pieces else map(here, pieces)
    with Progress(what, len(pieces)) as progress:
        for number, result in enumerate(results, 1):
            yield result
            progress.update(number)


def sharing(args: Args, there: Callable[[Args], Work], what: str) -> Callable[[Sequence[list[str]]], object] | None:
    """Has Ray's workers do pieces of work that leave files; None where this process is to do all of it."""
    if args.engine != "ray":
        return None
    return lambda pieces: deque(each(args, pieces, list, there, what), 0)


class Worker:
    """A worker of Ray: opens what it needs once, then does one piece after another. What a user got wrong comes back in words."""

    work: Work | None = None

    def __init__(self, opened: Callable[[Args], Work], args: Args):
        self.opened, self.args = opened, args

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        try:
            self.work = self.work or self.opened(self.args)
            return {"result": json.dumps(self.work(json.loads(item["piece"]))), "problem": ""}
        except InputError as error:
            return {"result": "", "problem": str(error)}


def on_ray(args: Args, pieces: Sequence[list[str]], opened: Callable[[Args], Work]) -> Iterator[Any]:
    """What comes of each piece, done with Ray Data by a worker on each GPU of the cluster, or on each CPU core.

    Without `args.address` or RAY_ADDRESS a Ray with two workers is started on this machine and ends with the work. A worker that vanishes
    is replaced and its pieces are done again. Raises InputError where a worker does, and where Ray isn't installed or can't be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError('the engine ray needs Ray: pip install "hyperdreambooth[ray]", or use --engine local.') from error
    where, count = args.address or os.environ.get("RAY_ADDRESS") or "local", len(pieces)
    # two workers of its own, and little shared memory, since items are but names
    own: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 1 << 28} if where == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"there is no Ray at {where} ({str(error).splitlines()[0]}). Check --address, or leave it out.") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        cards, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        # two blocks a worker in flight: the next one waits beside the one in work
        pool = ray.data.ActorPoolStrategy(size=min(count, cards or cores), max_tasks_in_flight_per_actor=2)
        items = ray.data.from_items([{"piece": json.dumps(piece)} for piece in pieces], override_num_blocks=min(count, MOST_BLOCKS))
        done = items.map(Worker, fn_constructor_args=(opened, located(args)), compute=pool, num_cpus=1, num_gpus=1 if cards else 0)
        for row in done.iter_rows():
            if row["problem"]:
                raise InputError(row["problem"])
            yield json.loads(row["result"])
    finally:
        ray.shutdown()


def located(args: Args) -> Args:
    """The same command with whole paths, since a worker runs in another folder."""
    from ..checkpoint import ADDRESS

    def whole(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(whole, value))
        here = isinstance(value, Path) and not ADDRESS.fullmatch(str(value))
        is_path = here or (isinstance(value, str) and value not in NAMES and Path(value).exists())
        return type(value)(Path(value).resolve()) if is_path else value

    paths = {name: whole(value) for name, value in vars(args).items() if name in PATHS}
    return dataclasses.replace(args, machine=dataclasses.replace(args.machine, parts=whole(args.machine.parts)), **paths)
