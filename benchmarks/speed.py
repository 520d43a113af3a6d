"""Speed and memory on a CPU, each row beside a named peer in the same run. Machines are noisy, so compare the ratios.

    python benchmarks/speed.py -o benchmarks/results/speed.json

There are two bases: `toon`, and `mid`, which is Stable Diffusion 1.5 at half its width with random weights, for pictures of 128 x 128 pixels. The library
and its peer run in turns; a ratio is the median over turns, and `spread` its quartiles. The floor is a lower bound on a step's time: its floating-point
operations (counted in PEFT's step) divided by the machine's rate in a large matrix product. On a machine with a GPU, run benchmarks/gpu.py instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peers import base, drawing, peft_steps, prediction, steps, timed
from torch.utils.flop_counter import FlopCounterMode

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.assets import toon
from hyperdreambooth.backbones import Backbone
from hyperdreambooth.checkpoint import read_json, write_json

SIDES = {"toon": (128, 256, 384), "mid": (64, 128, 256)}  # Sides of the pictures in `growth`, in pixels.
ATTENTION = ("unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0")
STARTS = {  # command lines that load no model
    "--help": ["--help"],
    "personalize --help": ["personalize", "--help"],
    "info FILE": ["info", "FILE"],
}


def opened(name: str) -> Backbone:
    return (
        HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device="cpu").backbone
        if name == "toon"
        else base(name, "cpu", torch.float32)
    )


def quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [round(low, 3), round(high, 3)]


def matrix_rate() -> float:
    """Floating-point operations per second in a product of two 2,048 x 2,048 matrices, the best of eight runs."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(8))


def fine_tuning(backbone: Backbone, copies: int, rate: float, turns: int) -> dict[str, Any]:
    """Time of a fine-tuning step of this library and of PEFT, in turns of a few steps each."""
    ours, peer = list[float](), list[float]()
    for _ in range(turns):
        ours.append(statistics.median(steps(backbone, copies, 6, first=1)[1]))
        peer.append(statistics.median(peft_steps(backbone, copies, 5, first=1)[0]))
    with FlopCounterMode(display=False) as counter:
        peft_steps(backbone, copies, 1, first=0)
    floor = 1000 * counter.get_total_flops() / rate
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    found = {"ours_ms": statistics.median(ours), "peft_ms": statistics.median(peer), "floor_ms": floor}
    about = {"copies": copies, "ours_over_peft": round(statistics.median(ratios), 3), "spread": quartiles(ratios)}
    return about | {name: round(value, 1) for name, value in found.items()} | {"ours_over_floor": round(found["ours_ms"] / floor, 2)}


def growth(backbone: Backbone, sides: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by number of copies, people in a batch, trained layers, and picture side: the minimum of four steps."""
    least = lambda *args, **more: round(min(steps(backbone, *args, 5, first=1, **more)[1]), 1)  # noqa: E731
    return {
        "copies": {str(count): least(count) for count in (1, 2, 4, 8)},
        "people": {str(count): least(1, people=count) for count in (1, 2, 4, 8)},
        "layers": {"attention": least(4, patterns=ATTENTION), "attention and feed-forward": least(4)},
        "side": {str(pixels): least(1, side=pixels // 8) for pixels in sides},
    }


CHILD = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import speed
print(json.dumps(speed.peak(*sys.argv[2:])))
"""


def peak(who: str, name: str, copies: str) -> dict[str, float]:
    """Peak memory of this process in MB after loading, and after a few steps of `who` ("ours" or "peft"). Call it in a new process."""
    backbone = opened(name)

    def most() -> float:  # getrusage would include the parent's memory at the fork
        status = Path("/proc/self/status")
        if status.is_file():
            return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    loaded = most()
    steps(backbone, int(copies), 3) if who == "ours" else peft_steps(backbone, int(copies), 3)
    return {"loaded": loaded, "peak": most()}


def memory(name: str, copies: int) -> dict[str, float]:
    found = {}
    for who in ("ours", "peft"):
        arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), who, name, str(copies)]
        found[who] = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    ours, peer = found["ours"], found["peft"]
    sizes = {"ours_mb": ours["peak"], "peft_mb": peer["peak"], "loaded_mb": peer["loaded"]}
    return {
        "copies": copies,
        **{key: round(value) for key, value in sizes.items()},
        "ours_over_peft": round(ours["peak"] / peer["peak"], 3),
    }


