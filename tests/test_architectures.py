"""Parameter counts and LoRA targets of the published architectures, computed without weights."""

from __future__ import annotations

import json

import pytest

from hyperdreambooth.backbones.architectures import FAMILIES, PRESETS, architecture
from hyperdreambooth.lora import find_targets

# the denoiser's parameters in billions, from the model cards
PUBLISHED = {"sd15": 0.86, "sd21": 0.87, "sdxl": 2.57, "sd3": 2.0, "sd35-medium": 2.5, "sd35-large": 8.1, "flux": 11.9}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_sizes_and_targets(name):
    components = architecture(name)
    denoiser = components["unet" if "unet" in components else "transformer"]
    assert all(parameter.device.type == "meta" for parameter in components.parameters())
    # includes buffers, as SD 3 stores its position table in its files
    assert sum(tensor.numel() for tensor in denoiser.state_dict().values()) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.05)
    presets = {key: find_targets(components, patterns) for key, patterns in PRESETS[FAMILIES[name]].items()}
    assert set(presets["attention"]) < set(presets["attention+ff"])
    assert set(presets["attention"]) < set(presets["paper"])
    text = {path.split(".")[0] for path in presets["paper"]} - {"unet", "transformer"}
    assert text == set(components) - {"unet", "transformer"}
    # norms, embeddings, time-step layers and proj_in must not be targets
    assert not any("norm" in path or "embed" in path or "proj_in" in path for path in presets["attention+ff"])


def test_attention_and_feed_forward_of_every_block_of_flux_and_sd3():
    flux = find_targets(architecture("flux"), PRESETS["flux"]["attention+ff"])
    # a joint block has q, k, v and output for image and text, and two feed-forwards of two layers; a single block has q, k, v, and two more
    assert len(flux) == 19 * (8 + 4) + 38 * (3 + 2)
    sd3 = find_targets(architecture("sd3"), PRESETS["sd3"]["attention+ff"])
    assert len(sd3) == 24 * (8 + 4) - 1 - 2  # the last block has no output projection and feed-forward for the text
    medium = find_targets(architecture("sd35-medium"), PRESETS["sd3"]["attention+ff"])
    assert len(medium) == len(sd3) + 13 * 4
    sdxl = find_targets(architecture("sdxl"), PRESETS["sdxl"]["attention"])
    assert len(sdxl) == 70 * 8


def test_the_docs_tables_are_the_results_and_the_results_are_todays():
    from benchmarks import families as tables

    text = tables.DOCS.read_text(encoding="utf-8")
    for table in (tables.families_table(), tables.memory_table(), tables.full_size_table()):
        assert table in text
    for row in json.loads((tables.RESULTS / "families.json").read_text(encoding="utf-8")):
        shapes = find_targets(architecture(row["base"]), PRESETS[FAMILIES[row["base"]]][row["preset"]])
        assert row["layers"] == len(shapes)
        assert row["lora_variables"] == sum(shape.inputs + shape.outputs for shape in shapes.values())
        assert row["five_stages"] == "passed"
