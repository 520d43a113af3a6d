"""The evaluation protocol on a tiny random base, random judges and three people."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from hyperdreambooth import photos
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.checkpoint import write_json
from hyperdreambooth.cli import main
from hyperdreambooth.commands import engines, measure
from hyperdreambooth.errors import InputError
from hyperdreambooth.evaluation import comparison, metrics, protocol, report
from hyperdreambooth.evaluation.bench import CURVES, Bench
from hyperdreambooth.evaluation.command import markdown_table
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.evaluation.methods import GROUPS, METHODS, Method
from hyperdreambooth.evaluation.protocol import Atlas, load_atlas
from hyperdreambooth.pretrained import HyperNetworkInfo

from .conftest import picture, random_loras, tiny_source

PEOPLE, PROMPTS = 3, ["a pencil sketch of a [V] face", "a [V] face wearing a cap"]
SMALL = {"num_channels": 3, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
OURS = GROUPS["ours"]
DRAWN = ("base", "prediction", "prediction+guidance", "finetuned", "finetuned+guidance")


def pixels(count: int, first: int) -> torch.Tensor:
    return photos.to_tensor([picture(first + i, (64, 64)) for i in range(count)])


@pytest.fixture
def atlas() -> Atlas:
    truths = pixels(PEOPLE * 2, 200).unflatten(0, (PEOPLE, 2))
    asked = [{"style": "sketch"}, {"headwear": "cap"}]
    return Atlas(pixels(PEOPLE, 0), pixels(PEOPLE, 100), truths, PROMPTS, asked, [True, False], [7, 8, 9])


@pytest.fixture
def judges() -> protocol.Judges:
    torch.manual_seed(0)
    recogniser = Judge(SMALL, {"identity": [""] * 16}).eval()
    classifier = Judge(SMALL, {"style": ["plain", "sketch"], "headwear": ["none", "cap"]}).eval()
    return protocol.Judges({"": recogniser}, classifier, recogniser.embed(pixels(4, 300)), recogniser.embed(pixels(5, 400)))


@pytest.fixture
def hdb(backbone) -> HyperDreamBooth:
    info = HyperNetworkInfo(
        "toon", {}, {}, {}, personalize={"steps": 2, "rank": 2}, generate={"steps": 2, "guidance": 2.0, "identity_guidance": 2.0}
    )
    return HyperDreamBooth(backbone, "toon", tiny_source(backbone), info)


@pytest.fixture
def bench(hdb, atlas, judges, tmp_path) -> Bench:
    return Bench(hdb, atlas, judges, tmp_path / "cache", "tiny", faithful=hdb)


@pytest.fixture
def rows(bench) -> Bench:
    """No more than the prompts are drawn."""
    return dataclasses.replace(bench, extras=False)


def drawn_of(bench: Bench, name: str, method: Method, people: int = PEOPLE) -> torch.Tensor:
    return torch.stack([bench.pictures(name, method, bench.steps(method), person) for person in range(people)])


def figures(bench: Bench, name: str, method: Method, people: int = PEOPLE) -> dict:
    return bench.figures(bench.measurements(name, method, bench.steps(method), people))


def test_every_way_of_ours_is_measured(rows):
    for name, method in OURS.items():
        rows.make(name, method, range(PEOPLE))
    results = {name: figures(rows, name, method) for name, method in OURS.items()}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for found in results.values():
        assert {"rank1", "top5", "similarity", "context", "context_seen", "context_held_out", "copied"} <= set(found)
        assert {"pixel_distance", "feature_distance", "perceptual_distance", "psnr"} <= set(found)
        assert found["rank1_crowd"][0] <= found["rank1"][0]
        assert found["rank1_crowd"][0] <= found["rank1_lookalikes"][0]
        assert all(low <= mean + 1e-4 and mean <= high + 1e-4 for mean, low, high in found.values())
        assert found["context"][0] == pytest.approx((found["context_seen"][0] + found["context_held_out"][0]) / 2, abs=1e-3)
    assert results["true"]["pixel_distance"][0] == results["true"]["perceptual_distance"][0] == 0
    assert results["reconstruction"]["perceptual_distance"][0] > 0
    assert results["true"]["feature_distance"][0] == pytest.approx(0, abs=1e-4)
    assert results["reconstruction"]["pixel_distance"][0] > 0
    drawn = {name: drawn_of(rows, name, method) for name, method in OURS.items()}
    assert all(pictures.shape == (PEOPLE, 2, 1, 3, 64, 64) for pictures in drawn.values())
    # here "faithful" has the same network as "prediction", and rows share seeds, so its pictures must be equal
    assert torch.equal(drawn["faithful"], drawn["prediction"])
    different = [drawn[name] for name in DRAWN]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(different, 2))
    assert markdown_table(results).count("\n") == len(OURS) + 1


def test_a_guided_method_draws_the_updates_of_the_one_before_it(rows, monkeypatch, tmp_path):
    alone = dataclasses.replace(rows, cache=tmp_path / "alone", last_updates={})
    alone.make("finetuned+guidance", METHODS["finetuned+guidance"], range(2))
    rows.make("finetuned", METHODS["finetuned"], range(2))
    monkeypatch.setattr("hyperdreambooth.evaluation.bench.train", None)
    rows.make("finetuned+guidance", METHODS["finetuned+guidance"], range(2))
    both = [drawn_of(some, "finetuned+guidance", METHODS["finetuned+guidance"], 2) for some in (rows, alone)]
    torch.testing.assert_close(*both, atol=2 / 127.5, rtol=0)
    with pytest.raises(TypeError):  # updates of other people must not be reused
        rows.make("finetuned+guidance", METHODS["finetuned+guidance"], range(2, PEOPLE))


def test_a_picture_depends_on_its_person_prompt_and_number_alone(rows):
    loras, twice = random_loras(rows.hdb.backbone, PEOPLE), dataclasses.replace(rows, count=2)
    whole = twice.draw(range(PEOPLE), range(2), loras, True)
    last = twice.draw([2], [1], loras.map(lambda tensor: tensor[2:]), True)
    torch.testing.assert_close(last[0, 0], whole[2, 1], atol=1e-4, rtol=0)
    fewer = rows.draw(range(PEOPLE), range(2), loras, True)
    torch.testing.assert_close(fewer, whole[:, :, :1], atol=1e-4, rtol=0)
    flat = whole.flatten(0, 2).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


@pytest.mark.parametrize("guided", [False, True])
def test_everyone_gets_their_own_lora(rows, guided):
    loras = random_loras(rows.hdb.backbone, PEOPLE)
    only = loras.map(lambda tensor: tensor * torch.tensor([0.0, 1.0, 0.0]).reshape(-1, 1, 1))
    person, nobody = (rows.draw(range(PEOPLE), range(2), some, guided) for some in (only, loras.scaled(0.0)))
    assert ((person - nobody).abs().amax((1, 2, 3, 4, 5)) > 1e-3).tolist() == [False, True, False]


def test_people_are_fine_tuned_under_what_their_photos_show(rows):
    def texts() -> list[list[str]]:
        return dataclasses.replace(rows, descriptions={}).people(METHODS["finetuned"], range(PEOPLE))[0].prompt

    assert texts() == [["a [V] face"]] * PEOPLE
    rows.hdb.info.describe = [["a [V] face"], ["wearing a cap"]]
    assert texts() == [["a [V] face wearing a cap"]] * PEOPLE


def test_a_figure_that_needs_what_is_not_there_is_left_out(rows, judges):
    few = dataclasses.replace(rows, judges=protocol.Judges(judges.embedders, judges.classifier))
    whole, lacking = (figures(some, "true", METHODS["true"]) for some in (rows, few))
    assert whole.keys() - lacking.keys() == {"copied"}
    assert "copies" not in markdown_table({"true": lacking})
    assert "| - |" in markdown_table({"true": lacking, "base": whole})


def test_faithful_pictures_are_drawn_again_for_other_faithful_weights_and_no_others(rows):
    for name in ("prediction", "faithful"):
        rows.make(name, METHODS[name], range(PEOPLE))
    other = dataclasses.replace(rows, faithful_stamp="other")
    assert other.missing("prediction", METHODS["prediction"], range(PEOPLE), [0]) == []
    assert other.missing("faithful", METHODS["faithful"], range(PEOPLE), [0]) == [0, 1, 2]


def test_an_atlas_is_read_as_it_was_packed(tmp_path, atlas):
    from worlds.toon.atlas import save_sheet

    cells = torch.cat([atlas.references[:, None], atlas.gallery[:, None], atlas.truths], 1)
    save_sheet(((cells + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy(), tmp_path / "tiny.webp")
    about = {"size": 64, "people": atlas.people, "prompts": atlas.prompts, "asked": atlas.asked, "seen": atlas.seen}
    (tmp_path / "tiny.json").write_text(json.dumps(about), encoding="utf-8")
    found = load_atlas(tmp_path, "tiny")
    for name in ("references", "gallery", "truths"):
        torch.testing.assert_close(getattr(found, name), getattr(atlas, name), atol=1e-6, rtol=0)
    assert (found.prompts, found.asked, found.seen, found.people) == (atlas.prompts, atlas.asked, atlas.seen, atlas.people)
    assert found.part(slice(2)).people == [7, 8]
    assert len(found.part(slice(2)).truths) == 2
    assert found.part().people == found.people
    few = found.part(prompts=slice(1, 2))
    assert (few.prompts, few.asked, few.seen) == (atlas.prompts[1:], atlas.asked[1:], atlas.seen[1:])
    assert torch.equal(few.truths, found.truths[:, 1:])
    with pytest.raises(InputError, match="missing"):
        load_atlas(tmp_path, "other")


def test_the_plan_gives_each_person_two_different_photos():
    from worlds.toon import atlas as world
    from worlds.toon import pictures

    jobs = world.plan(pictures.FIRST["test"], 30)
    each = len(world.PROMPTS) + 2
    for start in range(0, len(jobs), each):
        reference, gallery, *truths = jobs[start : start + each]
        assert len({job["person"] for job in jobs[start : start + each]}) == 1
        assert {reference["context"]["expression"], gallery["context"]["expression"]} == {"neutral", "smiling"}
        assert pictures.is_seen(reference["context"])
        assert gallery["context"]["background"] == "white"
        for job, asked in zip(truths, world.PROMPTS, strict=True):
            assert {kind: value for kind, value in job["context"].items() if value != world.PLAIN[kind]} == asked
    about = world.about("test", 30)
    assert about["seen"] == [True] * 4 + [False] * 4
    assert jobs[:each] == world.plan(pictures.FIRST["test"], 1)


def test_pictures_that_are_not_numbers_are_refused(rows):
    with torch.no_grad():
        rows.hdb.source.hypernetwork.start += float("nan")
    with pytest.raises(InputError, match="finite"):
        rows.make("prediction", METHODS["prediction"], range(PEOPLE))


def test_the_fingerprint_changes_with_any_weight_or_picture(hdb, atlas, judges):
    first = protocol.fingerprint(hdb, atlas, judges)
    assert protocol.fingerprint(hdb, atlas, judges) == first
    seen = {first, protocol.fingerprint(hdb, atlas.part(slice(2)), judges)}
    seen.add(protocol.fingerprint(hdb, atlas, protocol.Judges(judges.embedders, judges.classifier)))
    with torch.no_grad():
        hdb.source.hypernetwork.start += 1e-3
    assert protocol.fingerprint(hdb, atlas, judges) not in seen
    assert len(seen) == 3


SHORT = {name: dataclasses.replace(method, steps=min(method.steps, 3)) for name, method in METHODS.items()}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.steps])
def test_every_method_changes_its_person_and_leaves_the_base_as_it_was(bench, name):
    components = bench.hdb.backbone.components
    before = {key: tensor.clone() for key, tensor in components.state_dict().items()}
    bench.make("base", METHODS["base"], range(1))
    bench.make(name, SHORT[name], range(1))
    assert all(torch.equal(tensor, before[key]) for key, tensor in components.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in components.parameters())
    assert not any(module._forward_hooks for module in components.modules())
    drawn, base = bench.pictures(name, SHORT[name], 3, 0), bench.pictures("base", METHODS["base"], 0, 0)
    named = [index for index, prompt in enumerate(bench.prompts) if "[V]" in prompt]
    assert all(not torch.equal(drawn[index], base[index]) for index in named)
    if SHORT[name].kind == "words":  # textual inversion: prompts without the learned word must not change
        assert all(torch.equal(drawn[index], base[index]) for index in range(len(bench.prompts)) if index not in named)


@pytest.mark.parametrize("name", ["DreamBooth-LoRA 4 + prior", "lightweight DreamBooth", "hypernetwork + fine-tuning"])
def test_people_side_by_side_get_what_each_gets_alone(bench, name, tmp_path):
    alone = dataclasses.replace(bench, cache=tmp_path / "alone")
    bench.make(name, SHORT[name], range(PEOPLE))
    for person in range(PEOPLE):
        alone.make(name, SHORT[name], [person])
    together, apart = (drawn_of(some, name, SHORT[name]) for some in (bench, alone))
    torch.testing.assert_close(together, apart, atol=2 / 127.5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_comparison_measures_everything_and_goes_on(bench, monkeypatch):
    methods = {name: SHORT[name] for name in ("true render", "base", "DreamBooth-LoRA 4", "hypernetwork", "hypernetwork + fine-tuning")}
    monkeypatch.setattr("hyperdreambooth.evaluation.bench.MARKS", (1, 2))
    timings = comparison.timed(bench, methods, rounds=1, steps=2)
    trained = {"DreamBooth-LoRA 4", "hypernetwork + fine-tuning"}
    assert set(timings) == set(methods)
    for name, found in timings.items():
        assert (found["step"] > 0) == (found["numbers"] > 0) == (name in trained)
        assert (found["bytes"] > 0) == (name in {*trained, "hypernetwork"})
    saved = list(comparison.compare(bench, methods, timings, PEOPLE, together=2))
    assert [people for _, _, people in saved] == [2, 3]
    rows, curves, _ = saved[-1]
    assert list(rows) == list(methods)
    assert rows["base"]["leakage"][0] == rows["base"]["prior_drift"][0] == 0
    assert rows["DreamBooth-LoRA 4"]["prior_drift"][0] > 0
    assert rows["DreamBooth-LoRA 4"]["diversity"][0] > 0
    assert "leakage" not in rows["true render"]
    assert [point["steps"] for point in curves["DreamBooth-LoRA 4"]] == [1, 2, 3]
    assert [point["steps"] for point in curves["hypernetwork + fine-tuning"]] == [0, 1, 2]
    monkeypatch.setattr("hyperdreambooth.evaluation.bench.train", None)
    assert list(comparison.compare(bench, methods, timings, PEOPLE, together=2)) == saved
    json.dumps(saved, allow_nan=False)


def test_figures_are_of_the_people_that_are_done_among_all_in_the_gallery(bench):
    found = figures(bench, "true render", METHODS["true render"], 2)
    truths = bench.atlas.truths[:2, :, None]
    assert found == bench.judged(truths)
    with_nobody = torch.cat([truths, truths, truths], 1)
    assert bench.judged(with_nobody, truths)["leakage"] == [0.0, 0.0, 0.0]
    assert bench.judged(with_nobody, -truths)["leakage"] != [0.0, 0.0, 0.0]
    recogniser = bench.judges.embedders[""]
    embedded = recogniser.embed(bench.atlas.truths[:2].flatten(0, 1)).unflatten(0, (2, 2))
    gallery = recogniser.embed(bench.atlas.gallery)
    assert found["rank1"][0] == pytest.approx((metrics.ranks(embedded, gallery) == 0).float().mean().item(), abs=1e-4)


def test_a_search_finds_the_settings_with_the_least_distance(bench, tmp_path, capsys):
    few = dataclasses.replace(bench, extras=False)
    method = Method("lora", 3, 1.0, rates=(1e-6, 1e-2))
    found = comparison.search(few, method, "DreamBooth-LoRA 4", 2)
    assert [(one["rate"], one["levels"]) for one in found["tried"][:2]] == [(1e-6, "uniform"), (1e-2, "uniform")]
    assert found["best"][comparison.SCORE][0] == min(one[comparison.SCORE][0] for one in found["tried"])
    assert {one["levels"] for one in found["tried"]} == {"uniform", "high"}
    best, file = {"rate": 0.5, "levels": "high", "steps": 7}, tmp_path / "s.json"
    write_json(file, {"search": {"no hypernetwork, 25 steps": {"best": best}, "DreamBooth": {"best": best}}})
    changed = comparison.with_settings(METHODS, file)
    for name, steps in (("DreamBooth", 7), ("no hypernetwork, 25 steps", 7), ("no hypernetwork, 40 steps", 40), ("DreamBooth-LoRA 4", 60)):
        assert (changed[name].rate, changed[name].levels, changed[name].steps) == (0.5, "high", steps)
    assert changed["textual inversion"] == METHODS["textual inversion"]
    own = {"DreamBooth-LoRA 4": {"best": {**best, "rate": 0.25, "steps": 9}}, "DreamBoth": {"best": best}}
    write_json(file, {"search": {"no hypernetwork, 25 steps": {"best": best}, **own}})
    changed = comparison.with_settings(METHODS, file)
    assert (changed["DreamBooth-LoRA 4"].rate, changed["DreamBooth-LoRA 4"].steps) == (0.25, 9), "a method's own entry must take precedence"
    assert (changed["DreamBooth-LoRA 16"].rate, changed["DreamBooth-LoRA 16"].steps) == (0.5, 60)
    assert "'DreamBoth' is left out" in capsys.readouterr().err
    for best, said in (
        ({"levels": "low"}, "levels must be one of uniform, high, not 'low'"),
        ({"rate": -1}, "rate must lie in 0.0 to 10.0"),
    ):
        write_json(file, {"search": {"DreamBooth": {"best": best}}})
        with pytest.raises(InputError, match=f"s.json: DreamBooth: {said}"):
            comparison.with_settings(METHODS, file)
    for wrong in ({}, {"search": ["DreamBooth"]}, {"search": {"DreamBooth": 1e-4}}, {"search": {"DreamBooth": {"best": 1e-4}}}):
        write_json(file, wrong)
        with pytest.raises(InputError, match="isn't what `evaluate --search` writes"):
            comparison.with_settings(METHODS, file)


@pytest.fixture
def evaluated(tmp_path, tiny_world):
    """Runs the command on a tiny world with the shipped validation people."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    for name in ("validation.webp", "validation.json"):
        shutil.copy(Path(__file__).parents[1] / "benchmarks" / "atlas" / name, folder)
    first = ("evaluate", "--split", "validation", "--atlas", folder, "--faithful", tiny_world / "hypernetwork")
    return lambda *words: main([str(word) for word in (*first, *words)])


