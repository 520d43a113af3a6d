"""Commands that are killed and run again end with bit-identical results to uninterrupted commands.

Every command runs in a separate process and is killed with SIGKILL, as by the kernel when memory runs out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import picture

if os.name == "nt":
    pytest.skip("there is no SIGKILL, and processes can't be forked", allow_module_level=True)
ROOT = Path(__file__).parents[1]


def command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """What the other process does."""
    from hyperdreambooth.cli import main

    sys.stderr = log.open("w", encoding="utf-8")
    torch.set_num_threads(1)
    os.environ.update(environment)
    raise SystemExit(main(arguments))


@pytest.fixture(scope="module")
def server():
    """Forks processes that have torch and diffusers imported already: a test would else spend most of its time on that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume", *(f"hyperdreambooth.commands.{file}" for file in ("make", "train"))])
    with pytest.MonkeyPatch.context() as patch:  # the fork server finds modules only through PYTHONPATH
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


class Terminal:
    """Runs commands on the tiny world."""

    def __init__(self, context, world: Path, log: Path):
        self.context, self.environment, self.log = context, {"HYPERDREAMBOOTH_TOON": str(world)}, log

    def start(self, arguments):
        self.log.write_text("")
        process = self.context.Process(target=command, args=([str(argument) for argument in arguments], self.environment, self.log))
        process.start()
        return process

    def run(self, *arguments: object) -> None:
        process = self.start(arguments)
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def kill(self, when: Callable[[], bool], *arguments: object, number: int = signal.SIGKILL) -> None:
        """Kills the command as soon as `when`."""
        process = self.start(arguments)
        while not when() and process.is_alive():
            time.sleep(0.002)
        assert process.is_alive(), f"the command ended before the signal arrived: {self.log.read_text()}"
        os.kill(process.pid, number)
        process.join()


@pytest.fixture
def terminal(server, world, tmp_path) -> Terminal:
    return Terminal(server, world, tmp_path / "stderr.txt")


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(6):
        picture(index).save(folder / f"{index}.png")
    return folder


def assert_same(file: Path, other: Path) -> None:
    expected, found = load_file(file), load_file(other)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


SMALL = ("--lightweight.down-dim", 12, "--lightweight.up-dim", 8, "--training.checkpoint-minutes", 0)


def test_a_hypernetwork_goes_on_from_its_cache_and_its_checkpoint(terminal, faces, tmp_path):
    more = (*SMALL, "--batch", 4, "--training.steps", 6)
    whole, killed = (("train-hypernetwork", faces, "-o", tmp_path / name, *more) for name in ("whole", "killed"))
    terminal.run(*whole)
    terminal.kill((tmp_path / "killed/run/state.safetensors").exists, *killed)
    assert not (tmp_path / "killed/model.safetensors").exists()
    terminal.run(*killed)
    for name in ("run/state.safetensors", "model.safetensors"):
        assert_same(tmp_path / "whole" / name, tmp_path / "killed" / name)


def test_tokens_of_one_person_go_on_from_their_checkpoint(terminal, faces, tmp_path):
    more = (*SMALL, "--training.steps", 30)
    whole, killed = (("train-light", faces / "0.png", "-o", tmp_path / name, *more) for name in ("whole", "killed"))
    terminal.run(*whole)
    terminal.kill((tmp_path / "killed/state.safetensors").exists, *killed)
    assert not (tmp_path / "killed/lora.safetensors").exists()
    terminal.run(*killed)
    assert_same(tmp_path / "whole/lora.safetensors", tmp_path / "killed/lora.safetensors")


@pytest.mark.parametrize("when", ["chunk/*/state.safetensors", "rows/1.safetensors"])
def test_a_table_goes_on_within_a_chunk(terminal, faces, tmp_path, when):
    more = (*SMALL, "--chunk", 4, "--training.steps", 10)
    whole, killed = (("preoptimize", faces, "-o", tmp_path / name, *more) for name in ("whole", "killed"))
    terminal.run(*whole)
    terminal.kill(lambda: any((tmp_path / "killed").glob(when)), *killed)
    assert not (tmp_path / "killed/rows/5.safetensors").exists()
    (tmp_path / "killed/rows").mkdir(exist_ok=True)
    (tmp_path / "killed/rows/.2.abcd1234.safetensors").touch()  # a temporary file, as left by a kill during writing
    terminal.run(*killed)
    for index in range(6):
        assert_same(tmp_path / f"whole/rows/{index}.safetensors", tmp_path / f"killed/rows/{index}.safetensors")


def test_two_processes_at_once_make_one_table(terminal, faces, tmp_path):
    """Both begin with the same chunks, write the same checkpoints and rows, and take the checkpoints away."""
    more = (*SMALL, "--chunk", 1, "--training.steps", 8)
    terminal.run("preoptimize", faces, "-o", tmp_path / "alone", *more)
    both = [terminal.start(["preoptimize", faces, "-o", tmp_path / "both", *more]) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    for index in range(6):
        rows = [tmp_path / name / f"rows/{index}.safetensors" for name in ("alone", "both")]
        assert rows[0].read_bytes() == rows[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fine_tuning_goes_on_or_starts_anew(terminal, face, tmp_path, number):
    whole, killed = (("personalize", face, "-o", tmp_path / f"{name}.safetensors", "--steps", 40) for name in ("whole", "killed"))
    terminal.run(*whole)
    terminal.kill(lambda: "fine-tuning" in terminal.log.read_text(), *killed, number=number)
    assert not (tmp_path / "killed.safetensors").exists()
    terminal.run(*killed)
    assert_same(tmp_path / "whole.safetensors", tmp_path / "killed.safetensors")
