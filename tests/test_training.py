"""The training loop: resuming is exact, however the run ended; invalid losses stop it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hyperdreambooth import checkpoint
from hyperdreambooth.errors import InputError, TrainingError
from hyperdreambooth.optimizers import learning_rate
from hyperdreambooth.training import Run, fit
from hyperdreambooth.training_settings import TrainingConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
    return {"x": x, "noise": torch.randn(len(x), 1, generator=generator)}


def step(net, batch):
    return (net(batch["x"]) - batch["x"].sum(1, keepdim=True) + 0.1 * batch["noise"]).square().flatten()


CONFIG = TrainingConfig(steps=12, learning_rate=1e-2, warmup=2, average=0.9, log_every=3)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_training_learns_and_resuming_is_exact(tmp_path):
    whole = model()
    report = fit(step, whole, batches, CONFIG, Run(quiet=True, device="cpu"))
    assert report.finished
    assert report.losses[-1][1] < report.losses[0][1]

    parts = model()
    real, calls = batches, []

    def interrupted(index, generator):
        if index == 7 and not calls:
            calls.append(index)
            raise KeyboardInterrupt
        return real(index, generator)

    with pytest.raises(KeyboardInterrupt):
        fit(step, parts, interrupted, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))
    assert checkpoint.load(tmp_path / "state.safetensors")[3]["step"] == 7
    fresh = model()
    again = fit(step, fresh, interrupted, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))
    for a, b in zip(weights(whole), weights(fresh), strict=True):
        assert torch.equal(a, b)
    assert again.losses == report.losses or len(again.losses) == len(report.losses)
    # running a finished training again changes nothing
    done = model()
    fit(step, done, batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))
    for a, b in zip(weights(whole), weights(done), strict=True):
        assert torch.equal(a, b)


def test_a_callback_sees_every_step_and_stops_where_it_says_so(tmp_path):
    whole = model()
    fit(step, whole, batches, CONFIG, Run(quiet=True, device="cpu"))
    seen = []

    def on_step(done: int) -> bool:
        seen.append(done)
        return done == 5

    report = fit(step, model(), batches, CONFIG, Run(directory=tmp_path, on_step=on_step, quiet=True, device="cpu"))
    assert seen == [1, 2, 3, 4, 5]
    assert (report.steps, report.finished) == (5, False)
    resumed = model()
    assert fit(step, resumed, batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu")).finished
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at", "signals"), [(5, 1), (12, 1), (5, 2)])
def test_a_signal_between_an_update_and_its_count_is_exact(tmp_path, number, at, signals):
    """The first one waits for the count; a second one doesn't, so no checkpoint may be written then."""
    whole = model()
    fit(step, whole, batches, CONFIG, Run(quiet=True, device="cpu"))
    updates, often = [], dataclasses.replace(CONFIG, checkpoint_minutes=0.0)

    def kill(*args):
        updates.append(1)
        if len(updates) == at:
            for _ in range(signals):
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    hook = register_optimizer_step_post_hook(kill)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(step, model(), batches, often, Run(directory=tmp_path, quiet=True, device="cpu"))
    finally:
        hook.remove()
    assert signal.getsignal(number) is before
    assert checkpoint.load(tmp_path / "state.safetensors")[3]["step"] == at - (signals - 1)
    resumed = model()
    assert fit(step, resumed, batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu")).finished
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}]
from pathlib import Path
from tests.test_training import CONFIG, batches, model, step
from hyperdreambooth.training import Run, fit
import dataclasses
def slow(index, generator):
    time.sleep(0.02)
    print(index, flush=True)
    return batches(index, generator)
