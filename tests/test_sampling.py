"""The sampler compared with diffusers' pipeline, and the definition of identity guidance."""

from __future__ import annotations

import pytest
import torch

from hyperdreambooth import formats, photos
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Lora, LoraSet, applied, merged
from hyperdreambooth.sampling import branches, generate, noise_for, schedulers
from hyperdreambooth.settings import GenerateConfig

from .conftest import conditioning, random_loras, sampled, tiny_pipe

PROMPT = "a pencil sketch of a [V] face"


def through_pipe(pipe, seeds, **more):
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return pipe([PROMPT] * len(seeds), latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt", **more).images * 2 - 1


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_plain_guidance_equals_the_pipeline(prediction):
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(tiny_pipe(prediction))
    found = generate(backbone, [PROMPT] * 2, [1, 2], GenerateConfig(steps=4, guidance=3.0))
    torch.testing.assert_close(found, through_pipe(backbone.pipe, [1, 2]), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_hooks_equal_the_exported_file_in_the_pipeline(layout, tmp_path):
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(tiny_pipe())
    loras = random_loras(backbone, patterns=(*backbone.default_targets, "text_encoder*_proj"))
    formats.save_lora(tmp_path / "me.safetensors", loras, {}, layout=layout, dtype=torch.float32)
    found = generate(backbone, [PROMPT] * 2, [1, 2], GenerateConfig(steps=4, guidance=3.0), personal=loras)
    plain = generate(backbone, [PROMPT] * 2, [1, 2], GenerateConfig(steps=4, guidance=3.0))
    pipe = tiny_pipe()
    pipe.load_lora_weights(str(tmp_path / "me.safetensors"))
    torch.testing.assert_close(found, through_pipe(pipe, [1, 2]), atol=5e-4, rtol=1e-3)
    assert (found - plain).abs().max() > 0.01


def test_branches_leave_out_what_weighs_nothing():
    assert branches(3.0, None) == [(-2.0, False, True), (3.0, True, True)]
    assert branches(1.0, None) == [(1.0, True, True)]
    assert branches(2.0, 2.0) == [(-1.0, False, False), (2.0, True, True)]
    assert branches(1.0, 2.0) == [(-1.0, True, False), (2.0, True, True)]
    assert len(branches(3.0, 2.0)) == 3
    for guidance in (1.0, 2.5, 7.0):
        for identity in (None, 0.0, 1.0, 3.0):
            assert sum(weight for weight, _, _ in branches(guidance, identity)) == pytest.approx(1)


def test_identity_guidance_of_zero_is_the_base_and_its_formula_holds(backbone):
    loras = random_loras(backbone)
    cond, empty = conditioning(backbone, 2), {k: v[2:3].expand(2, -1, -1) for k, v in conditioning(backbone, 3).items()}
    noise = noise_for(backbone, [3, 4])

    def run(**settings):
        return sampled(backbone, cond, empty, noise, steps=1, **settings)

    torch.testing.assert_close(run(personal=loras, guidance=2.0, identity_guidance=0.0), run(guidance=2.0), atol=1e-4, rtol=1e-3)
    # a single step is linear in the prediction
    base_empty, base = run(guidance=0.0), run(guidance=1.0)
    with applied(backbone.components, loras):
        person = run(guidance=1.0)
    expected = (1 - 2.0) * base_empty + (2.0 - 3.0) * base + 3.0 * person
    torch.testing.assert_close(run(personal=loras, guidance=2.0, identity_guidance=3.0), expected, atol=1e-3, rtol=1e-3)


def test_context_guidance_is_the_bases_own_direction_in_the_first_steps_and_plain_guidance_after(backbone):
    loras = random_loras(backbone)
    cond, empty = conditioning(backbone, 2), {k: v[2:3].expand(2, -1, -1) for k, v in conditioning(backbone, 3).items()}
    noise = noise_for(backbone, [3, 4])

    def run(personal=loras, **settings):
        return sampled(backbone, cond, empty, noise, steps=4, personal=personal, guidance=2.0, **settings)

    plain, whole, half = (run(context_guidance=3.0, context_until=until) for until in (0.0, 1.0, 0.5))
    assert torch.equal(plain, run())
    wanted = sampled(backbone, cond, empty, noise, steps=4, personal=loras, guidance=3.0, identity_guidance=1.0)
    torch.testing.assert_close(whole, wanted)
    assert not torch.allclose(half, plain, atol=1e-3)
    assert not torch.allclose(half, whole, atol=1e-3)
    assert torch.equal(run(personal=None, context_until=0.5), run(personal=None))
    with pytest.raises(InputError, match="context_until"):
        GenerateConfig(context_until=1.5)


def test_identity_guidance_ends_where_it_is_told(backbone, monkeypatch):
    loras = random_loras(backbone)
    cond, empty = conditioning(backbone, 2), {k: v[2:3].expand(2, -1, -1) for k, v in conditioning(backbone, 3).items()}
    noise = noise_for(backbone, [3, 4])
    sizes = []
    predict = backbone.predict
    monkeypatch.setattr(backbone, "predict", lambda x, *rest: sizes.append(len(x)) or predict(x, *rest))

    def run(**settings):
        sizes.clear()
        return sampled(backbone, cond, empty, noise, personal=loras, steps=4, guidance=3.0, **settings)

    part = run(identity_guidance=3.0, identity_until=0.5)
    assert sizes == [4, 4, 6, 6]  # two branches per sample while both scales are equal, then three
    whole, weak = run(identity_guidance=3.0), run(identity_guidance=1.0)
    torch.testing.assert_close(run(identity_guidance=3.0, identity_until=0.0), weak)
    torch.testing.assert_close(run(identity_guidance=0.5, identity_until=0.5), run(identity_guidance=0.5))
    assert (part - whole).abs().max() > 1e-3
    assert (part - weak).abs().max() > 1e-3
    plain = run()
    torch.testing.assert_close(run(identity_until=0.5), plain)
    pictures = [
        generate(
            backbone, [PROMPT], [1], GenerateConfig(steps=2, guidance=3.0, identity_guidance=scale, identity_until=until), personal=loras
        )
        for scale, until in ((3.0, 0.0), (1.0, 1.0), (3.0, 1.0))
    ]
    torch.testing.assert_close(pictures[0], pictures[1])
    assert (pictures[0] - pictures[2]).abs().max() > 1e-3
    with pytest.raises(InputError, match="identity_until"):
        GenerateConfig(identity_until=1.5)


def test_the_base_branch_of_identity_guidance_has_the_bases_prompt_too(backbone):
    person = random_loras(backbone, patterns=("text_encoder*_proj",))
    config = GenerateConfig(steps=2, guidance=2.0, identity_guidance=0.0)
    base = generate(backbone, [PROMPT], [1], config)
    torch.testing.assert_close(generate(backbone, [PROMPT], [1], config, personal=person), base, atol=1e-4, rtol=1e-3)
    config.identity_guidance = 1.0
    assert (generate(backbone, [PROMPT], [1], config, personal=person) - base).abs().max() > 0.01


def test_context_guidance_begins_with_the_bases_own_negative_prompt(backbone):
    person = random_loras(backbone, patterns=("text_encoder*_proj",))
    config = GenerateConfig(steps=2, guidance=2.0, negative="a hat", context_guidance=3.0, context_until=1.0)
    wanted = GenerateConfig(steps=2, guidance=3.0, negative="a hat", identity_guidance=1.0)
    found, expected = (generate(backbone, [PROMPT], [1], settings, personal=person) for settings in (config, wanted))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_picture_depends_on_its_own_seed_and_person_alone(backbone):
    loras = random_loras(backbone, batch=3)
    config = GenerateConfig(steps=2, identity_guidance=2.0, batch=2)
    together = generate(backbone, [PROMPT] * 3, [7, 8, 9], config, personal=loras)
    alone = generate(backbone, [PROMPT], [9], config, personal=loras.select(2))
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", schedulers(False))
def test_a_scheduler_that_adds_noise_draws_each_picture_from_its_own_seed(backbone, name):
    config = GenerateConfig(steps=4, scheduler=name)
    together = generate(backbone, [PROMPT] * 2, [7, 8], config)
    torch.testing.assert_close(together[1:], generate(backbone, [PROMPT], [8], config), atol=1e-3, rtol=1e-3)


def test_a_long_prompt_changes_no_picture_beside_it_and_all_come_in_the_order_given(backbone):
    long, people = " ".join(["face"] * 40), random_loras(backbone, 4, patterns=("*attn2.to_v", "text_encoder*_proj"))
    prompts, seeds, done = [PROMPT, long, PROMPT, "a face"], [7, 8, 9, 10], []
    config = GenerateConfig(steps=2, batch=2)
    together = generate(backbone, prompts, seeds, config, personal=people, on_picture=done.append)
    assert done == [2, 3, 4]
    for index in range(4):
        alone = generate(backbone, prompts[index : index + 1], seeds[index : index + 1], config, personal=people.select(index))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-3)


def test_styles_stay_in_every_branch(backbone):
    person, style = random_loras(backbone, seed=1), random_loras(backbone, seed=2)
    config = GenerateConfig(steps=2, guidance=2.0)
    summed = generate(backbone, [PROMPT], [1], config, personal=person + style.scaled(0.5))
    with merged(backbone.components, style.scaled(0.5)):
        apart = generate(backbone, [PROMPT], [1], config, personal=person)
    torch.testing.assert_close(apart, summed, atol=1e-4, rtol=1e-3)


def test_strength_scales_from_the_base(backbone):
    person = random_loras(backbone)
    base = generate(backbone, [PROMPT], [1], GenerateConfig(steps=2))
    none = generate(backbone, [PROMPT], [1], GenerateConfig(steps=2, strength=0.0), personal=person)
    torch.testing.assert_close(none, base, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler"])
def test_schedulers_by_name(backbone, scheduler):
    images = generate(backbone, [PROMPT], [1], GenerateConfig(steps=3, scheduler=scheduler))
    assert torch.isfinite(images).all()
    assert photos.to_images(images)[0].size == (64, 64)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler_ends_at_the_same_latents(backbone, scheduler):
    noise, prompts = noise_for(backbone, [1]), backbone.encode_prompts(["a face"])
    assert "clip_sample" not in backbone.pipe.scheduler.config  # DDIM's default would clip the latents to [-1, 1]
    fine = sampled(backbone, prompts, prompts, noise, steps=60, guidance=1.0)
    other = sampled(backbone, prompts, prompts, noise, steps=60, guidance=1.0, scheduler=scheduler)
    assert fine.abs().max() > 1
    assert (other - fine).abs().mean() < 0.1 * (fine - noise).abs().mean()


def test_bad_settings_raise(backbone):
    with pytest.raises(InputError, match="no scheduler"):
        generate(backbone, [PROMPT], [1], GenerateConfig(scheduler="NoSuchScheduler"))
    with pytest.raises(InputError, match="multiple of 8"):
        generate(backbone, [PROMPT], [1], GenerateConfig(width=63))
    with pytest.raises(InputError, match="PNDMScheduler can't take 3 steps"):
        generate(backbone, [PROMPT], [1], GenerateConfig(scheduler="PNDMScheduler", steps=3))
    with pytest.raises(InputError):
        GenerateConfig(steps=0)


def test_other_sizes(backbone):
    images = generate(backbone, [PROMPT], [1], GenerateConfig(steps=1, width=96, height=64))
    assert images.shape == (1, 3, 64, 96)


def test_pictures_that_are_none_are_named_and_never_given_out(backbone, monkeypatch):
    config = GenerateConfig(steps=1)
    wild = random_loras(backbone).map(lambda tensor: tensor * torch.inf)
    with pytest.raises(InputError, match="LoRA in it, gave values that aren't finite in float32"):
        generate(backbone, [PROMPT], [1], config, personal=wild)
    decode = backbone.decode_images
    monkeypatch.setattr(backbone, "decode_images", lambda latents: torch.zeros_like(decode(latents)))
    with pytest.raises(InputError, match="one color alone"):
        generate(backbone, [PROMPT], [1], config)
    monkeypatch.setattr(backbone, "decode_images", lambda latents: decode(latents) * torch.nan)
    with pytest.raises(InputError, match="the autoencoder gave values"):
        generate(backbone, [PROMPT], [1], config)


def test_an_autoencoder_that_overflows_in_half_precision_goes_on_in_float32(capsys):
    from hyperdreambooth.backbones import StableDiffusion

    half = StableDiffusion(tiny_pipe())
    half.pipe.vae.config.force_upcast = False
    vae = half.pipe.vae.to(torch.bfloat16)
    vae.decoder.register_forward_hook(lambda *call: call[-1] * (torch.nan if vae.dtype == torch.bfloat16 else 1.0))
    for said in (1, 0):
        assert torch.isfinite(generate(half, [PROMPT], [1], GenerateConfig(steps=1))).all()
        assert capsys.readouterr().err.count("overflowed in bfloat16") == said
        assert vae.dtype == torch.bfloat16


def test_merging_gives_what_hooks_give_and_puts_the_weights_back(backbone):
    person = random_loras(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.components.state_dict().items()}
    config = GenerateConfig(steps=2, guidance=2.0)
    one = generate(backbone, [PROMPT], [1], config, personal=person)  # with one person in the batch, the LoRA is merged into the weights
    batch = random_loras(backbone, seed=9).map(lambda tensor: tensor[None])
    two = LoraSet(
        {
            path: Lora(torch.cat([lora.down[None], batch[path].down]), torch.cat([lora.up[None], batch[path].up]))
            for path, lora in person.items()
        }
    )
    torch.testing.assert_close(generate(backbone, [PROMPT] * 2, [1, 2], config, personal=two)[:1], one, atol=1e-4, rtol=1e-3)

    def stumble() -> None:
        with merged(backbone.components, person):
            assert not all(torch.equal(tensor, before[name]) for name, tensor in backbone.components.state_dict().items())
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        stumble()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.components.state_dict().items())
