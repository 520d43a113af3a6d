"""The recipes parse, and run when everything large about them is made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hyperdreambooth.backbones.architectures import architecture
from hyperdreambooth.cli import commands_default, main
from hyperdreambooth.commands import load
from hyperdreambooth.config import read_config, updated
from hyperdreambooth.lora import find_targets

from . import families
from .test_encoder import save

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_targets_are_the_familys(recipe):
    parsed = updated(commands_default(load("train-hypernetwork")[0]), read_config(recipe), str(recipe))
    config = parsed.config
    assert config.mode == recipe.stem.split("-")[1]
    assert config.lightweight.learnable == (config.mode == "pro")
    shapes = find_targets(architecture(recipe.stem.split("-")[0]), config.targets or ("unet.*attn?.to_[qkv]",))
    assert min(min(shape) for shape in shapes.values()) >= 100


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_a_tiny_base(recipe, tmp_path, people):
    base, mode = families.make({"sd15": "sd1", "sdxl": "sdxl"}[recipe.stem.split("-")[0]]), recipe.stem.split("-")[1]
    base.save_pretrained(tmp_path / "base")
    values = yaml.safe_load(recipe.read_text())
    common = ["--base", str(tmp_path / "base")]
    small = ["--lightweight.down-dim", "12", "--lightweight.up-dim", "8"]
    if mode == "faithful":
        table = [*common, "--targets", *values["config"]["targets"], "--dtype", "bfloat16", "--gradient-checkpointing", "--chunk", "2"]
        assert main(["preoptimize", str(people), *table, *small, "--training.steps", "2", "-o", str(tmp_path / "table")]) == 0
        small += ["--table", str(tmp_path / "table")]
    small += ["--encoder", str(save("dinov2", tmp_path / "encoder")), "--batch", "2", "--training.steps", "2"]
    small += ["--hypernetwork.dim", "16", "--hypernetwork.heads", "2"]
    command = ["train-hypernetwork", str(people), "--config", str(recipe), *common, *small, "-o", str(tmp_path / "hyper")]
    assert main(command) == 0
    saved = json.loads((tmp_path / "hyper" / "config.json").read_text())
    assert saved["mode"] == mode
    assert saved["hypernetwork"]["passes"] == values["config"]["hypernetwork"]["passes"]
