"""Scaling, measured: pre-optimization by one and several processes, with workers killed at random, and pictures encoded one by one and in batches.

    python benchmarks/scale.py --people 64 --processes 1 2 --kills 6 -o benchmarks/results/scale.json

The base is `toon`; every process computes with one thread. Each table is compared, byte for byte, with that of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def make_people(folder: Path, count: int, size: int) -> None:
    """One made picture each."""
    folder.mkdir(parents=True)
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=92)


def start(folder: Path, table: Path, shard: str, more: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hyperdreambooth", "preoptimize", str(folder), "-o", str(table), "--shard", shard, *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (table / "rows").glob("[!.]*")}


def shards(folder: Path, table: Path, processes: int, kills: int, more: list[str], seed: int = 0) -> dict[str, float]:
    """Seconds until all shards are done; `kills` times a random one of them is killed at a random moment, and started again."""
    rng, begun = random.Random(seed), time.monotonic()
    running = {f"{index}/{processes}": start(folder, table, f"{index}/{processes}", more) for index in range(processes)}
    killed, due = 0, rng.uniform(8, 25)
    while running:
        time.sleep(0.2)
        for shard, process in list(running.items()):
            if process.poll() is None:
                continue
            assert process.returncode == 0, f"shard {shard} ended with {process.returncode}"
            del running[shard]
        if killed < kills and running and time.monotonic() - begun > due:
            shard = rng.choice(sorted(running))
            running[shard].send_signal(signal.SIGKILL)
            running[shard].wait()
            running[shard] = start(folder, table, shard, more)
            killed, due = killed + 1, time.monotonic() - begun + rng.uniform(8, 25)
    return {"processes": processes, "seconds": round(time.monotonic() - begun, 1), "killed": killed, "rows": len(rows(table))}


def encoding(folder: Path) -> dict[str, float]:
    """Pictures a second of processor time and of the clock: one at a time, as it was, and as `load_identities` does."""
    from hyperdreambooth import photos
    from hyperdreambooth.api import HyperDreamBooth
    from hyperdreambooth.assets import toon
    from hyperdreambooth.data import load_identities
    from hyperdreambooth.encoder import FaceEncoder

    backbone = HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device="cpu").backbone
    encoder = FaceEncoder.from_pretrained(toon.directory("hypernetwork") / "encoder").eval()
    files = sorted(folder.iterdir(), key=lambda file: int(file.stem))

    def single() -> None:
        with torch.no_grad():
            for file in files:
                pixels = photos.to_tensor([photos.prepare(file, backbone.size, "auto")[0]])
                backbone.encode_images(pixels)
                encoder(pixels)

    found: dict[str, float] = {"pictures": len(files), "threads": torch.get_num_threads()}
    for name, work in (("one_by_one", single), ("batches", lambda: load_identities(folder, backbone, encoder, "a face"))):
        clock, processor = time.monotonic(), time.process_time()
        work()
        found[f"{name}_seconds"] = round(time.monotonic() - clock, 1)
        found[f"{name}_processor_seconds"] = round(time.process_time() - processor, 1)
    return found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/scale.json")
    args = parser.parse_args()
    found: dict[str, object] = {"people": args.people, "steps": args.steps, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    more = ["--training.steps", str(args.steps), "--chunk", "8", "--training.checkpoint-minutes", "0.05"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.people:
            make_people(folder / "people", args.people, 128)
            found["shards"] = [shards(folder / "people", folder / f"t{count}", count, 0, more) for count in args.processes]
            if args.kills:
                found["preempted"] = shards(folder / "people", folder / "killed", max(args.processes), args.kills, more)
            tables = {path.name: rows(path) for path in folder.iterdir() if (path / "rows").is_dir()}
            found["tables_identical"] = all(table == next(iter(tables.values())) for table in tables.values())
        if args.pictures:
            make_people(folder / "pictures", args.pictures, 256)
            found["encoding"] = encoding(folder / "pictures")
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
