"""The five stages on a tiny base: they learn, resume, and have their documented properties."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hyperdreambooth.backbones import load_backbone
from hyperdreambooth.data import FolderOfPeople, IdentityData, PromptCache, load_identities
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Hooks, LoraSet, applied, find_targets, shared_norm, update_norms
from hyperdreambooth.objectives import denoising
from hyperdreambooth.pretrained import build, check_targets, load_hypernetwork
from hyperdreambooth.sampling import branches
from hyperdreambooth.settings import PersonalizeChoices, PersonalizeConfig, resolve
from hyperdreambooth.stages.dreambooth import Subject, finish, personalize, preoptimize, train_light
from hyperdreambooth.stages.train_hypernetwork import HyperNetworkLosses, IdentityGain, train_hypernetwork
from hyperdreambooth.tables import read_table, save_row
from hyperdreambooth.trainable_lora import LightweightLora
from hyperdreambooth.training import Run
from hyperdreambooth.training_settings import (
    LightweightConfig,
    NoiseLevels,
    PreoptimizeConfig,
    TrainHypernetworkConfig,
    TrainingConfig,
    TrainLightConfig,
)

from .conftest import DECODER, TOKENS, picture, random_loras, tiny_pipe, tiny_source

FROZEN = LightweightConfig(down_dim=12, up_dim=8)


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(backbone, loras, x, prompt="a [V] face"):
    generator = torch.Generator().manual_seed(7)
    cond = PromptCache(backbone)([prompt] * len(x))
    with torch.no_grad(), applied(backbone.components, loras):
        return denoising(backbone, x, cond, torch.full((len(x),), 0.6), generator).mean().item()


def test_personalizing_lowers_the_loss_and_people_do_not_affect_one_another(backbone):
    x = latents(3, 1)
    predicted = random_loras(backbone, batch=3, rank=1).scaled(0.01)
    config = PersonalizeConfig(steps=6, rank=2, learning_rate=2e-2)
    together, report = personalize(backbone, Subject(x, "a [V] face"), predicted, config, quiet=True)
    alone, _ = personalize(backbone, Subject(x[1:2], "a [V] face"), predicted.map(lambda t: t[1:2]), config, quiet=True)
    path = next(iter(together))
    torch.testing.assert_close(together.select(1)[path].delta(), alone.select(0)[path].delta(), atol=2e-5, rtol=1e-3)
    assert report.steps == 6
    one = x[1].repeat(4, 1, 1, 1)
    assert loss_of(backbone, together.select(1), one) < loss_of(backbone, predicted.select(1), one)


@pytest.mark.parametrize("stage", ["personalize", "preoptimize", "hypernetwork"])
def test_where_memory_is_short_activations_are_computed_again(stage, tmp_path, monkeypatch, capsys):
    """On a device whose memory ends at the third step: the same weights as with memory enough."""
    from hyperdreambooth.backbones import StableDiffusion

    def trained(folder) -> torch.Tensor:
        backbone, loop = StableDiffusion(tiny_pipe()), TrainingConfig(steps=4, learning_rate=1e-2, checkpoint_minutes=1e-9)
        if stage == "personalize":
            found, _ = personalize(backbone, Subject(latents(1, 1), "a [V] face"), None, PersonalizeConfig(steps=4, rank=2), quiet=True)
            return next(iter(found.values())).delta()
        if stage == "preoptimize":
            config = PreoptimizeConfig(lightweight=FROZEN, chunk=2, copies=2, training=loop)
            return torch.cat(list(dict(preoptimize(backbone, identity_data(2), config, folder)).values()))
        config = TrainHypernetworkConfig(lightweight=TOKENS, hypernetwork=DECODER, batch=4, training=loop)
        source, _ = train_hypernetwork(backbone, tiny_source(backbone).encoder, identity_data(), config, run=Run(folder))
        return source.hypernetwork.head.detach()

    enough, calls, plain = trained(tmp_path / "enough"), [], StableDiffusion.predict

    def predict(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled() and not self.denoiser.is_gradient_checkpointing)
        if calls[-1] and sum(calls) == 3:
            raise torch.OutOfMemoryError
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    torch.testing.assert_close(trained(tmp_path / "short"), enough, rtol=0, atol=0)
    assert "computed again" in capsys.readouterr().err
    assert sum(calls) == 3


@pytest.mark.parametrize(("people", "processes"), [(1, "2"), (2, "1")])
def test_short_memory_is_for_the_caller_where_people_can_part_or_processes_would_wait(people, processes, monkeypatch):
    from hyperdreambooth.backbones import StableDiffusion

    def predict(self, *args, **kwargs):
        assert not self.denoiser.is_gradient_checkpointing
        monkeypatch.setenv("WORLD_SIZE", processes)  # set earlier, it would start a process group
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    subject, config = Subject(latents(people, 1), "a [V] face"), PersonalizeConfig(steps=4, rank=2)
    backbone = StableDiffusion(tiny_pipe())
    with pytest.raises(torch.OutOfMemoryError):
        personalize(backbone, subject, None, config, quiet=True)


def test_zero_steps_keep_the_prediction_and_scratch_needs_steps(backbone):
    predicted = random_loras(backbone, batch=1)
    found, _ = personalize(backbone, Subject(latents(1, 1), "a face"), predicted, PersonalizeConfig(steps=0), quiet=True)
    assert all(torch.equal(found[p].up, predicted[p].up) for p in predicted)
    with pytest.raises(InputError, match="leave nothing"):
        personalize(backbone, Subject(latents(1, 1), "a face"), None, PersonalizeConfig(steps=0), quiet=True)


@pytest.mark.parametrize("order", ["residual", "merged"])
def test_only_the_chosen_layers_are_fine_tuned(backbone, order):
    predicted = random_loras(backbone, batch=2, rank=1).scaled(0.01)
    config = PersonalizeConfig(steps=2, rank=3, learning_rate=1e-2, order=order, targets=("*up_blocks*to_v", "*mid_block*"))
    found, _ = personalize(backbone, Subject(latents(2, 1), "a face"), predicted, config, quiet=True)
    assert found.keys() == predicted.keys()
    chosen = {path for path in predicted if ("up_blocks" in path and path.endswith("to_v")) or "mid_block" in path}
    assert 0 < len(chosen) < len(predicted)
    assert {path for path in predicted if (found[path].delta() - predicted[path].delta()).abs().max() > 0} == chosen


def test_people_s_predicted_text_encoders_differ_where_only_the_denoiser_is_fine_tuned(backbone):
    """A prompt that was encoded once would be everybody's."""
    predicted = random_loras(backbone, batch=2, rank=1, patterns=("unet*attn2.to_q", "text_encoder*q_proj"))
    config = PersonalizeConfig(steps=3, rank=2, learning_rate=1e-2, targets=("unet*",))
    x = latents(2, 1)
    together, _ = personalize(backbone, Subject(x, "a [V] face"), predicted, config, quiet=True)
    alone, _ = personalize(backbone, Subject(x[1:], "a [V] face"), predicted.select(slice(1, 2)), config, quiet=True)
    path = next(path for path in together if path.startswith("unet"))
    torch.testing.assert_close(together.select(1)[path].delta(), alone.select(0)[path].delta(), atol=2e-5, rtol=1e-3)