def test_the_quick_form_compares_all_methods_and_reports(tmp_path, evaluated):
    out = tmp_path / "quick.json"
    assert evaluated("--quick", "--people", 1, "-o", out) == 0
    found = json.loads(out.read_text())
    assert set(found["rows"]) == set(GROUPS["all"])
    assert set(found["curves"]) == set(CURVES)
    table = out.with_suffix(".md").read_text()
    page = out.with_suffix(".html").read_text()
    for name in found["rows"]:
        assert f"| {name} |" in table
        assert page.count(f"<td>{name}</td>") >= 2  # in the table, and next to its pictures
    assert "http" not in page.replace("http://www.w3.org", "")
    ElementTree.fromstring(out.with_suffix(".svg").read_text())
    drawn = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors"))
    assert evaluated("--quick", "--people", 1, "-o", out) == 0
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")) == drawn
    assert json.loads(out.read_text())["rows"] == found["rows"]


def test_processes_and_workers_share_the_people_out(tmp_path, evaluated, monkeypatch, capsys):
    """As `accelerate launch` starts them, and as an engine's workers do it, here one after another: the figures of one process, each picture
    made once."""
    words, names = ("--people", "5", "--methods", "base", "prediction", "faithful", "-o"), ("base", "prediction", "faithful")

    def made() -> list[tuple[str, str, str]]:
        return re.findall(r"(\S.*): people (\d+) to (\d+)", capsys.readouterr().err)

    def by_workers(args: measure.Evaluate, pieces: list[list[str]], here: object, there: Callable, what: str) -> Iterator[object]:
        return map(there(args), reversed(pieces))

    assert evaluated(*words, tmp_path / "one.json") == 0
    capsys.readouterr()
    monkeypatch.setattr(engines, "each", by_workers)
    assert evaluated(*words, tmp_path / "workers.json", "--engine", "ray") == 0
    assert made() == [(name, *share) for share in (("5", "5"), ("1", "4")) for name in names]
    assert evaluated("--search", "--engine", "ray", "-o", tmp_path / "search.json") == 2
    assert "in one process" in capsys.readouterr().err
    for process, share in (("1", ("5", "5")), ("0", ("1", "4"))):
        monkeypatch.setenv("RANK", process)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", process)
        assert not (tmp_path / "processes.json").exists()
        assert evaluated(*words, tmp_path / "processes.json") == 0
        assert made() == [(name, *share) for name in names]
    one, *others = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("one", "workers", "processes"))
    for other in others:
        assert {name: {**row, "seconds": 0} for name, row in one.items()} == {name: {**row, "seconds": 0} for name, row in other.items()}


