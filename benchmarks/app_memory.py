"""Memory of the web page's process over many jobs: ten concurrent visitors, each a client of `gradio_client`.

    python benchmarks/app_memory.py --jobs 200 --write

The page runs in a separate process. Every job takes an example face, fine-tunes for one step, generates a picture and makes the files for
download; every fifth job ends the visitor's session, as closing the browser tab does. The page's resident memory is read at the start, after a
first round (when everything that is loaded lazily is in memory), halfway, and at the end. --write puts the table into docs/app.md.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from gradio_client import Client

DRAW = {"seed": 0, "count": 1, "strength": 1, "guidance": 2, "identity": 2, "steps": 1, "scheduler": "", "styles": [], "style_weight": 0.7}


def jobs(url: str, visitor: int, count: int) -> int:
    """Runs `count` jobs of one visitor, and returns how many succeeded."""
    done = 0
    for index in range(count):
        if index % 5 == 0:
            client = Client(url, verbose=False, download_files=False, analytics_enabled=False)
        client.predict((visitor + index) % 24 + 1, api_name="/example")
        status, pictures = client.predict(1, False, api_name="/personalize")
        _, drawn = client.predict("a [V] face", **DRAW, api_name="/draw")
        files = client.predict(api_name="/take")
        done += "Done: 1 steps" in status and len(pictures) == 2 and len(drawn) == 1 and len(files) == 4
        if index % 5 == 4 or index == count - 1:
            client.close()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="put the table into docs/app.md")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = subprocess.Popen([sys.executable, "-m", "hyperdreambooth", "app", "--port", str(port)])
    url = f"http://127.0.0.1:{port}/"
    try:
        while True:
            try:
                Client(url, verbose=False, analytics_enabled=False).close()
                break
            except httpx.ConnectError:
                time.sleep(1)
        rows = []
        started, total, succeeded = time.monotonic(), 0, 0
        with ThreadPoolExecutor(args.visitors) as pool:
            for until in (0, args.visitors, args.jobs // 2, args.jobs):
                count = (until - total) // args.visitors
                succeeded += sum(pool.map(lambda visitor, count=count: jobs(url, visitor, count), range(args.visitors)))
                total += count * args.visitors
                rows.append((total, succeeded, psutil.Process(page.pid).memory_info().rss / 1e6))
                print(f"{succeeded} of {total} jobs, {rows[-1][2]:.0f} MB, {time.monotonic() - started:.0f} s", flush=True)
    finally:
        page.terminate()
        page.wait()
    table = "| jobs | of them succeeded | the page's resident memory |\n|---|---|---|\n" + "".join(
        f"| {done} | {well} | {megabytes:.0f} MB |\n" for done, well, megabytes in rows
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