config = dataclasses.replace(CONFIG, steps=60, checkpoint_minutes=0.0)
fit(step, model(), slow, config, Run(directory=Path({folder!r}), quiet=True, device="cpu"))
"""


def test_resume_after_kill_is_bit_for_bit(tmp_path):
    root = str(Path(__file__).parents[1])
    code = SCRIPT.format(root=root, folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root + "/src"}
    )
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.load(tmp_path / "state.safetensors")[3]["step"] < 60
    config = dataclasses.replace(CONFIG, steps=60)
    resumed, whole = model(), model()
    fit(step, resumed, batches, config, Run(directory=tmp_path, quiet=True, device="cpu"))
    fit(step, whole, batches, config, Run(quiet=True, device="cpu"))
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(a, b)


def test_another_optimizer_does_not_go_on_with_a_state(tmp_path):
    fit(step, model(), batches, dataclasses.replace(CONFIG, optimizer="muon"), Run(directory=tmp_path, quiet=True, device="cpu"))
    with pytest.raises(InputError, match="trained with muon"):
        fit(step, model(), batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))


def test_accumulation_equals_a_larger_batch():
    big, small = model(), model()
    plain = TrainingConfig(steps=3, learning_rate=1e-2, max_grad_norm=0)

    def joined(index, generator):
        return {"x": torch.cat([batches(2 * index + part, generator)["x"] for part in range(2)])}

    fit(plain_step, big, joined, plain, Run(quiet=True, device="cpu"))
    fit(
        plain_step,
        small,
        batches,
        TrainingConfig(steps=3, learning_rate=1e-2, max_grad_norm=0, gradient_accumulation=2),
        Run(quiet=True, device="cpu"),
    )
    for a, b in zip(weights(big), weights(small), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


WORKER = """
import dataclasses
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import save_file
from tests.test_training import PAIRED, batches, model, plain_step
from hyperdreambooth.training import Run, fit, leave