def test_a_search_is_written_down_and_used(tmp_path, evaluated, capsys):
    searched, out = tmp_path / "search.json", tmp_path / "e.json"
    assert evaluated("--search", "--quick", "--methods", "DreamBooth, 40 steps", "--people", 1, "-o", searched) == 0
    found = json.loads(searched.read_text())["search"]["DreamBooth, 40 steps"]
    assert len(found["tried"]) == len(METHODS["DreamBooth, 40 steps"].rates) + 1
    capsys.readouterr()
    given = "--settings", searched, "--methods", "DreamBooth, 40 steps", "base", "--people", 1, "-o", out
    drawing = "--denoising-steps", 2, "--guidance", 3, "--context-until", 0
    assert evaluated(*given, *drawing) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["denoising_steps"] == 2
    assert result["settings"]["guidance"] == {**protocol.GUIDANCE, "guidance": 3.0, "context_until": 0.0}
    assert result["settings"]["identity_guidance"] == {**protocol.IDENTITY_GUIDANCE, "guidance": 3.0}
    assert evaluated(*given) == 2
    assert "with other settings" in capsys.readouterr().err
    assert result["methods"]["DreamBooth, 40 steps"]["rate"] == found["best"]["rate"]
    assert result["rows"]["DreamBooth, 40 steps"]["steps"] == found["best"]["steps"] == 10
    assert "Search: DreamBooth, 40 steps" in out.with_suffix(".html").read_text()


