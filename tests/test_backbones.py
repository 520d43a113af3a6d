"""Every family on a tiny random model of its real architecture, compared with diffusers' pipeline, and through all five stages."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperdreambooth import cli, formats
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.backbones import Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL, load_backbone, trained_by_flow, wrap
from hyperdreambooth.data import IdentityData, PromptCache, conditioning_in
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import applied, canonical, canonical_modules, find_targets
from hyperdreambooth.objectives import denoising_loss
from hyperdreambooth.pretrained import HyperNetworkInfo
from hyperdreambooth.sampling import check_scheduler, noise_for, schedulers
from hyperdreambooth.settings import GenerateConfig
from hyperdreambooth.stages.dreambooth import Subject, preoptimize, train_light
from hyperdreambooth.stages.train_hypernetwork import train_hypernetwork
from hyperdreambooth.tables import read_table
from hyperdreambooth.training_settings import (
    LightweightConfig,
    NoiseLevels,
    PreoptimizeConfig,
    TrainHypernetworkConfig,
    TrainingConfig,
    TrainLightConfig,
)

from . import families
from .conftest import DECODER, picture, random_loras, sampled, tiny_source

PROMPT, NEGATIVE = "a pencil sketch of a [V] face", "a hat"
TOKENS = LightweightConfig(down_dim=12, up_dim=8)
GUIDANCE = {"flux-dev": 1.0, "flux-schnell": 1.0}  # all other families use classifier-free guidance


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str) -> Any:
    return wrap(families.make(family), family)


def through_pipe(base: Any, noise: torch.Tensor, guidance: float, negative: str | None = None) -> torch.Tensor:
    """Latents out of diffusers' own pipeline, from the same noise."""
    given = {"prompt": [PROMPT] * len(noise), "num_inference_steps": 4, "output_type": "latent"}
    if base.family != "flux":
        more = {"negative_prompt": [negative] * len(noise)} if negative is not None else {}
        side = {"height": base.size, "width": base.size}
        return base.pipe(**given, **more, **side, latents=noise, guidance_scale=guidance).images
    more = {"negative_prompt": [negative] * len(noise), "true_cfg_scale": guidance} if negative is not None else {}
    given |= {"latents": base.pipe._pack_latents(noise, *noise.shape), "guidance_scale": 3.5, "max_sequence_length": base.t5_length}
    sides = [side * base.pipe.vae_scale_factor for side in noise.shape[-2:]]
    return base.pipe._unpack_latents(base.pipe(**given, **more).images, *sides, base.pipe.vae_scale_factor)


def ours(base: Any, noise: torch.Tensor, guidance: float, negative: str = "", **more: Any) -> torch.Tensor:
    prompts, without = (base.encode_prompts([text] * len(noise)) for text in (PROMPT, negative))
    return sampled(base, prompts, without, noise, steps=4, guidance=guidance, **more)


