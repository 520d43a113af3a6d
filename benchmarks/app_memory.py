"""Memory of the page over many jobs: ten visitors at once, each through Gradio's own client.

    python benchmarks/app_memory.py --jobs 200 --write

Every job takes an example face, fine-tunes it for a step, draws a picture and makes the files to take home. Resident memory is read
after a first round, when everything that is loaded lazily is there, and at the end. --write puts the table into docs/app.md.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from gradio_client import Client

from hyperdreambooth import HyperDreamBooth, app

DRAW = {"seed": 0, "count": 1, "strength": 1, "guidance": 2, "identity": 2, "steps": 1, "scheduler": "", "styles": [], "style_weight": 0.7}


def resident() -> float:
    """Megabytes."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def jobs(server: app.Server, visitor: int, count: int) -> int:
    """One visitor's jobs, a new visit every five; how many succeeded."""
    done = 0
    for index in range(count):
        if index % 5 == 0:
            client = Client(server.url, verbose=False, download_files=False, analytics_enabled=False)
        client.predict((visitor + index) % 24 + 1, api_name="/example")
        status, pictures = client.predict(1, False, api_name="/personalize")
        _, drawn = client.predict("a [V] face", **DRAW, api_name="/draw")
        files = client.predict(api_name="/take")
        done += "Done: 1 steps" in status and len(pictures) == 2 and len(drawn) == 1 and len(files) == 4
        if index % 5 == 4 or index == count - 1:
            server.visits.end(client.session_hash)  # what a browser's closed tab does
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="put the table into docs/app.md")
    args = parser.parse_args()
    server = app.start(HyperDreamBooth.from_pretrained("toon", device="cpu"))
    try:
        first = args.visitors
        rows = [("at the start", 0, resident())]
        started, total = time.monotonic(), 0
        with ThreadPoolExecutor(args.visitors) as pool:
            for until in (first, args.jobs // 2, args.jobs):
                count = (until - total) // args.visitors
                total += sum(pool.map(lambda visitor, count=count: jobs(server, visitor, count), range(args.visitors)))
                rows.append((f"after {until} jobs", total, resident()))
                print(f"{rows[-1][0]}: {total} succeeded, {rows[-1][2]:.0f} MB, {time.monotonic() - started:.0f} s", flush=True)
        left = [file for file in server.visits.root.rglob("*") if file.is_file()]
        print(f"{len(left)} files left")
    finally:
        server.close()
    table = "| when | jobs that succeeded | resident memory |\n|---|---|---|\n" + "".join(
        f"| {when} | {done} | {megabytes:.0f} MB |\n" for when, done, megabytes in rows
    )
    print(table)
    if args.write:
        file = Path(__file__).parents[1] / "docs" / "app.md"
        text = re.sub(
            r"(<!-- memory -->\n).*?(<!-- /memory -->)", lambda found: found[1] + table + found[2], file.read_text("utf-8"), flags=re.S
        )
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