def test_what_is_measured_with_the_same_settings_on_as_many_people_is_kept(tmp_path, evaluated, capsys, monkeypatch):
    out = tmp_path / "e.json"
    assert evaluated("--methods", "base", "hypernetwork", "--people", 2, "-o", out) == 0
    first = json.loads(out.read_text())
    assert first["rows"]["base"]["people"] == first["people"] == 2
    assert evaluated("--methods", "base", "prediction+guidance", "--people", 1, "-o", out) == 0
    second = json.loads(out.read_text())
    assert [row["people"] for row in second["rows"].values()] == [2, 2, 1]
    assert {name: second["rows"][name] for name in first["rows"]} == first["rows"]
    assert set(second["methods"]) == set(second["rows"])
    shown = out.with_suffix(".md").read_text()
    shutil.rmtree(out.with_suffix(".cache"))  # figures may come from another machine, without the pictures
    monkeypatch.setattr(Bench, "draw", None)
    assert evaluated("--methods", "hypernetwork", "--people", 2, "-o", out) == 0
    assert json.loads(out.read_text())["rows"] == second["rows"]
    assert out.with_suffix(".md").read_text() == shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU counts its memory")
def test_on_a_gpu_a_methods_peak_memory_is_measured(bench):
    on_gpu = dataclasses.replace(bench, hdb=HyperDreamBooth.from_pretrained("toon", device="cuda"))
    timed = comparison.timed(on_gpu, {name: SHORT[name] for name in ("DreamBooth", "no hypernetwork, 25 steps")})
    assert 40 < timed["no hypernetwork, 25 steps"]["memory"] < timed["DreamBooth"]["memory"] < 10_000