def test_what_the_pipeline_is_chooses_the_family(family, base, tmp_path):
    expected = {"sd1": StableDiffusion, "sd2": StableDiffusion, "sdxl": StableDiffusionXL, "flux": Flux, "sd3": StableDiffusion3}
    assert type(base) is expected[family.split("-")[0].split(".")[0]]
    base.pipe.save_pretrained(tmp_path / "base")
    again = load_backbone(tmp_path / "base")
    assert type(again) is type(base)
    with torch.no_grad():
        for key, value in base.encode_prompts([PROMPT, ""]).items():
            torch.testing.assert_close(again.encode_prompts([PROMPT, ""])[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_sampler_equals_the_pipeline(family, base, negative):
    noise = noise_for(base, [1, 2])
    guidance = 3.0 if negative else GUIDANCE.get(family, 3.0)
    expected = through_pipe(base, noise, guidance, negative)
    torch.testing.assert_close(ours(base, noise, guidance, negative or ""), expected, atol=1e-4, rtol=1e-4)


CHUNK = " ".join(["face"] * 30)  # the tiny tokenizer and encoders take 32 tokens at once, including the start and end tokens


def test_long_prompts_are_read_in_chunks(family, base):
    long, first, rest = (base.encode_prompts([text]) for text in (f"{CHUNK} a hat", CHUNK, "a hat"))
    key = "encoder_hidden_states"
    t5 = base.family in ("sd3", "flux")
    clip = 0 if base.family == "flux" else 32
    for name, value in first.items():
        if name != key:  # pooled embeddings come from the first chunk
            torch.testing.assert_close(long[name], value)
    torch.testing.assert_close(long[key][:, :clip], first[key][:, :clip])
    torch.testing.assert_close(long[key][:, clip : 2 * clip], rest[key][:, :clip])
    assert long[key].shape[1] == 2 * clip + (first[key].shape[1] - clip if t5 else 0)
    # in a batch with a long prompt, a short prompt is padded with an empty chunk
    both = base.encode_prompts(["a hat", f"{CHUNK} a hat"])[key]
    torch.testing.assert_close(both[1:], long[key], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[:1], base.encode_prompts(["a hat"], 2)[key], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[:1, :clip], rest[key][:, :clip], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_every_chunk_of_a_long_prompt_gets_the_update_of_its_own_person(name):
    base = wrap(families.make(name), name)
    people = random_loras(base, 2, patterns=("text_encoder*_proj",))
    prompts = [f"{CHUNK} a hat", f"{CHUNK} a smiling [V] face"]
    with torch.no_grad(), applied(base.components, people):
        together = base.encode_prompts(prompts)
    for index, prompt in enumerate(prompts):
        with torch.no_grad(), applied(base.components, people.select(index)):
            alone = base.encode_prompts([prompt])
        for key, value in alone.items():
            torch.testing.assert_close(together[key][index : index + 1], value, atol=1e-4, rtol=1e-3)


def test_an_autoencoder_that_needs_float32_has_it_only_while_the_library_uses_it():
    pipe, same = families.make("sd1"), families.make("sd1")
    pipe.vae.half()
    same.vae.half().float()
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    base, exact = wrap(pipe, "sd1"), wrap(same, "sd1")
    pixels, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    assert torch.equal(base.encode_images(pixels), exact.encode_images(pixels))
    assert torch.equal(base.decode_images(latents), exact.decode_images(latents))
    with pytest.raises(RuntimeError):
        base.decode_images(pixels)
    assert all(torch.equal(value, before[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe.vae.dtype == torch.float16
    assert pipe.vae.decode(latents.half()).sample.dtype == torch.float16  # as the pipeline itself calls it


def test_text_encoders_leave_the_device_once_prompts_are_encoded_where_memory_is_short(family, monkeypatch):
    base, moves = wrap(families.make(family), family), []
    texts = [model for name, model in base.pipe.components.items() if name.startswith("text_encoder") and model is not None]
    here, there = torch.device("cuda", 0), torch.device("cpu")
    for model in texts:  # the device is only simulated, as there may be no GPU
        monkeypatch.setattr(type(model), "device", property(lambda self: getattr(self, "at", here)))
        monkeypatch.setattr(model, "to", lambda device, model=model: (moves.append(device), setattr(model, "at", device)))
    monkeypatch.setattr(type(base), "device", property(lambda _: here))
    monkeypatch.setattr(base, "tokenize", lambda prompts, chunks=1: {"ids": torch.zeros(1)})
    monkeypatch.setattr(base, "encode_tokens", lambda tokens: {"at": [model.device for model in texts]})
    weigh = sum(weight.nbytes for weight in base.denoiser.parameters())
    free, cached = [2 * weigh], 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    assert base.encode_prompts(["a"])["at"] == [here] * len(texts)
    assert moves == []
    base.device_memory = "low"
    assert base.encode_prompts(["a"])["at"] == [here] * len(texts)
    assert moves == [there] * len(texts)
    moves.clear()
    base.device_memory, free[0] = "auto", weigh // 2
    assert base.encode_prompts(["a"])["at"] == [here] * len(texts)
    assert moves == [here] * len(texts) + [there] * len(texts)
    cached = weigh  # memory that torch has cached but doesn't use counts as free
    moves.clear()
    base.encode_prompts(["a"])
    assert moves == [here] * len(texts)
    PromptCache(base, trains_text=True)
    free[0], cached = 0, 0
    base.encode_prompts(["a"])
    assert moves == [here] * len(texts)


def test_a_long_prompt_draws_and_trains_beside_short_ones(base):
    hdb = HyperDreamBooth(base, "x")
    hat, beard = (hdb.generate([f"{CHUNK} a {word}", "a face"], steps=1, seed=1, guidance=2.0) for word in ("hat", "beard"))
    if base.family != "flux":  # Flux's tiny T5 tokenizes single letters
        assert hat[0].tobytes() != beard[0].tobytes()
    for trains_text in (False, True):
        cache = PromptCache(base, trains_text=trains_text)
        short = conditioning_in(cache.inputs(["a face"], "x."), "x.", base)
        mixed = conditioning_in(cache.inputs(["a face", f"{CHUNK} a hat"], "x."), "x.", base)
        for name, value in base.encode_prompts(["a face", f"{CHUNK} a hat"]).items():
            torch.testing.assert_close(mixed[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(short["encoder_hidden_states"], base.encode_prompts(["a face"])["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["sd3", "flux-schnell"])
def test_words_that_t5_cannot_read_are_named_once(name, capsys):
    base = wrap(families.make(name), name)
    for _ in range(2):
        base.encode_prompts([f"{'face ' * (60 + len(name))}zebra"])
    said = capsys.readouterr().err
    assert said.count("too long for T5, which reads 256 tokens") == 1
    assert said.rstrip().endswith("zebra")


def test_hooks_equal_the_exported_file_in_the_pipeline(family, base, tmp_path):
    patterns = (*base.default_targets, "text_encoder*.[qkv]_proj") if set(base.components) & set(base.text_components) else ()
    loras = random_loras(base, patterns=patterns)
    formats.save_lora(tmp_path / "me.safetensors", loras, {}, dtype=torch.float32)
    noise, guidance = noise_for(base, [1]), GUIDANCE.get(family, 3.0)
    with applied(base.components, loras):
        found = ours(base, noise, guidance)
    other = wrap(families.make(family), family)
    other.pipe.load_lora_weights(str(tmp_path / "me.safetensors"))
    negative = None if family == "sdxl" or "flux" in family else ""
    torch.testing.assert_close(found, through_pipe(other, noise, guidance, negative), atol=1e-4, rtol=1e-3)
    assert (found - ours(base, noise, guidance)).abs().max() > 1e-3


def losses_of(base: Any, latents: torch.Tensor) -> torch.Tensor:
    """One loss a sample, under whatever LoRA is applied."""
    levels = torch.tensor([0.3, 0.8, 0.6])[: len(latents)]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    conditioning = base.encode_prompts(["a [V] face", "a smiling [V] face", "a face"][: len(latents)])
    return denoising_loss(base, latents, conditioning, noise, base.steps_for(levels))


def test_a_batch_of_people_equals_one_by_one(base):
    loras = random_loras(base, batch=3)
    latents = noise_for(base, [3, 4, 5])
    with torch.no_grad():
        with applied(base.components, loras):
            together = losses_of(base, latents)
        with applied(base.components, loras.select(0)):
            alone = losses_of(base, latents[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_same_with_and_without_checkpointing(family):
    latents, found = None, []
    for checkpointing in (False, True):
        base = wrap(families.make(family), family)
        if checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        latents = noise_for(base, [3, 4])
        loras = random_loras(base, batch=2).map(lambda tensor: tensor.clone().requires_grad_())
        with applied(base.components, loras):
            losses_of(base, latents).sum().backward()
        found.append(loras)
    plain, checkpointed = found
    trained = [path for path in plain if plain[path].up.grad is not None]
    assert len(trained) > 0.8 * len(plain)
    for path in trained:
        torch.testing.assert_close(checkpointed[path].up.grad, plain[path].up.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(checkpointed[path].down.grad, plain[path].down.grad, atol=1e-5, rtol=1e-3)


def test_the_hooks_output_equals_merged_weights(base):
    loras = random_loras(base)
    latents = noise_for(base, [3, 4])
    clone = copy.deepcopy(base)
    modules = canonical_modules(clone.components)
    with torch.no_grad():
        for path, lora in loras.items():
            modules[path].weight += lora.delta()
        with applied(base.components, loras):
            found = losses_of(base, latents)
        torch.testing.assert_close(found, losses_of(clone, latents), atol=1e-3, rtol=1e-3)


def test_the_forward_process_and_its_target_agree(base):
    """What the denoiser is asked for, taken back from the noisy latents, gives the latents again."""
    latents, noise = noise_for(base, [1, 2]), noise_for(base, [3, 4])
    timesteps = base.steps_for(torch.tensor([0.4, 0.9]))
    noisy, target = base.add_noise(latents, noise, timesteps), base.target(latents, noise, timesteps)
    if base.family in ("sd3", "flux"):
        level = (timesteps / 1000).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(level.flatten(), torch.tensor([0.4, 0.9]))
        torch.testing.assert_close(noisy - level * target, latents, atol=1e-5, rtol=1e-5)
        return
    alpha = base.schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    back = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target if base.schedule.config.prediction_type == "v_prediction" else None
    if back is None:
        back = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    torch.testing.assert_close(back, latents, atol=1e-4, rtol=1e-4)


def people(base: Any) -> IdentityData:
    """Six people of two pictures each, made up."""
    who = torch.arange(6).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(12, *base.latent_shape(), generator=generator)
    features = torch.randn(6, 4, 16, generator=generator)[who]
    return IdentityData(latents, features, who, [f"p{i}" for i in range(6)], ["a face"] * 12, torch.ones(12, dtype=torch.bool))


def test_all_five_stages(base, tmp_path):
    short = TrainingConfig(steps=2, learning_rate=1e-2, max_grad_norm=0.0)
    levels = NoiseLevels(mean=0.5)
    latents = noise_for(base, [1, 2])
    # 1. lightweight DreamBooth, with text encoder layers if the family has any
    targets = (*base.default_targets, "text_encoder*.q_proj")
    config = TrainLightConfig(targets=targets, lightweight=TOKENS, levels=levels, copies=2, training=short)
    table, report = train_light(base, Subject(latents[None], "a face"), config, quiet=True)
    assert report.finished
    assert any(lora.up.abs().max() > 0 for path, lora in table(torch.tensor([0])).items() if path.startswith("text_encoder"))
    # 2. pre-optimization
    data = people(base)
    settings = PreoptimizeConfig(lightweight=TOKENS, chunk=4, copies=1, training=short)
    rows = preoptimize(base, data, settings, tmp_path)
    assert len(rows) == 6
    # 3. a faithful hypernetwork trained with that table, and a pro one without a table
    source = tiny_source(base)
    for mode in ("faithful", "pro"):
        training = TrainHypernetworkConfig(
            mode=mode, lightweight=TOKENS, hypernetwork=DECODER, batch=2, training=TrainingConfig(steps=2, average=0.5)
        )
        known = read_table(tmp_path, table_fingerprint(base)) if mode == "faithful" else None
        source, report = train_hypernetwork(base, source.encoder, data, training, validation=data, table=known)
        assert report.finished
        assert torch.isfinite(torch.tensor(report.validations[-1]["identity_gain"]))
    # 4. a person's LoRA from the hypernetwork, and 5. pictures of the person
    info = HyperNetworkInfo("tiny", {}, {}, {})
    hdb = HyperDreamBooth(base, "tiny", source.eval(), info)
    me = hdb.personalize(picture(), steps=2, rank=2, copies=1, quiet=True)
    assert me.rank == 3
    me.save(tmp_path / "me.safetensors")
    images = hdb.generate("a [V] face", str(tmp_path / "me.safetensors"), steps=2, identity_guidance=2.0)
    assert images[0].size == (base.size, base.size)
    assert images[0].tobytes() != hdb.generate("a [V] face", steps=2, identity_guidance=2.0)[0].tobytes()


def table_fingerprint(base: Any) -> str:
    from hyperdreambooth.trainable_lora import LightweightLora

    return LightweightLora(find_targets(base.components, base.default_targets), TOKENS).fingerprint()


def test_a_base_in_bfloat16_trains_and_draws(family):
    pipe = families.make(family)
    base = wrap(pipe.to(torch.bfloat16), family)
    loras = random_loras(base, batch=2).scaled(0.1).map(lambda tensor: tensor.clone().requires_grad_())
    latents = noise_for(base, [3, 4])
    with applied(base.components, loras):
        losses = losses_of(base, latents)
        losses.sum().backward()
    assert losses.dtype == torch.float32
    assert all(torch.isfinite(lora.up.grad).all() for lora in loras.values() if lora.up.grad is not None)
    images = HyperDreamBooth(base, family).generate("a [V] face", loras.detach().select(0), steps=2)
    assert images[0].size == (base.size, base.size)


@pytest.mark.parametrize("absent", [(0,), (1,), (0, 1), (2,), (0, 2)])
def test_sd3_without_some_of_its_text_encoders(absent):
    torch.manual_seed(0)
    base = wrap(families.sd3(absent=absent), "sd3")
    torch.manual_seed(0)
    whole = wrap(families.sd3(), "sd3")
    found, full = base.encode_prompts([PROMPT]), whole.encode_prompts([PROMPT])
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape if key != "encoder_hidden_states" or set(absent) != {0, 1} else (1, 77 + 256, 32) for key, value in full.items()
    }
    pooled = found["pooled_projections"]
    for index in (0, 1):
        assert bool(pooled[:, 16 * index : 16 * (index + 1)].abs().max() > 0) == (index not in absent)
    hdb = HyperDreamBooth(base, "sd3")
    assert hdb.generate("a [V] face", steps=1)[0].size == (64, 64)


def test_sd3_without_any_text_encoder_is_refused():
    with pytest.raises(InputError, match="no text encoder at all"):
        wrap(families.sd3(absent=(0, 1, 2)), "sd3")


def test_a_base_that_lost_a_text_encoder_it_needs_is_refused(tmp_path):
    families.make("sdxl").save_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "text_encoder_2")
    with pytest.raises(InputError, match="no text_encoder_2"):
        load_backbone(tmp_path / "base")


VARIANTS: dict[str, dict[str, Any]] = {
    "fp16": {"variant": "fp16"},
    "sharded": {"max_shard_size": "40KB"},
    "fp16 sharded": {"variant": "fp16", "max_shard_size": "40KB"},
}


def legacy_shards(folder: Path) -> None:
    """Names as diffusers gave them once: `model-00001-of-00002.fp16.safetensors`."""
    for file in list(folder.rglob("*.fp16-*")):
        stem, rest = file.name.split(".fp16-")
        file.rename(file.with_name(f"{stem}-{rest.replace('.safetensors', '.fp16.safetensors')}"))


def mixed(folder: Path, plain: Path) -> None:
    """Half-precision weights but for the autoencoder's, a twin from training, and components that aren't there."""
    shutil.rmtree(folder / "vae")
    shutil.copytree(plain / "vae", folder / "vae")
    denoiser = next(folder / name for name in ("unet", "transformer") if (folder / name).is_dir())
    (denoiser / "LICENSE").write_text("free")
    save_file({"nothing": torch.zeros(1)}, denoiser / "diffusion_pytorch_model.non_ema.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "more": ["nowhere", "Unknown"]}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "form"),
    [("sd1", "fp16"), ("sdxl", "fp16 sharded"), ("sd3-no-t5", "mixed"), ("flux-dev", "legacy shards"), ("flux-dev", "mixed")],
)
def test_directories_open_whatever_their_weights_are_called(name, form, tmp_path):
    pipe = families.make(name)
    given = VARIANTS["fp16" if form == "mixed" else form] if form != "legacy shards" else VARIANTS["fp16 sharded"]
    pipe.save_pretrained(tmp_path / "base", **given)
    if form == "legacy shards":
        legacy_shards(tmp_path / "base")
    if form == "mixed":
        pipe.save_pretrained(tmp_path / "plain")
        mixed(tmp_path / "base", tmp_path / "plain")
    found = load_backbone(tmp_path / "base").pipe
    assert found.name_or_path == str(tmp_path / "base")
    models = {key: model for key, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    assert {key for key, model in found.components.items() if isinstance(model, torch.nn.Module)} == set(models)
    for key, model in models.items():
        tensors = found.components[key].state_dict()
        for path, tensor in model.state_dict().items():
            torch.testing.assert_close(tensors[path], tensor)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/none")


def changed(file: Path, change: Any) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Any, str]] = {
    "a blob that isn't there": (lambda base: dangling(base / UNET), r"unet/.*safetensors is a link to a file that isn't there"),
    "a config that isn't there": (lambda base: dangling(base / "text_encoder/config.json"), "text_encoder/config.json is a link to"),
    "words that aren't there": (lambda base: dangling(base / "tokenizer/tokenizer.json"), "tokenizer/tokenizer.json is a link to"),
    "no words": (lambda base: (base / "tokenizer/tokenizer.json").unlink(), r"tokenizer has no tokenizer.json or vocab.json or"),
    "no config": (lambda base: (base / "unet/config.json").unlink(), "unet has no config.json"),
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "no folder tokenizer, which"),
    "a pointer": (lambda base: (base / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer"),
    "half a file": (lambda base: (base / UNET).write_bytes((base / UNET).read_bytes()[:-9]), r"unet.*not a whole safetensors.* cut off"),
    "more layers": (lambda base: changed(base / UNET, lambda t: t | {"fuser.weight": torch.ones(1)}), "left out: fuser.weight"),
    "bytes": (lambda base: changed(base / UNET, lambda t: {k: v.char() for k, v in t.items()}), r"is quantized \(.* is stored as I8\)"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "base"
    families.make("sd1").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", list(DAMAGE))
def test_what_is_wrong_in_a_directory_is_said_with_its_file(what, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "base")
    damage, says = DAMAGE[what]
    damage(tmp_path / "base")
    with pytest.raises(InputError, match=says) as refused:
        load_backbone(tmp_path / "base")
    assert str(tmp_path / "base") in str(refused.value)


def test_weights_may_have_each_others_names_and_a_folder_near_a_base_leads_to_it(saved, tmp_path):
    base = tmp_path / "models--ann--base/snapshots/0123"
    shutil.copytree(saved, base)
    (base / UNET).rename(base / "unet/model.SAFETENSORS")
    (base / "text_encoder/model.safetensors").rename(base / "text_encoder/pytorch_model.safetensors")
    assert load_backbone(base).family == "sd"
    for near in (tmp_path / "models--ann--base", base.parent, base / "unet"):
        with pytest.raises(InputError, match=rf"has no model_index.json.* Give {base}\?"):
            load_backbone(near)
    for name in ("./models/sd15", "/models/sd15", "https://example.com/sd15"):
        with pytest.raises(InputError, match=f"{name} can't be opened as a base: there is no such file or directory, and a hub id is"):
            load_backbone(name)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_directory_that_lost_a_layer_a_shard_or_its_weights_is_refused(component, tmp_path):
    families.make("sd1").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    load_backbone(tmp_path / "base")
    first, *others = sorted((tmp_path / "base" / component).glob("*.safetensors"))
    tensors = load_file(first)
    name = sorted(tensors)[-1].removeprefix("text_model.")
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(name)}, first, {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 layers: {name}"):
        load_backbone(tmp_path / "base")
    first.unlink()
    with pytest.raises(InputError, match=f"{component} has a part of its shards"):
        load_backbone(tmp_path / "base")
    for file in others:
        file.unlink()
    (first.parent / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(InputError, match=f"{component} has no .safetensors file"):
        load_backbone(tmp_path / "base")
    shutil.rmtree(first.parent)
    with pytest.raises(InputError, match=f"has no (folder )?{component}"):
        load_backbone(tmp_path / "base")


def test_denoisers_that_take_more_than_latents_or_were_distilled_are_refused():
    for channels, says in ((9, "an inpainting model, of 9"), (8, "a model for editing"), (7, "another kind, of 7")):
        pipe = families.make("sd1")
        pipe.unet = families.unet(32, attention_head_dim=4, in_channels=channels)
        with pytest.raises(InputError, match=says):
            wrap(pipe, "x")
    pipe = families.make("sdxl")
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(InputError, match="x is distilled for a few steps"):
        wrap(pipe, "x")


def test_only_clips_paths_get_the_step_that_files_carry():
    assert canonical("text_encoder.encoder.layers.0.mlp.fc1") == "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert canonical("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q") == "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


def test_packing_is_what_flux_does_and_back(monkeypatch):
    base, latents, seen = wrap(families.make("flux-dev"), "flux-dev"), torch.randn(2, 4, 6, 8), []
    monkeypatch.setattr(base, "denoise", lambda packed, **_: seen.append(packed) or packed)
    assert torch.equal(base.predict(latents, torch.tensor([500, 500]), base.encode_prompts(["a face"] * 2)), latents)
    assert torch.equal(seen[0], base.pipe._pack_latents(latents, *latents.shape))


def test_flux_dev_trains_at_an_embedded_guidance_of_one_and_draws_at_its_own():
    base = wrap(families.make("flux-dev"), "flux")
    noise = noise_for(base, [1])
    assert base.encode_prompts(["a face"])["guidance"].tolist() == [1.0]
    default, weaker = ours(base, noise, 1.0), ours(base, noise, 1.0, embedded_guidance=1.0)
    assert (default - weaker).abs().max() > 1e-4
    assert "guidance" not in wrap(families.make("flux-schnell"), "flux").encode_prompts(["a face"])


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux-dev"])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler_solves_the_same_flow(name, scheduler):
    base = wrap(families.make(name), name)
    noise, prompts = noise_for(base, [1]), base.encode_prompts([PROMPT])
    fine = sampled(base, prompts, prompts, noise, steps=60, guidance=1.0)
    other = sampled(base, prompts, prompts, noise, steps=30, guidance=1.0, scheduler=scheduler)
    coarse = sampled(base, prompts, prompts, noise, steps=2, guidance=1.0)
    assert (other - fine).abs().mean() < 0.3 * (coarse - fine).abs().mean()


def test_a_scheduler_that_knows_no_flow_is_refused():
    base = wrap(families.make("sd3"), "sd3")
    prompts = base.encode_prompts([PROMPT])
    with pytest.raises(InputError, match="flow matching"):
        sampled(base, prompts, prompts, noise_for(base, [1]), steps=2, scheduler="DDIMScheduler")


def test_a_flow_scheduler_is_refused_where_nothing_flows(backbone):
    prompts = backbone.encode_prompts([PROMPT])
    with pytest.raises(InputError, match=r"isn't trained by flow matching\. Those that can: DDIM"):
        sampled(backbone, prompts, prompts, noise_for(backbone, [1]), scheduler="FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("flow", [False, True])
def test_schedulers_are_checked_before_any_model_is_loaded_and_all_that_are_listed_draw(flow, tmp_path):
    name = "sd3" if flow else "sd1"
    pipe = families.make(name)
    pipe.save_pretrained(tmp_path / "base")
    assert trained_by_flow(tmp_path / "base") is flow
    assert trained_by_flow("somebody/somewhere") is None
    shutil.rmtree(tmp_path / "base" / "vae")
    for wrong, says in (
        ("Euler", "is no scheduler"),
        ("Tensor", "is no scheduler"),
        ("EDMEulerScheduler", "by flow matching" if flow else "can't draw here"),
    ):
        with pytest.raises(InputError, match=f"{says}.*Those that can: .*DPMSolverMultistepScheduler"):
            check_scheduler(wrong, flow)
        assert cli.main(["generate", "a face", "-o", str(tmp_path / "x"), "--base", str(tmp_path / "base"), "--scheduler", wrong]) == 2
    if importlib.util.find_spec("torchsde") is None:
        with pytest.raises(InputError, match="needs torchsde, which isn't installed"):
            check_scheduler("DPMSolverSDEScheduler", False)
    base = wrap(pipe, name)
    noise, prompts = noise_for(base, [1]), base.encode_prompts([PROMPT])
    for scheduler in schedulers(flow):
        assert sampled(base, prompts, prompts, noise, steps=4, guidance=1.0, scheduler=scheduler).isfinite().all()


def test_sides_must_fit_the_family():
    hdb = HyperDreamBooth(wrap(families.make("flux-schnell"), "flux"), "flux")
    with pytest.raises(InputError, match="multiple of 16"):
        hdb.generate("a face", config=GenerateConfig(width=72, steps=1))
    assert hdb.generate("a face", config=GenerateConfig(width=96, steps=1))[0].size == (96, 64)


def test_other_pipelines_and_predictions_are_refused():
    pipe = families.make("sd1")
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(InputError, match="epsilon or v prediction"):
        wrap(pipe, "x")
    with pytest.raises(InputError, match=r"x is a int; supported: StableDiffusionPipeline"):
        wrap(3, "x")
