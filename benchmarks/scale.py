"""Measures scaling: tables made by one process, by shards, and by Ray while workers are killed; and encoding pictures singly or in batches.

    python benchmarks/scale.py encoding
    python benchmarks/scale.py engine --people 1000
    python benchmarks/scale.py engine --people 10000 --ways plain again ray-killed
    python benchmarks/scale.py engine --people 100000 --ways hundredth

The base is `toon`, and the people are rendered toon faces (needs Node.js). Each process that makes a table computes with one thread. Every
table is compared, byte for byte, with the first one. Results are added to benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scale.json"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
WAYS = {  # the additional arguments of each way's commands, which run at the same time
    "plain": [[]],
    "again": [[]],  # a rerun when all rows exist: starting, listing people, and drawing the preview
    "shards": [["--shard", "0/2"], ["--shard", "1/2"]],
    "hundredth": [["--shard", "0/100"]],  # it lists all people but makes only its shard's rows
    "ray": [["--engine", "ray"]],
    "ray-killed": [["--engine", "ray"]],
}


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Writes `count` synthetic photos of 256 x 256 pixels."""
    folder.mkdir(parents=True)
    files = [folder / f"{index}.jpg" for index in range(count)]
    for index, file in enumerate(files):
        values = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).resize((256, 256), Image.Resampling.BICUBIC).save(file, quality=92)
    return files


def make_people(folder: Path, count: int) -> None:
    """Writes one picture for each of `count` people of the toon world; beyond 10,000 the same pictures are linked under other names."""
    sys.path.insert(0, str(ROOT))
    from worlds.toon import pictures

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        pictures.render(Path(name) / "all", ["--people", str(min(count, 10_000)), "--contexts", "1"])
        for index, pixels in enumerate(pictures.Pictures.load(Path(name) / "all").pixels):
            Image.fromarray(pixels).save(folder / f"{index}.png")
    for index in range(10_000, count):
        os.link(folder / f"{index % 10_000}.png", folder / f"{index}.png")


def noted(log: str, words: list[str]) -> int:
    """Runs a command of the package; every process that starts to train a chunk, this one or a Ray worker, adds a line to `log`."""
    from hyperdreambooth.cli import main
    from hyperdreambooth.commands import train

    plain = train.opened

    def opened(*args: Any) -> Any:
        rows = plain(*args)
        begin = rows._train

        def training(photos: Any, state: Path) -> Any:
            with open(log, "a") as file:
                file.write(f"{state.name}\n")
            return begin(photos, state)

        rows._train = training
        return rows

    train.opened = opened
    return main(words)


class Watch:
    """CPU seconds and memory of processes and their children, polled every second; CPU time after a process's last poll is missed."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]):
        self.roots = [psutil.Process(process.pid) for process in processes]
        self.seconds: dict[tuple[int, float], float] = {}
        self.largest: dict[str, int] = {}

    def look(self) -> list[psutil.Process]:
        """Polls all processes, and returns Ray's workers."""
        workers = []
        for root in self.roots:
            try:
                everyone = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in everyone:
                try:
                    used, kind = process.cpu_times(), "worker" if "MapWorker" in "".join(process.cmdline()) else "other"
                    kind = "command" if process == root else kind
                    self.seconds[process.pid, process.create_time()] = used.user + used.system
                    self.largest[kind] = max(self.largest.get(kind, 0), process.memory_info().rss)
                    workers += [process] if kind == "worker" else []
                except psutil.Error:
                    continue
        return workers


