"""Invalid hypernetwork folders and token files: any error in them must be raised as one InputError."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperdreambooth import formats
from hyperdreambooth.checkpoint import read_tensors, save_tensors
from hyperdreambooth.errors import InputError
from hyperdreambooth.pretrained import build, load_hypernetwork
from hyperdreambooth.settings import GenerateConfig, PersonalizeConfig, resolve
from hyperdreambooth.stages.dreambooth import finish
from hyperdreambooth.tables import read_table_config

MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WRONG = st.sampled_from(
    [10**9, 10**30, -1, 0, 1, 2, 3, 0.5, 1e300, math.nan, math.inf, "", "x", "1", "../../..", True, None, [], [1], [[]], {}, {"x": 1}]
)


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(world / "hypernetwork", tmp_path_factory.mktemp("hypernetwork") / "h"))


@pytest.fixture(scope="module")
def source(folder: Path):
    return load_hypernetwork(folder)[0]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value can be changed: at every key and index in it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    result = inner = deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return result


def mutants(file: Path) -> st.SearchStrategy[str]:
    """A JSON file with something in it changed, left out, or added."""
    values = json.loads(file.read_text())
    top = [place for place in places(values) if len(place) < 3]  # the many targets would otherwise get almost all changes
    one = st.builds(changed, st.just(values), st.sampled_from([*top, *places(values), ("unknown",)]), WRONG)
    less = st.sampled_from(list(values)).map(lambda gone: {key: value for key, value in values.items() if key != gone})
    broken = st.integers(0, 200).map(lambda end: file.read_text()[:end])
    return st.one_of(one, one, one, one, less.map(json.dumps), broken, WRONG).map(lambda v: v if isinstance(v, str) else json.dumps(v))


def refusal(call: Callable[..., object], *arguments: object) -> str | None:
    """What an InputError says, None without one; any other error is a failure."""
    try:
        call(*arguments)
    except InputError as error:
        return str(error)
    return None


def usable(folder: Path) -> None:
    """Whatever loads also predicts, and its defaults can be taken."""
    found, info = load_hypernetwork(folder)
    side = found.encoder.size
    finish(found(torch.zeros(1, 3, side, side)).detach().select(0))
    assert resolve(PersonalizeConfig, ("own", info.personalize)).rank <= 1024
    resolve(GenerateConfig, ("own", info.generate))
    assert all(slot[0] is not None for slot in info.describe)


@pytest.mark.parametrize(("name", "times"), [("config.json", 250), ("encoder/config.json", 100), ("encoder/preprocessor_config.json", 50)])
def test_a_changed_config_loads_or_is_refused(folder, name, times):
    file = folder / name
    before = file.read_text()

    @settings(MANY, max_examples=times)
    @given(mutants(file))
    def check(text):
        file.write_text(text)
        error = refusal(usable, folder)
        assert error is None or ("\n" not in error and len(error) < 1000)

    try:
        check()
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("unknown",), 1, "unknown setting 'unknown'"),
        (("lightweight", "rank"), -1, "rank must lie in 1 to 1,024"),
        (("lightweight", "down_dim"), 8, "doesn't fit its config.json"),
        (("hypernetwork", "dim"), 10**9, "dim must lie in"),
        (("hypernetwork", "heads"), 3, "multiple of heads"),
        (("hypernetwork", "blocks"), 2, "doesn't fit its config.json"),
        (("hypernetwork",), [], "hypernetwork must be dict"),
        (("personalize", "rank"), 10**9, "rank must lie in"),
        (("personalize", "learning_rate"), math.nan, "isn't JSON"),
        (("personalize", "stepz"), 3, "unknown setting 'stepz'"),
        (("generate", "guidance"), "much", "guidance must be"),
        (("describe",), [["a"], []], "at least one phrase"),
        (("mode",), "amateur", "one of pro, faithful"),
        (("encoder",), "nowhere", "encoder a folder"),
        (("format",), 2, "of format 1 or older"),
        (("targets",), {}, "targets must name layers"),
    ],
)
def test_a_wrong_field_is_named(folder, path, value, says):
    file = folder / "config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(changed(json.loads(before), path, value)))
        with pytest.raises(InputError, match=says) as caught:
            load_hypernetwork(folder)
        assert str(file) in str(caught.value) or "doesn't fit" in says
    finally:
        file.write_text(before)


def test_a_target_of_another_size_is_refused_before_anything_is_made(folder, monkeypatch):
    file = folder / "config.json"
    before = file.read_text()
    values = json.loads(before)
    name = next(iter(values["targets"]))

    def without_memory(*sizes):
        assert torch.get_default_device().type == "meta"
        return build(*sizes)

    monkeypatch.setattr("hyperdreambooth.pretrained.build", without_memory)
    try:
        file.write_text(json.dumps(changed(values, ("targets", name), [100_000, 100_000])))
        with pytest.raises(InputError, match=r"doesn't fit.*100000"):
            load_hypernetwork(folder)
        file.write_text(json.dumps(changed(values, ("targets", name), [10**9, 32])))
        with pytest.raises(InputError, match="must lie in 1 to 131,072"):
            load_hypernetwork(folder)
    finally:
        file.write_text(before)


def test_weights_that_are_not_finite_are_refused(folder):
    file = folder / "model.safetensors"
    before = file.read_bytes()
    tensors, _ = read_tensors(file)
    try:
        for value in (math.nan, math.inf):
            save_tensors(file, {**tensors, "hypernetwork.start": tensors["hypernetwork.start"] * value})
            with pytest.raises(InputError, match=r"hypernetwork.start should be finite"):
                load_hypernetwork(folder)
    finally:
        file.write_bytes(before)


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64]


@MANY
@given(number=st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 0.0, 1e-40]), many=st.booleans(), dtype=st.sampled_from([torch.float32, *DTYPES]), width=st.integers(0, 21), place=st.integers(0, 10**6))  # fmt: skip
def test_changed_tokens_are_finite_or_refused(source, tmp_path, number, many, dtype, width, place):
    layers, whole = source.lightweight.token_shape
    tokens = torch.randn(layers, whole, generator=torch.Generator().manual_seed(0))
    path = formats.save_tokens(tmp_path / "me.tokens", tokens, source.lightweight, {}, overwrite=True)
    rows, header = read_tensors(path)
    name = list(rows)[place % layers]
    if many:
        rows[name][:] = number
    else:
        rows[name][place % whole] = number
    rows[name] = rows[name].to(dtype)
    if width < whole - 1 and place % 5 == 0:
        rows[name] = rows[name][:width]
    save_tensors(path, rows, header)

    def export() -> None:
        loras = finish(source.lightweight(formats.read_tokens(path, source.lightweight)[None]).detach().select(0))
        saved = formats.read_lora(formats.save_lora(tmp_path / "me.safetensors", loras, {}, overwrite=True))
        assert all(lora.down.isfinite().all() and lora.up.isfinite().all() for lora in saved.loras.values())

    error = refusal(export)
    assert error is None or "finite" in error or "doesn't fit" in error
    assert error is not None or not (math.isnan(number) or math.isinf(number)) or not dtype.is_floating_point


@MANY
@given(data=st.data())
def test_a_changed_config_of_a_table_is_read_or_refused(tmp_path, data):
    file = tmp_path / "config.json"
    sizes = {"rank": 1, "down_dim": 12, "up_dim": 8, "learnable": False, "seed": 0}
    file.write_text(
        json.dumps({"base": "toon", "config": {"prompt": "a [V] face", "targets": ["unet*"], "lightweight": sizes, "chunk": 4}})
    )
    file.write_text(data.draw(mutants(file)))
    error = refusal(lambda: read_table_config(tmp_path).lightweight.width / read_table_config(tmp_path).lightweight.rank)
    assert error is None or str(file) in error


@settings(MANY, max_examples=100)
@given(data=st.data())
def test_a_changed_adapter_config_gives_a_finite_scale_or_is_refused(source, tmp_path, data):
    loras = finish(source.lightweight(torch.ones(1, *source.lightweight.token_shape)).detach().select(0))
    file = tmp_path / "adapter_config.json"
    formats.save_lora(tmp_path / "adapter_model.safetensors", loras, {}, overwrite=True)
    file.write_text(json.dumps({"r": 1, "lora_alpha": 2, "alpha_pattern": {"to_q": 3}, "use_rslora": False}))
    file.write_text(data.draw(mutants(file)))

    def read() -> None:
        found = formats.read_lora(tmp_path / "adapter_model.safetensors").loras
        assert all(lora.is_finite() for lora in found.values())

    error = refusal(read)
    assert error is None or "scale" in error