def test_two_results_are_compared(tmp_path, capsys):
    files = []
    for name, (low, high) in {"a": (0.1, 0.2), "b": (0.3, 0.4)}.items():
        rows = {"base": {"rank1": [(low + high) / 2, low, high], "auc": [0.5, 0.4, 0.6], "steps": low}}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert main(["evaluate", "compare", *map(str, files)]) == 0
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line.startswith("| base")]
    assert lines == ["| base | rank1 | 0.150 (0.100-0.200) | 0.350 (0.300-0.400) |"]
    for file, about in zip(
        files, ({"settings": {"steps": 8}, "people": 2}, {"settings": {"steps": 8, "split": "test"}, "people": 3}), strict=True
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), **about}), encoding="utf-8")
    assert main(["evaluate", "compare", *map(str, files)]) == 0
    assert "measured with other people, split, so" in capsys.readouterr().err
    for file, rate in zip(files, (0.1, 0.2), strict=True):
        about = {"methods": {"base": {"rate": rate}, "DreamBooth": {"rate": rate}}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **about}), encoding="utf-8")
    assert main(["evaluate", "compare", *map(str, files)]) == 0
    assert "measured with other people, base, split, so" in capsys.readouterr().err
    files.append(tmp_path / "c.json")
    files[-1].write_text(json.dumps({"rows": {"DreamBooth": {}}}), encoding="utf-8")
    assert main(["evaluate", "compare", *map(str, files[1:])]) == 2
    assert "no row in common: base; and DreamBooth" in capsys.readouterr().err
    files.pop()
    for words in (["compare", str(files[0])], ["contrast", *map(str, files)], ["compare", str(files[0]), str(tmp_path / "none.json")]):
        assert main(["evaluate", *words]) == 2
    assert main(["evaluate"]) == 2
    for words in (["--methods", "magic"], ["--methods", "magic", "--rows", "base"], ["--methods", "all", "--rows", "magic"]):
        assert main(["evaluate", *words, "-o", str(tmp_path / "e.json")]) == 2
        assert "'magic' is no method" in capsys.readouterr().err


def test_a_plot_shows_every_line_and_takes_zeros():
    lines = {"a <b>": [(0, 0.1), (1, 0.5), (100, 0.9)], "c": [(0, 0.2)]}
    drawn = ElementTree.fromstring(report.plot(lines, "steps", "similarity"))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"a <b>", "c", "100"} <= set(texts)
    assert sum(element.tag.endswith("circle") for element in drawn.iter()) == 4
    assert report.plot({"one": [(5, 0.0)]}, "steps", "similarity")
    faceless = {"one": [{"steps": 5, "dlib.rank1": [0, 0, 0]}]}  # no picture shows a face, so there is no similarity
    assert ElementTree.fromstring(report.curves(faceless, "steps", "dlib.similarity")) is not None


def test_a_page_holds_small_pictures_as_they_are_and_large_ones_as_thumbnails():
    for size, shown, kind in (((64, 64), (64, 64), "png"), ((1024, 512), (256, 128), "webp")):
        source = str(report.embedded(picture(3, size)))
        head, data = source.split("base64,")
        assert f"data:image/{kind};" in head
        with Image.open(io.BytesIO(base64.b64decode(data.split('"')[0]))) as image:
            assert image.size == shown