ended = []
class Tracker(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None
    def finish(self):
        ended.append(self)

def gloo():
    return [task for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]

net = model()
fit(plain_step, net, batches, dataclasses.replace(PAIRED, tracker=Tracker()), Run(quiet=True, device="cpu"))
main = torch.distributed.get_rank() == 0  # the group outlives a tracker: a second training needs it
assert len(ended) == main
fit(plain_step, model(), batches, PAIRED, Run(quiet=True, device="cpu"))
if main:
    save_file(net.state_dict(), {file!r})
torch.distributed.barrier()
assert gloo() or sys.platform != "linux"  # elsewhere threads don't show
leave()
assert not gloo()
"""
PAIRED = TrainingConfig(steps=4, learning_rate=1e-2, max_grad_norm=0)


def plain_step(net, batch):
    return net(batch["x"]).square().flatten()


def in_two_processes(folder, script):
    (folder / "worker.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(folder / "worker.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes_equal_one_that_accumulates(tmp_path):
    from safetensors.torch import load_file

    root, file = str(Path(__file__).parents[1]), str(tmp_path / "weights.safetensors")
    in_two_processes(tmp_path, WORKER.format(root=root, file=file))
    alone = model()
    fit(plain_step, alone, batches, dataclasses.replace(PAIRED, gradient_accumulation=2), Run(quiet=True, device="cpu"))
    for name, value in load_file(file).items():
        torch.testing.assert_close(value, alone.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_raises_and_names_the_sample():
    def broken(net, batch):
        losses = net(batch["x"]).flatten()
        return torch.where(torch.arange(len(losses)) == 2, torch.nan, losses)

    with pytest.raises(TrainingError, match="sample 2 of step 0"):
        fit(broken, model(), batches, TrainingConfig(steps=2), Run(quiet=True, device="cpu"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(step, model(), batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))
    with pytest.raises(InputError, match="belongs to another"):
        fit(step, nn.Linear(4, 1), batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu"))


def test_a_checkpoint_of_other_data_is_refused_and_one_without_a_stamp_is_accepted(tmp_path):
    def trained(stamp: str, folder: str = "stamped"):
        return fit(step, model(), batches, CONFIG, Run(directory=tmp_path / folder, stamp=stamp, quiet=True, device="cpu"))

    trained("alice")
    assert trained("alice").finished
    with pytest.raises(InputError, match=r"state.safetensors holds the training of other photos or settings. Give another folder"):
        trained("bob")
    trained("", "older")
    assert trained("bob", "older").finished


def test_nothing_to_train_raises():
    with pytest.raises(InputError, match="nothing to train"):
        fit(step, model().requires_grad_(False), batches, CONFIG, Run(quiet=True, device="cpu"))


def test_time_limit_stops_and_a_later_call_goes_on(tmp_path):
    def slow(index, generator):
        time.sleep(0.02)
        return batches(index, generator)

    first = fit(step, model(), slow, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu", minutes=0.0005))
    assert not first.finished
    assert 0 < first.steps < 12
    assert fit(step, model(), batches, CONFIG, Run(directory=tmp_path, quiet=True, device="cpu")).finished


def test_validation_sees_the_averaged_weights_and_leaves_the_model_alone(tmp_path):
    seen = []

    def validate(done, net):
        seen.append(weights(net)[0])
        return {"figure": 1.0}

    net = model()
    config = TrainingConfig(steps=4, learning_rate=1e-1, average=0.99, validate_every=2)
    report = fit(step, net, batches, config, Run(validate=validate, quiet=True, device="cpu"))
    assert [v["step"] for v in report.validations] == [2, 4]
    assert torch.equal(seen[-1], weights(net)[0])


def test_a_tracker_that_takes_no_pictures_gets_the_figures():
    from accelerate.tracking import GeneralTracker

    logged = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None

        def log(self, values, step=None, **more):
            logged.append(values)

    def validate(done, net):
        return {"figure": 1.0, "preview": Image.new("RGB", (8, 8))}

    fit(step, model(), batches, dataclasses.replace(CONFIG, tracker=Tracker()), Run(validate=validate, quiet=True, device="cpu"))
    assert {"figure": 1.0} in logged


def test_a_validation_that_fails_loses_no_steps_and_leaves_the_trained_weights(tmp_path):
    seen = []

    def failing(done, net):
        seen.append(weights(net)[0])
        raise torch.OutOfMemoryError

    net, validated = model(), Run(tmp_path, validate=lambda done, net: {"figure": 1.0}, quiet=True, device="cpu")
    with pytest.raises(torch.OutOfMemoryError):
        fit(step, net, batches, CONFIG, dataclasses.replace(validated, validate=failing))
    saved, _, average, meta = checkpoint.load(tmp_path / "state.safetensors")
    assert meta["step"] == CONFIG.steps
    assert torch.equal(net[0].weight, saved["0.weight"])
    assert torch.equal(seen[0], average["0.weight"])
    assert not torch.equal(seen[0], net[0].weight)
    assert fit(step, model(), batches, CONFIG, validated).finished
    assert checkpoint.load(tmp_path / "state.safetensors")[3]["validations"] == [{"step": CONFIG.steps, "figure": 1.0}]


@pytest.mark.parametrize("bad", [{"steps": -1}, {"gradient_accumulation": 0}, {"log_every": 0}, {"cooldown": 2.0}, {"average": 1.0}])
def test_bad_settings_raise(bad):
    with pytest.raises(InputError):
        TrainingConfig(**bad)


def test_learning_rate_rises_stays_and_falls():
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup=10, cooldown=0.5)
    rates = [learning_rate(config, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "file.json"
    checkpoint.write_json(target, {"old": 1})

    def full(file: Path) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        checkpoint.write_atomically(target, full)
    assert "old" in target.read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_state_round_trip_holds_no_pickle(tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(batches(0, torch.Generator())["x"]).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path / "s.safetensors", net.state_dict(), optimizer.state_dict(), {}, {"step": 3})
    loaded, state, average, meta = checkpoint.load(path)
    assert meta == {"step": 3}
    assert average == {}
    assert all(torch.equal(loaded[k], v) for k, v in net.state_dict().items())
    fresh = torch.optim.AdamW(net.parameters())
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