def processor_seconds(arguments: list[str]) -> float:
    """CPU seconds of a command and its child processes. Wall-clock time would also include the machine's other work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starting(file: Path, turns: int = 5) -> dict[str, Any]:
    """CPU seconds of commands that load no model, beside importing diffusers' pipeline."""
    works = {"diffusers": [sys.executable, "-c", "from diffusers import StableDiffusionPipeline"]}
    for name, words in STARTS.items():
        works[name] = [sys.executable, "-m", "hyperdreambooth", *(str(file) if word == "FILE" else word for word in words)]
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, arguments in works.items():
            taken[name].append(processor_seconds(arguments))
    peer = statistics.median(taken["diffusers"])
    return {
        name: {"s": round(statistics.median(some), 2), "over_diffusers": round(statistics.median(some) / peer, 3)}
        for name, some in taken.items()
    }


def command(folder: Path) -> dict[str, float]:
    """Seconds of `personalize` on toon: after loading, in this process; and as a whole command, beside a command that only loads the base."""
    hdb, face = HyperDreamBooth.from_pretrained("toon", device="cpu"), toon.directory("faces") / "face-01.png"
    first, second = (timed(lambda: hdb.personalize(face, quiet=True)) for _ in range(2))
    program = [sys.executable, "-m", "hyperdreambooth"]

    def run(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([*program, *words], capture_output=True, check=True)

    load = timed(run("targets", "toon", "--json"))
    whole = timed(run("personalize", str(face), "-o", str(folder / "whole.safetensors")))
    seconds = {"after_loading_first_s": first, "after_loading_second_s": second, "load_s": load, "whole_s": whole}
    return {name: round(value, 2) for name, value in seconds.items()}


def jobs(title: str, folder: Path, rate: float) -> dict[str, Callable[[], Any]]:
    """The measurements of a base, in order. toon is small, so it is measured in more turns, and whole commands are measured on it."""
    backbone, small = opened(title), title == "toon"
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu") if small else HyperDreamBooth(backbone, title)
    turns = 9 if small else 3
    found: dict[str, Callable[[], Any]] = {
        "steps": lambda: [fine_tuning(backbone, copies, rate, turns) for copies in (1, 4)],
        "drawing": lambda: drawing(hdb, folder, steps=10, rounds=turns),
        "memory": lambda: [memory(title, copies) for copies in (1, 4)],
        "growth": lambda: growth(backbone, SIDES[title]),
    }
    if small:
        found |= {"prediction": lambda: prediction(hdb), "personalize": lambda: command(folder)}
        found["start"] = lambda: starting(folder / "me.safetensors")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--bases", nargs="+", default=["toon", "mid"], choices=["toon", "mid"], help="bases to measure; others stay")
    args = parser.parse_args()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    rate, results = matrix_rate(), read_json(args.output) if args.output.is_file() else {}
    results |= {"command": "python benchmarks/speed.py", "torch": torch.__version__, "threads": torch.get_num_threads()}
    results |= {"processor": platform.processor() or platform.machine(), "matrix_gflops": round(rate / 1e9, 1)}
    with tempfile.TemporaryDirectory() as folder:
        for title in args.bases:
            for job, work in jobs(title, Path(folder), rate).items():
                started = time.perf_counter()
                results.setdefault(title, {})[job] = work()
                print(f"{title}, {job}: {time.perf_counter() - started:.0f} s, {json.dumps(results[title][job])}", flush=True)
                write_json(args.output, results)
    print(args.output)


if __name__ == "__main__":
    main()
