"""Where a command's pieces of work are done: in this process, one after another, or by Ray Data, with a worker on each GPU of a cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InputError
from ..progress import Progress
from .options import WithBase

MAX_BLOCKS = 4096  # Of Ray Data; where there are more pieces, several share a block.
# Values with a meaning of their own: a folder of that name isn't meant.
NAMES = ("toon", "auto", "none", "dreambooth", "hyperdreambooth", "dlib")
STRING_PATHS = ("base", "hypernetwork", "encoder", "prompts", "judges")
"""Settings that are strings and may be paths; a setting of type Path always is one."""
Work = Callable[[list[str]], Any]
"""Does one piece of work, which is a list of strings, and returns a JSON value. A piece that was begun or done may come again."""


@dataclass(kw_only=True)
class WithEngine(WithBase):
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: Ray Data (the extra `ray`), with a worker on each GPU of a cluster, or with two workers on this machine."""
    address: str | None = None  # ray: a running cluster, such as auto or ray://head:10001. All its machines must see the same folders.

    def check_engine(self) -> None:
        """Before any work is done: raises InputError for an address without the engine that it belongs to."""
        if self.address and self.engine != "ray":
            raise InputError("--address is a Ray cluster's: give --engine ray too.")


Args = TypeVar("Args", bound=WithEngine)


def each(args: Args, pieces: Sequence[list[str]], work: Work, open_work: Callable[[Args], Work], label: str) -> Iterator[Any]:
    """Yields each piece's result: in the order of `pieces`, or with Ray in any order. `work` does them in this process; each of Ray's
    workers calls `open_work` once, for the function that does them there. `label` names the progress bar."""
    results = on_ray(args, pieces, open_work) if args.engine == "ray" and pieces else map(work, pieces)
    with Progress(label, len(pieces)) as progress:
        for number, result in enumerate(results, 1):
            yield result
            progress.update(number)


def sharing(args: Args, open_work: Callable[[Args], Work], label: str) -> Callable[[Sequence[list[str]]], object] | None:
    """A function that has Ray's workers do pieces of work whose results are files; None with the engine local."""
    if args.engine != "ray":
        return None
    return lambda pieces: deque(each(args, pieces, list, open_work, label), 0)


class Worker:
    """A worker of Ray: calls `open_work` once, then does one piece after another. An InputError is returned as its message."""

    work: Work | None = None

    def __init__(self, open_work: Callable[[Args], Work], args: Args):
        self.open_work, self.args = open_work, args

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        try:
            self.work = self.work or self.open_work(self.args)
            return {"result": json.dumps(self.work(json.loads(item["piece"]))), "problem": ""}
        except InputError as error:
            return {"result": "", "problem": str(error)}


def on_ray(args: Args, pieces: Sequence[list[str]], open_work: Callable[[Args], Work]) -> Iterator[Any]:
    """Yields each piece's result, in any order, from Ray Data's workers: one on each GPU of the cluster, or without GPUs on each CPU core.

    Without `args.address` or RAY_ADDRESS a Ray with two workers is started on this machine and ends with the work. A worker that dies
    is replaced and its pieces are done again. Raises InputError where a worker does, and where Ray isn't installed or can't be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError('the engine ray needs Ray: pip install "hyperdreambooth[ray]", or use --engine local.') from error
    where, count = args.address or os.environ.get("RAY_ADDRESS") or "local", len(pieces)
    # two CPUs, thus two workers; 256 MB of shared memory, since the items are short strings
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
        # two blocks in flight for each worker: the next one waits while the first is worked on
        pool = ray.data.ActorPoolStrategy(size=min(count, cards or cores), max_tasks_in_flight_per_actor=2)
        items = ray.data.from_items([{"piece": json.dumps(piece)} for piece in pieces], override_num_blocks=min(count, MAX_BLOCKS))
        done = items.map(Worker, fn_constructor_args=(open_work, absolute(args)), compute=pool, num_cpus=1, num_gpus=1 if cards else 0)
        for row in done.iter_rows():
            if row["problem"]:
                raise InputError(row["problem"])
            yield json.loads(row["result"])
    finally:
        ray.shutdown()


def absolute(args: Args) -> Args:
    """The same command with absolute paths, since a worker runs in another folder."""
    from ..checkpoint import ADDRESS

    def resolved(value: Any, may_be_path: bool = True) -> Any:
        if isinstance(value, tuple):
            return tuple(resolved(one, may_be_path) for one in value)
        if isinstance(value, Path):
            return value if ADDRESS.fullmatch(str(value)) else value.resolve()
        if not (may_be_path and isinstance(value, str)):
            return value
        kind = "".join(re.findall("^(?:clip|dino):", value))  # of a judge
        path = value.removeprefix(kind)
        return f"{kind}{Path(path).resolve()}" if path not in NAMES and Path(path).exists() else value

    settings = {one.name: resolved(getattr(args, one.name), one.name in STRING_PATHS) for one in dataclasses.fields(args)}
    return dataclasses.replace(args, **{**settings, "machine": dataclasses.replace(args.machine, parts=resolved(args.machine.parts))})