def made(way: str, folder: Path, table: Path, more: list[str], every: float) -> dict[str, Any]:
    """Makes a table and measures its cost. For `ray-killed`, a random worker is killed every `every` seconds."""
    rng, log, begun = random.Random(0), table.with_suffix(".log"), time.monotonic()
    log.write_text("")
    start = [sys.executable, __file__, "noted", str(log), "preoptimize", str(folder), "-o", str(table), *more]
    with table.with_suffix(".said").open("wb") as said:
        running = [subprocess.Popen([*start, *own], env=ENVIRONMENT, stdout=said, stderr=said) for own in WAYS[way]]
        watch, killed = Watch(running), 0
        while any(process.poll() is None for process in running):
            workers = watch.look()
            if way == "ray-killed" and workers and time.monotonic() - begun > (killed + 1) * every:
                rng.choice(workers).kill()
                killed += 1
            time.sleep(1)
    assert not any(process.returncode for process in running), table.with_suffix(".said").read_text()
    chunks = log.read_text().split()
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(sum(watch.seconds.values()), 1),
        "largest_mb": {kind: size // 1_000_000 for kind, size in watch.largest.items()},
        "killed": killed,
        "chunks": len(set(chunks)),
        "trained_again": len(chunks) - len(set(chunks)),
        "rows": len(digests(table)),
        "load": round(os.getloadavg()[0], 1),
    }


def digests(table: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (table / "rows").glob("[!.]*")}


def store(what: str, key: str, found: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known.setdefault(what, {})[key] = found
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


def engine(args: argparse.Namespace) -> None:
    more = ["--training.steps", str(args.steps), "--chunk", str(args.chunk), "--copies", "1"]
    found: dict[str, Any] = {"steps": args.steps, "chunk": args.chunk, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder, first = Path(name), args.ways[0]
        make_people(folder / "people", args.people)
        for way in args.ways:
            found[way] = made(way, folder / "people", folder / ("plain" if way == "again" else way), more, args.every)
            chunks = -(-args.people // args.chunk)
            most = -(-chunks // 100) * args.chunk if way == "hundredth" else args.people
            assert most - args.chunk < found[way]["rows"] <= most
            found[way]["same_bytes"] = way == "again" or digests(folder / way) == digests(folder / first)
            print(way, json.dumps(found[way]), flush=True)
            store("engine", str(args.people), found)


def encoding(args: argparse.Namespace) -> None:
    """Wall-clock and CPU milliseconds per picture, encoded one at a time and by `load_identities`: medians over alternating turns."""
    import torch

    from hyperdreambooth import photos
    from hyperdreambooth.api import HyperDreamBooth
    from hyperdreambooth.assets import toon
    from hyperdreambooth.data import load_identities
    from hyperdreambooth.encoder import FaceEncoder

    backbone = HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device="cpu").backbone
    encoder = FaceEncoder.from_pretrained(toon.directory("hypernetwork") / "encoder").eval()

    def single(files: list[Path]) -> None:
        with torch.no_grad():
            for file in files:
                pixels = photos.to_tensor([photos.prepare(file, backbone.size, "auto")[0]])
                backbone.encode_images(pixels)
                encoder(pixels)

    def timed(work: Callable[[], Any], count: int) -> tuple[float, float]:
        clock, processor = time.monotonic(), time.process_time()
        work()
        return 1000 * (time.monotonic() - clock) / count, 1000 * (time.process_time() - processor) / count

    about = {"pictures": args.pictures, "turns": args.turns, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as name:
        files = make_pictures(Path(name) / "pictures", args.pictures)
        few = files[: max(1, args.pictures // 4)]
        for threads in args.threads:
            torch.set_num_threads(threads)
            ways = {
                "one_by_one": lambda: timed(lambda: single(few), len(few)),
                "batches": lambda: timed(lambda: load_identities(files[0].parent, backbone, encoder, "a face"), len(files)),
            }
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(args.turns + 1):  # the first turn is a warm-up
                for way, work in ways.items():
                    times[way].append(work())
            middle = {way: [statistics.median(values) for values in zip(*each[1:], strict=True)] for way, each in times.items()}
            figures = {"clock_ms": 0, "processor_ms": 1}
            found = {way: {kind: round(middle[way][place], 2) for kind, place in figures.items()} for way in ways}
            store("encoding", f"{threads} thread{'s' * (threads > 1)}", {**about, **found})


def main() -> None:
    if sys.argv[1:2] == ["noted"]:
        sys.exit(noted(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engine", "encoding"))
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[way for way in WAYS if way != "hundredth"])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--pictures", type=int, default=320)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    {"engine": engine, "encoding": encoding}[args.what](args)


if __name__ == "__main__":
    main()