def test_layers_that_nobody_predicts_can_t_be_fine_tuned(backbone):
    predicted = random_loras(backbone, batch=1, rank=1)
    config = PersonalizeConfig(steps=1, targets=("*to_q", "unet.nowhere*"))
    for steps in (0, 1):
        with pytest.raises(InputError, match=r"'unet.nowhere\*' matches none"):
            personalize(backbone, Subject(latents(1, 1), "a face"), predicted, dataclasses.replace(config, steps=steps), quiet=True)


def test_finished_update_has_the_relaxed_rank(backbone):
    predicted = random_loras(backbone, batch=1, rank=1)
    found, _ = personalize(backbone, Subject(latents(1, 2), "a face"), predicted, PersonalizeConfig(steps=2, rank=3), quiet=True)
    merged = finish(found.select(0))
    assert max(lora.rank for lora in merged.values()) == 4
    for path in merged:
        torch.testing.assert_close(merged[path].delta(), found.select(0)[path].delta(), atol=1e-4, rtol=1e-3)


def test_fine_tuning_shows_itself_and_keeps_what_there_is_where_it_is_stopped(backbone):
    predicted = random_loras(backbone, batch=1, rank=1)
    shown = []

    def on_step(done, loras):
        shown.append(loras)
        return done == 2

    config = PersonalizeConfig(steps=5, rank=2)
    found, report = personalize(backbone, Subject(latents(1, 1), "a [V] face"), predicted, config, on_step=on_step, quiet=True)
    assert (report.steps, len(shown)) == (2, 2)
    path = next(iter(found))
    torch.testing.assert_close(found[path].delta(), shown[1][path].delta())
    assert not torch.equal(shown[0][path].delta(), shown[1][path].delta())
    assert not found[path].up.requires_grad


def test_prior_preservation_generates_its_own_pictures_and_changes_the_result(backbone):
    x, predicted = latents(1, 1), random_loras(backbone, batch=1, rank=1)
    plain, _ = personalize(backbone, Subject(x, "a [V] face"), predicted, PersonalizeConfig(steps=2), quiet=True)
    subject = Subject(x, "a [V] face")
    kept, _ = personalize(backbone, subject, predicted, PersonalizeConfig(steps=2, prior_pictures=2), quiet=True)
    assert subject.prior.shape == (2, 4, 8, 8)
    assert any(not torch.equal(plain[p].up, kept[p].up) for p in plain)


@pytest.mark.parametrize("targets", [(), ("unet*attn?.to_q", "text_encoder*q_proj")])
def test_train_light_with_and_without_the_text_encoder(targets, tmp_path):
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(tiny_pipe())
    x = latents(1, 2)
    training = TrainingConfig(steps=8, learning_rate=5e-2)
    config = TrainLightConfig(targets=targets, lightweight=FROZEN, training=training, levels=NoiseLevels(mean=0.5), prior_pictures=2)
    table, report = train_light(backbone, Subject(x, "a [V] face"), config, directory=tmp_path, quiet=True)
    loras = table(torch.tensor([0])).detach().select(0)
    assert report.finished
    assert all(lora.up.abs().max() > 0 for path, lora in loras.items() if "unet" in path)
    if targets:
        assert any(path.startswith("text_encoder") and lora.up.abs().max() > 0 for path, lora in loras.items())
    start = loras.scaled(0.0)
    assert loss_of(backbone, loras, x[0]) < loss_of(backbone, start, x[0])


def test_a_folder_goes_on_with_its_own_person_only(backbone, tmp_path):
    predicted = random_loras(backbone, batch=2, rank=1)
    light = TrainLightConfig(lightweight=FROZEN, training=TrainingConfig(steps=2))

    def tuned(seed: int = 0, prompt: str = "a [V] face", who: int = 0, **changes):
        subject, mine = Subject(latents(1, 1, seed=seed), prompt), predicted.select(slice(who, who + 1))
        config = PersonalizeConfig(**{"steps": 2, "rank": 2, **changes})
        return personalize(backbone, subject, mine, config, directory=tmp_path / "tuned", quiet=True)[1]

    assert tuned().steps == 2
    assert tuned(steps=4).steps == 4  # the same training, longer
    for other in ({"seed": 1}, {"prompt": "a smiling [V] face"}, {"who": 1}, {"learning_rate": 1e-2}, {"noise_mean": 0.0}):
        with pytest.raises(InputError, match="other photos or settings"):
            tuned(steps=4, **other)
    train_light(backbone, Subject(latents(1, 1), "a [V] face"), light, directory=tmp_path / "light", quiet=True)
    with pytest.raises(InputError, match="other photos or settings"):
        train_light(backbone, Subject(latents(1, 1, seed=1), "a [V] face"), light, directory=tmp_path / "light", quiet=True)


def test_a_hypernetwork_goes_on_with_its_own_people_only(backbone, tmp_path):
    encoder, data = tiny_source(backbone).encoder, identity_data(3)
    config = TrainHypernetworkConfig(lightweight=TOKENS, hypernetwork=DECODER, batch=2, training=TrainingConfig(steps=2))

    def trained(data: IdentityData, config: TrainHypernetworkConfig) -> int:
        return train_hypernetwork(backbone, encoder, data, config, run=Run(tmp_path, quiet=True))[1].steps

    trained(data, config)
    longer = dataclasses.replace(config, give_up=0.5, training=dataclasses.replace(config.training, steps=3))
    assert trained(data, longer) == 3
    others = dataclasses.replace(data, latents=data.latents + 1)
    for people, settings in ((others, config), (data, dataclasses.replace(config, penalty=0.0))):
        with pytest.raises(InputError, match="other photos or settings"):
            trained(people, settings)


def identity_data(people: int = 6, each: int = 2) -> IdentityData:
    count = people * each
    generator = torch.Generator().manual_seed(0)
    who = torch.arange(people).repeat_interleave(each)
    centres = torch.randn(people, 4, 8, 8, generator=generator)
    features = torch.randn(people, 4, 16, generator=generator)[who] + 0.1 * torch.randn(count, 4, 16, generator=generator)
    names = [f"person {i}" for i in range(people)]
    return IdentityData(
        centres[who] + 0.1 * torch.randn(count, 4, 8, 8, generator=generator),
        features,
        who,
        names,
        ["a [V] face"] * count,
        torch.ones(count, dtype=torch.bool),
    )


def test_preoptimized_rows_are_kept_and_independent_of_the_chunk(backbone, tmp_path, monkeypatch):
    data = identity_data(3)
    config = PreoptimizeConfig(
        lightweight=FROZEN, chunk=2, copies=2, training=TrainingConfig(steps=3, learning_rate=2e-2, max_grad_norm=0.0)
    )

    def stop_after_two(folder, name, *row):
        save_row(folder, name, *row)
        if name == "person 1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hyperdreambooth.stages.dreambooth.save_row", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            preoptimize(backbone, data, config, tmp_path / "a")
    rows = tmp_path / "a" / "rows"
    before = {file.name: file.read_bytes() for file in rows.iterdir()}
    assert len(before) == 2
    resumed = preoptimize(backbone, data, config, tmp_path / "a")
    assert all((rows / name).read_bytes() == content for name, content in before.items())
    whole = preoptimize(backbone, data, config, tmp_path / "b")
    assert list(resumed) == list(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    config.chunk = 3
    other = preoptimize(backbone, data, config, tmp_path / "c")
    for name in whole:
        # Adam's first steps amplify rounding errors of tiny gradients, so only the mean is compared
        assert (whole[name] - other[name]).abs().mean() < 5e-3 * whole[name].abs().mean()


def test_a_table_of_another_recipe_is_refused(backbone, tmp_path):
    config = PreoptimizeConfig(lightweight=FROZEN, training=TrainingConfig(steps=1))
    preoptimize(backbone, identity_data(2), config, tmp_path)
    with pytest.raises(InputError, match="fingerprint"):
        read_table(tmp_path, "another")
    with pytest.raises(InputError, match="frozen"):
        PreoptimizeConfig(lightweight=TOKENS)


@pytest.mark.parametrize("mode", ["pro", "faithful"])
def test_a_hypernetwork_learns_who_is_who(mode, tmp_path):
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(tiny_pipe())
    data = identity_data()
    # at 1e-2 without warm-up, rounding alone can make such a small training diverge
    training = TrainingConfig(steps=50, learning_rate=3e-3, warmup=10, cooldown=0.2, log_every=10)
    config = TrainHypernetworkConfig(
        mode=mode, lightweight=FROZEN, hypernetwork=DECODER, levels=NoiseLevels(mean=1.5), batch=8, penalty=0.0, training=training
    )
    table = None
    if mode == "faithful":
        light = LightweightLora(find_targets(backbone.components, backbone.default_targets), config.lightweight)
        table = {name: light.start() for name in data.names[:3]}
    encoder = tiny_source(backbone).encoder
    source, report = train_hypernetwork(backbone, encoder, data, config, run=Run(tmp_path), validation=data, table=table)
    gain = report.validations[-1]["identity_gain"]
    assert bool(list(source.lightweight.parameters())) == (mode == "pro")
    assert gain > 0.02
    untrained = IdentityGain(backbone, data, config.levels, PromptCache(backbone))
    before = build(dict(source.lightweight.targets), encoder, config.lightweight, DECODER)
    assert untrained(0, before)["identity_gain"] == pytest.approx(0, abs=1e-6)


def test_what_costs_gets_less(tmp_path):
    """What people share, and the norm of their updates; the optimizer is the shipped hypernetwork's."""
    from hyperdreambooth.backbones import StableDiffusion

    def trained(**prices: float) -> LoraSet:
        backbone, data = StableDiffusion(tiny_pipe()), identity_data()
        training = TrainingConfig(steps=24, optimizer="muon", learning_rate=3e-3, warmup=5)
        config = TrainHypernetworkConfig(
            lightweight=TOKENS, hypernetwork=DECODER, batch=8, training=training, **{"penalty": 0.0, "shared": 0.0, **prices}
        )
        source, _ = train_hypernetwork(backbone, tiny_source(backbone).encoder, data, config)
        return source(data.features.float()).detach()

    free, shared, small = trained(), trained(shared=1.0), trained(penalty=1.0)
    assert shared_norm(shared) < 0.2 * shared_norm(free)
    assert update_norms(small).mean() < 0.2 * update_norms(free).mean()


def test_what_people_share_takes_two_to_tell():
    with pytest.raises(InputError, match="batch of 2"):
        TrainHypernetworkConfig(batch=1)


def test_a_dropped_prompt_is_an_empty_one(tmp_path):
    from hyperdreambooth.backbones import StableDiffusion

    def trained(dropout: float, *, empty: bool = False) -> torch.Tensor:
        backbone, data = StableDiffusion(tiny_pipe()), identity_data()
        if empty:
            data.prompts = [""] * len(data.prompts)
        training = TrainingConfig(steps=2, learning_rate=3e-3, warmup=0)
        config = TrainHypernetworkConfig(lightweight=TOKENS, hypernetwork=DECODER, batch=8, dropout=dropout, training=training)
        source, _ = train_hypernetwork(backbone, tiny_source(backbone).encoder, data, config, run=Run(tmp_path / f"{dropout}{empty}"))
        return source(data.features.float())[next(iter(source.lightweight.targets))].up.detach()

    nothing_said = trained(0.0, empty=True)
    torch.testing.assert_close(trained(1.0), nothing_said)
    assert not torch.allclose(trained(0.0), nothing_said)
    assert not torch.allclose(trained(0.5), nothing_said)
    with pytest.raises(InputError, match="0 to 1"):
        TrainHypernetworkConfig(dropout=1.5)


def test_prompts_that_lose_the_name_keep_what_the_base_draws(backbone):
    def last_loss(text="a [V] face", start=None, steps=1, **changes: float) -> float:
        data, training = identity_data(1, 1), TrainingConfig(steps=steps, log_every=1, learning_rate=0.0)
        data.prompts = [text] * len(data.prompts)
        given = {"penalty": 0.0, "shared": 0.0, "dropout": 0.0, **changes}
        config = TrainHypernetworkConfig(lightweight=TOKENS, hypernetwork=DECODER, batch=8, training=training, **given)
        return train_hypernetwork(backbone, source.encoder, data, config, start=start)[1].losses[-1][1]

    source = tiny_source(backbone)
    assert last_loss(prior=1.0) < 1e-9, "a zero update must have no loss for prompts that name nobody"
    assert last_loss(prior=1.0, text="an ohwx face") < 1e-9
    assert 1e-9 < last_loss(prior=0.5) < last_loss()
    assert last_loss(prior=1.0, dropout=1.0) == last_loss(dropout=1.0), "empty prompts must be exempt from prior preservation"
    assert last_loss(prior=1.0, start=source, steps=2) > 1e-3, "an update that changes prompts without the name must have a loss"
    with pytest.raises(InputError, match="prior must lie in 0 to 1"):
        TrainHypernetworkConfig(prior=2.0)


def test_what_is_distilled_is_context_guidance(backbone):
    """An update that predicts the target draws by plain guidance what the teacher draws with context guidance, and with little noise what it
    draws by plain guidance; nobody, where nobody is named."""
    teacher = tiny_source(backbone)
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    config, prompts = TrainHypernetworkConfig(context_guidance=4.0, guidance=2.5), PromptCache(backbone)
    asked, empty = ["a [V] face wearing a hat", "", "a [V] face", "a face"], [""] * 4
    batch = {"latents": latents(4), "noise": latents(4, seed=1), "timesteps": backbone.steps_for(torch.tensor([0.9, 0.9, 0.3, 0.9]))}
    batch |= {"early": torch.tensor([True, True, False, True]), "named": torch.tensor([True, True, True, False])}
    batch |= {"photos": identity_data().features[:4], **prompts.inputs(asked, "prompt."), **prompts.inputs(empty, "empty.")}
    loras = teacher(batch["photos"]).detach()
    noisy = backbone.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    with Hooks(backbone.components, loras) as hooks, torch.no_grad():
        target = HyperNetworkLosses(backbone, config, teacher.lightweight, hooks, teacher).target(batch)
        found = {}
        for text, words in (("asked", asked), ("empty", empty)):
            for who, updates in (("person", loras), ("base", LoraSet())):
                hooks.set(updates)
                found[text, who] = backbone.predict(noisy, batch["timesteps"], prompts(words))
    assert (found["asked", "person"] - found["asked", "base"]).abs().max() > 1e-3
    plain = sum(weight * (target if prompted else found["empty", "person"]) for weight, prompted, _ in branches(2.5, None))
    mixed = branches(4.0, 1.0)
    guided = sum(weight * found["asked" if prompted else "empty", "person" if who else "base"] for weight, prompted, who in mixed)
    torch.testing.assert_close(plain[0], guided[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(target[1], found["empty", "person"][1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(target[2], found["asked", "person"][2])
    torch.testing.assert_close(target[3], found["asked", "base"][3])


def test_a_teacher_is_the_start_and_stays_as_it_is(backbone):
    teacher = tiny_source(backbone)
    for parameter in teacher.lightweight.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    training = TrainingConfig(steps=2, learning_rate=1e-4, log_every=1)
    config = TrainHypernetworkConfig(
        lightweight=FROZEN, hypernetwork=DECODER, batch=4, penalty=0.0, shared=0.0, context_guidance=3.0, training=training
    )
    late = dataclasses.replace(config, context_until=0.0)
    _, same = train_hypernetwork(backbone, teacher.encoder, identity_data(), late, start=teacher)
    assert same.losses[0][1] < 1e-9, "at low noise the starting hypernetwork must have no loss"
    nobody = dataclasses.replace(late, written=("a face",))
    _, other = train_hypernetwork(backbone, teacher.encoder, identity_data(), nobody, start=teacher)
    assert other.losses[0][1] > 1e-6, "for prompts that name nobody, the base's prediction must be the target"
    student, report = train_hypernetwork(backbone, teacher.encoder, identity_data(), config, start=teacher)
    assert report.losses[0][1] > 1e-6
    assert not torch.equal(student.hypernetwork.head, teacher.hypernetwork.head)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    with pytest.raises(InputError, match="--start"):
        train_hypernetwork(backbone, teacher.encoder, identity_data(), config)
    with pytest.raises(InputError, match="prompts in `written`"):
        TrainHypernetworkConfig(context_guidance=3.0, written=())


def photo_data(people: int = 4, each: int = 2) -> IdentityData:
    """The same, with pictures in place of features, as a trained encoder wants them."""
    data = identity_data(people, each)
    data.features = torch.randint(0, 256, (len(data.people), 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return data


def test_a_trained_encoder_learns_and_keeps_its_batch_statistics(backbone, tmp_path):
    config = TrainHypernetworkConfig(
        lightweight=FROZEN, hypernetwork=DECODER, batch=4, train_encoder=True, training=TrainingConfig(steps=3, learning_rate=1e-2)
    )
    encoder = tiny_source(backbone).encoder
    encoder.trained = True
    encoder.model.requires_grad_(True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    source, report = train_hypernetwork(backbone, encoder, photo_data(), config, run=Run(tmp_path), validation=photo_data())
    moved = {name for name, value in source.encoder.state_dict().items() if not torch.equal(value, before[name])}
    parameters = {name for name, _ in source.encoder.named_parameters()}
    assert moved
    assert moved <= parameters
    assert "identity_gain" in report.validations[-1]


def test_a_hypernetwork_goes_on_from_another_ones_weights(backbone):
    start = tiny_source(backbone)
    nothing = TrainHypernetworkConfig(
        lightweight=FROZEN, hypernetwork=DECODER, batch=4, training=TrainingConfig(steps=1, learning_rate=0.0)
    )
    source, _ = train_hypernetwork(backbone, start.encoder, identity_data(), nothing, start=start)
    for name, value in source.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name
    few = build(dict(list(source.lightweight.targets.items())[2:5]), start.encoder, TOKENS, DECODER)
    few.hypernetwork.head.data.normal_(generator=torch.Generator().manual_seed(3))
    more, _ = train_hypernetwork(backbone, start.encoder, identity_data(), dataclasses.replace(nothing, lightweight=TOKENS), start=few)
    assert torch.equal(more.hypernetwork.head[2:5], few.hypernetwork.head), "a layer must get its own weights, whatever its index"
    told = {path for path, lora in more(identity_data().features[:2]).items() if lora.up.any()}
    assert told == set(few.lightweight.targets), "new layers must start with zero updates"
    with pytest.raises(InputError, match="other layers or sizes"):
        train_hypernetwork(backbone, start.encoder, identity_data(), dataclasses.replace(nothing, targets=("*attn1.to_q",)), start=start)
    nothing.lightweight = LightweightConfig(down_dim=11, up_dim=8, learnable=True)
    with pytest.raises(InputError, match="other layers or sizes"):
        train_hypernetwork(backbone, start.encoder, identity_data(), nothing, start=start)


def test_fine_tuning_draws_its_noise_as_it_was_told(backbone, monkeypatch):
    drawn = []
    draw = NoiseLevels.draw
    monkeypatch.setattr(NoiseLevels, "draw", lambda self, *args: drawn.append(draw(self, *args)) or drawn[-1])
    predicted = random_loras(backbone, batch=1, rank=1)
    for told in ({}, {"noise_mean": -3.0}, {"noise_std": 0.25}):
        config = PersonalizeConfig(steps=4, **told)
        personalize(backbone, Subject(latents(1, 1), "a [V] face"), predicted, config, quiet=True)
    general, low, narrow = (torch.cat(drawn[i : i + 4]).logit() for i in (0, 4, 8))
    assert general.mean() - low.mean() == pytest.approx(4.5, abs=1e-3)  # the default mean is 1.5
    torch.testing.assert_close(narrow - 1.5, (general - 1.5) / 4, atol=1e-3, rtol=1e-3)
    assert resolve(PersonalizeConfig, ("hypernetwork", {"noise_mean": 0.5})).noise_mean == 0.5


def test_a_step_sees_as_many_copies_as_it_was_told(backbone, monkeypatch):
    drawn = []
    draw = NoiseLevels.draw
    monkeypatch.setattr(NoiseLevels, "draw", lambda self, *args: drawn.append(args[0]) or draw(self, *args))
    predicted = random_loras(backbone, batch=1, rank=1)
    for config in (
        PersonalizeConfig(steps=1),
        PersonalizeConfig(steps=1, copies=3),
        resolve(PersonalizeConfig, ("given", PersonalizeChoices(steps=1)), ("hypernetwork", {"copies": 8})),
    ):
        personalize(backbone, Subject(latents(1, 1), "a [V] face"), predicted, config, quiet=True)
    assert drawn == [4, 3, 8]  # the default is 4; explicit settings and the hypernetwork's default override it
    with pytest.raises(InputError, match="copies must be at least 1"):
        PersonalizeConfig(copies=0)


@pytest.mark.parametrize("kind", [PersonalizeConfig, TrainLightConfig, PreoptimizeConfig])
def test_no_copies_and_fewer_than_no_prior_pictures_are_refused(kind):
    with pytest.raises(InputError, match="copies must be at least 1, not 0"):
        kind(copies=0)
    if kind is not PreoptimizeConfig:  # it has no prior preservation
        with pytest.raises(InputError, match="prior_pictures must be at least 0, not -1"):
            kind(prior_pictures=-1)


def test_every_photo_is_trained_under_its_own_words(backbone):
    """Two people under different words get what each gets alone; so do two photos of one person."""
    x = latents(2, 1)
    predicted = random_loras(backbone, batch=2, rank=1).scaled(0.01)
    config = PersonalizeConfig(steps=3, rank=2, learning_rate=2e-2)
    words = [["a [V] face on a blue background"], ["a smiling [V] face"]]
    together, _ = personalize(backbone, Subject(x, words), predicted, config, quiet=True)
    for person in range(2):
        alone, _ = personalize(
            backbone, Subject(x[person : person + 1], words[person][0]), predicted.select(slice(person, person + 1)), config, quiet=True
        )
        for path in together:
            torch.testing.assert_close(together[path].delta()[person], alone[path].delta()[0], atol=2e-5, rtol=1e-3)
    swapped, _ = personalize(backbone, Subject(x, words[::-1]), predicted, config, quiet=True)
    assert any(not torch.allclose(swapped[path].delta(), together[path].delta(), atol=1e-4) for path in together)
    assert Subject(latents(1, 2), [["one", "two"]]).texts(1) == ["two"]


def test_faithful_without_a_table_is_refused(backbone):
    config = TrainHypernetworkConfig(mode="faithful", lightweight=FROZEN, hypernetwork=DECODER)
    with pytest.raises(InputError, match="preoptimize"):
        train_hypernetwork(backbone, tiny_source(backbone).encoder, identity_data(), config)


def test_pairs_are_two_pictures_of_one_person():
    data = identity_data(4, 3)
    data.reference[1::3] = False
    chosen = torch.arange(12)
    other = data.pair(chosen, torch.Generator().manual_seed(0))
    assert torch.equal(data.people[chosen], data.people[other])
    assert (chosen != other).all()
    assert data.reference[other].all()
    kept, held = data.split(1)
    assert kept.names == data.names[:3]
    assert held.names == data.names[3:]
    assert held.people.tolist() == [0, 0, 0]


def test_a_trained_encoder_gets_the_pictures_of_a_folder(backbone, people, tmp_path):
    encoder = tiny_source(backbone).encoder
    frozen = load_identities(people, backbone, encoder, "a [V] face", cache=tmp_path)
    encoder.trained = True
    data = load_identities(people, backbone, encoder, "a [V] face", cache=tmp_path)
    assert data.features.shape == (5, 3, 64, 64)
    assert data.features.dtype == torch.uint8
    with torch.no_grad():
        seen = encoder(data.inputs(torch.arange(5)))
    torch.testing.assert_close(seen, frozen.inputs(torch.arange(5)), atol=0.05, rtol=0.05)  # tolerance for rounding of 8-bit pictures


def test_notes_on_pictures_of_a_folder_are_counted(backbone, tmp_path, capsys):
    for name in ("anna", "bob"):
        picture(1).save(tmp_path / f"{name}.gif", save_all=True, append_images=[picture(2)])
    picture().save(tmp_path / "cyd.png")
    load_identities(tmp_path, backbone, None, "a face", crop="center")
    assert "2 pictures: took the first of 2 frames.\n" in capsys.readouterr().err
    FolderOfPeople(tmp_path, backbone, "center").latents_of(["anna", "cyd"])
    assert "1 picture: took the first of 2 frames.\n" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_world")
def test_a_cache_is_of_one_precision_and_of_crops_with_or_without_opencv(people, tmp_path, monkeypatch):
    for there in (None, object()):
        monkeypatch.setattr("hyperdreambooth.data.find_spec", lambda name, there=there: there)
        for dtype in (torch.float32, torch.bfloat16):
            data = load_identities(people, load_backbone("toon", dtype=dtype), None, "a face", cache=tmp_path)
            assert data.latents.dtype == dtype
    assert len(list(tmp_path.glob("identities-*"))) == 4


def test_folders_are_encoded_once_and_broken_pictures_skipped(backbone, people, tmp_path, capsys):
    (people / "bob" / "broken.png").write_bytes(b"no picture")
    data = load_identities(people, backbone, None, "a [V] face", cache=tmp_path / "cache")
    assert data.names == ["ann", "bob", "cyd", "dan"]
    assert len(data.latents) == 5
    said = capsys.readouterr().err
    assert "broken.png" in said
    assert "1 of 6" in said
    again = load_identities(people, backbone, None, "a [V] face", cache=tmp_path / "cache")
    assert torch.equal(again.latents, data.latents)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for file in people.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 6"):
        load_identities(people, backbone, None, "a [V] face")


def test_a_hypernetwork_survives_the_disk_and_refuses_another_base(backbone, world, tmp_path):
    source, info = load_hypernetwork(world / "hypernetwork", backbone)
    from hyperdreambooth.photos import to_tensor

    pixels = to_tensor([picture().resize((64, 64))])
    with torch.no_grad():
        torch.testing.assert_close(source.tokens(pixels), tiny_source(backbone).tokens(pixels), atol=1e-5, rtol=1e-4)
    assert source.lightweight.fingerprint() == tiny_source(backbone).lightweight.fingerprint()
    assert info.mode == "pro"
    shapes = dict(source.lightweight.targets)
    with pytest.raises(InputError, match="another base"):
        check_targets({**shapes, "unet.nowhere": next(iter(shapes.values()))}, backbone, "it")
    with pytest.raises(InputError, match="isn't a hypernetwork"):
        load_hypernetwork(tmp_path)


def test_prompts_are_encoded_once_unless_the_text_encoder_is_trained(backbone):
    cache = PromptCache(backbone)
    first = cache(["a face", "a [V] face", "a face"])["encoder_hidden_states"]
    assert torch.equal(first[0], first[2])
    assert len(cache.known) == 2
    trained = PromptCache(backbone, trains_text=True)
    torch.testing.assert_close(trained(["a face"])["encoder_hidden_states"], first[:1])
    assert not trained.known


def test_noise_levels_mean_the_same_for_every_schedule(backbone):
    from hyperdreambooth.backbones import StableDiffusion

    epsilon = StableDiffusion(tiny_pipe("epsilon"))
    levels = torch.tensor([0.05, 0.3, 0.6, 0.9])
    for model in (backbone, epsilon):
        steps = model.steps_for(levels)
        alpha = model.schedule.alphas_cumprod[steps]
        found = (1 - alpha).sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())
        torch.testing.assert_close(found.float(), levels, atol=0.02, rtol=0.05)
    assert backbone.steps_for(torch.tensor([1.0])).item() == 999
    drawn = NoiseLevels(mean=1.5).draw(2000, torch.Generator().manual_seed(0))
    assert 0.7 < drawn.median() < 0.9
    assert NoiseLevels(uniform=1.0).draw(2000, torch.Generator().manual_seed(0)).mean() == pytest.approx(0.5, abs=0.03)


def test_checkpointing_a_frozen_model_changes_nothing():
    from hyperdreambooth.backbones import StableDiffusion

    results = []
    for checkpointing in (False, True):
        backbone = StableDiffusion(tiny_pipe())
        if checkpointing:
            backbone.denoiser.enable_gradient_checkpointing()
            calls = []
            block = backbone.components["unet"].up_blocks[1].resnets[0]
            block.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        predicted = random_loras(backbone, batch=1, rank=1)
        found, _ = personalize(backbone, Subject(latents(1, 1), "a [V] face"), predicted, PersonalizeConfig(steps=2), quiet=True)
        results.append(found)
    assert len(calls) == 4  # two steps, each with its forward pass computed twice
    for path in results[0]:
        torch.testing.assert_close(results[0][path].up, results[1][path].up, atol=1e-6, rtol=1e-5)


def test_several_photos_are_averaged_as_tokens_and_all_fine_tuned_on(backbone, tmp_path, monkeypatch):
    from hyperdreambooth.api import HyperDreamBooth
    from hyperdreambooth.stages import dreambooth

    from .conftest import picture, tiny_source

    hdb = HyperDreamBooth(backbone, "toon", tiny_source(backbone))
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for index, file in enumerate(files):
        picture(index).save(file)
    pixels, _ = hdb.read_photos(files)
    alone = torch.stack([hdb.predict(photo[None]) for photo in pixels])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(hdb.predict(pixels), alone.mean(0))
    seen, real = [], dreambooth.denoising_loss

    def watched(backbone, latents, *args):
        seen.append(latents)
        return real(backbone, latents, *args)

    monkeypatch.setattr(dreambooth, "denoising_loss", watched)
    hdb.personalize(files, steps=3, copies=1, quiet=True)
    photos = backbone.encode_images(pixels)
    distances = torch.cdist(torch.cat(seen).flatten(1), photos.flatten(1))
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2]  # in as many steps as there are photos, each photo is used once
    assert distances.min(1).values.max() < 1e-4
