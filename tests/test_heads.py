"""The heads world: reproducible renders, the effect of contexts, the rasterizer against its definition, and the gates' arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.errors import InputError
from hyperdreambooth.evaluation.judges import Judge
from worlds.autoencoder import Autoencoder
from worlds.heads import PLAIN, Context, caption, context, contexts, gates, hair, person, pictures, raster, render, renderer, skin, train
from worlds.heads.contexts import EXPRESSIONS, EYEWEAR, HEADWEAR, LIGHTS, STYLES
from worlds.heads.head import EYE, LASH, SKIN, load
from worlds.heads.people import STYLES_MEN, STYLES_WOMEN
from worlds.heads.shade import CLOTH, HAIR
from worlds.heads.wear import headwear


def small(one, where: Context) -> np.ndarray:
    return render(one, where, 64).astype(int)


def seen(scene, without: int = 255) -> np.ndarray:
    """The triangle that each of 128 x 128 pixels shows, -1 for none; `without` leaves a material out."""
    screen = np.empty((len(scene.points), 3), np.float32)
    lens = np.float32(renderer.DISTANCE), np.float32(renderer.DISTANCE / renderer.SPAN)
    raster.camera_screen(scene.points, len(screen), *lens, renderer.CENTER, 128, screen)
    kept = np.flatnonzero(scene.materials != without)  # the removed triangles are behind the closed part of the head
    depth, owner = np.full((128, 128), raster.EMPTY), np.full((128, 128), -1, np.int32)
    faces = np.ascontiguousarray(scene.triangles[kept])
    raster.rasterize(screen, faces, len(kept), scene.closed, depth, owner, np.empty((128, 128, 2), np.float32))
    return np.where(owner < 0, -1, kept[owner])


def test_a_picture_depends_on_its_person_and_context_alone():
    first = render(person(5), context(9))
    assert first.shape == (128, 128, 3)
    assert first.dtype == np.uint8
    render(person(6), context(10))
    renderer.prepared.cache_clear()
    renderer.grown.cache_clear()
    person.cache_clear()
    np.testing.assert_array_equal(render(person(5), context(9)), first)
    assert np.abs(render(person(6), context(9)).astype(int) - first).mean() > 3
    assert np.abs(render(person(5, world=1), context(9)).astype(int) - first).mean() > 3


def test_worlds_are_spread_over_sex_age_and_skin():
    people = [person(k) for k in range(400)]
    assert 0.43 < np.mean([one.sex == "woman" for one in people]) < 0.57
    tones = np.array([one.tone for one in people])
    assert all(0.27 < ((tones >= low) & (tones < low + 3)).mean() < 0.40 for low in (1, 4, 7))
    ages = np.array([one.age for one in people])
    assert ages.min() >= 18
    assert (ages < 35).mean() > 0.25
    assert (ages >= 55).mean() > 0.12
    brightness = np.array([one.skin.mean() for one in people])
    assert np.corrcoef(tones, brightness)[0, 1] < -0.9
    assert {one.style for one in people} == set(STYLES_MEN) | set(STYLES_WOMEN)
    assert all(one.beard == "none" for one in people if one.sex == "woman")


def test_identity_modes_move_the_head_by_their_weights():
    one = person(3)
    plain = replace(one, modes=np.zeros(100, np.float32), stretch=np.ones(3, np.float32), lids=(0.0, 0.0))
    moved = replace(plain, modes=np.eye(100, dtype=np.float32)[2])
    face = (load().kind == SKIN) & (load().mean[:, 1] > -8)
    difference = renderer.neutral(moved) - renderer.neutral(plain)
    np.testing.assert_allclose(difference[face], load().identities[2][face], atol=1e-4)


def test_the_head_turns_as_asked():
    nose = int(np.argmax(load().mean[:, 2]))
    places = {yaw: renderer.build(person(2), replace(PLAIN, yaw=yaw)).points[nose] for yaw in (-40.0, 0.0, 40.0)}
    assert places[-40.0][0] < -5
    assert abs(places[0.0][0]) < 0.5
    assert places[40.0][0] > 5
    up, down = (renderer.build(person(2), replace(PLAIN, pitch=pitch)).points[nose, 1] for pitch in (15.0, -15.0))
    assert up > down + 3


@pytest.mark.parametrize("expression", [name for name in EXPRESSIONS if name != "neutral"])
def test_expressions_move_the_face_and_leave_the_crown(expression):
    before, after = (
        renderer.build(person(2), replace(PLAIN, expression=name)).points[: len(load().mean)] for name in ("neutral", expression)
    )
    moved = np.linalg.norm(after - before, axis=1)
    assert moved.max() > 0.25
    assert moved[load().mean[:, 1] > 13].max() < 0.05


def test_light_has_a_side_and_a_strength():
    bald = replace(person(2), style="bald", scalp_cover=0.0)
    pictures = {light: small(bald, replace(PLAIN, light=light)) for light in LIGHTS}
    face = slice(24, 44), slice(22, 42)
    means = {light: picture[face].mean() for light, picture in pictures.items()}
    assert means["night"] < 0.75 * means["studio"]
    sun = pictures["sun"][face].mean((0, 2))
    assert sun[-8:].mean() > sun[:8].mean() + 15  # the sun shines from the right side of the picture
    lamp = pictures["lamp"][face].mean((0, 1))
    assert lamp[0] - lamp[2] > 15 + pictures["studio"][face].mean((0, 1))[0] - pictures["studio"][face].mean((0, 1))[2]


def test_a_hat_shades_and_the_head_shades_the_neck():
    one = replace(person(2), style="bald", scalp_cover=0.0)
    face = slice(26, 31), slice(26, 38)
    hat, none = (small(one, replace(PLAIN, headwear=name)) for name in ("straw hat", "none"))
    assert hat[face].mean() < none[face].mean() - 4


@pytest.mark.parametrize("name", HEADWEAR[1:])
def test_things_on_the_head_change_the_top_of_the_picture_alone(name):
    one = replace(person(2), style="buzz")
    changed = np.abs(small(one, replace(PLAIN, headwear=name, headwear_color="teal")) - small(one, PLAIN)).mean(-1)
    assert changed[:26].mean() > 3 or name == "headphones"
    assert changed.max() > 30
    if name != "headscarf":  # a headscarf also covers the neck
        assert changed[48:, 24:40].mean() < 4


@pytest.mark.parametrize("name", EYEWEAR[1:])
def test_glasses_sit_on_the_eyes(name):
    one = replace(person(2), style="buzz")
    changed = np.abs(small(one, replace(PLAIN, eyewear=name)) - small(one, PLAIN)).mean(-1)
    rows = changed.sum(1)
    assert rows[22:36].sum() > 0.8 * rows.sum() > 0


def test_hair_styles_are_all_different():
    pictures = [small(replace(person(2), style=style, scalp_cover=0.9), PLAIN) for style in hair.STYLES]
    for k, one in enumerate(pictures):
        for other in pictures[:k]:
            assert np.abs(one - other).mean() > 0.2


def test_hair_stays_out_of_the_face():
    open_face = slice(30, 40), slice(28, 37)
    for style in ("long", "bob", "wavy", "side part", "bun"):
        one = replace(person(2), style=style, hair_color=np.array([0.0, 0.6, 0.0]), brow_color=np.zeros(3), scalp_cover=0.9)
        patch = small(one, PLAIN)[open_face]
        assert (patch[..., 1] > patch[..., 0] + 20).mean() < 0.05, style


@pytest.mark.parametrize("style", ["long", "long fringe", "wavy", "bob"])
@pytest.mark.parametrize("yaw", [-50, 50])
def test_hair_leaves_the_eyes_and_cheeks_of_a_turned_head_free(style, yaw):
    scene = renderer.build(replace(person(26), style=style), replace(PLAIN, yaw=yaw))
    head = load()
    middle = head.mean[head.triangles].mean(1)
    face = (np.abs(middle[:, 0]) < 5.5) & (np.abs(middle[:, 1] + 0.5) < 5) & (middle[:, 2] > 4)
    bare, full = seen(scene, HAIR), seen(scene)
    bare_face = (bare >= 0) & (bare < len(face)) & face[np.clip(bare, 0, len(face) - 1)]
    assert bare_face.sum() > 500
    assert (scene.materials[full[bare_face]] == HAIR).mean() < 0.01


def test_a_cap_covers_hair():
    for yaw in (-40, 40):
        scene = renderer.build(replace(person(26), style="wavy"), replace(PLAIN, headwear="cap", yaw=yaw))
        bare, full = seen(scene, HAIR)[:50], seen(scene)[:50]
        cap = (bare >= 0) & (scene.materials[bare] == CLOTH)
        assert (scene.materials[full[cap]] == HAIR).mean() < 0.02


@pytest.mark.parametrize("k", [5, 315])  # an afro; an asymmetric skull
def test_heads_stay_inside_their_caps(k):
    scene = renderer.build(person(k), replace(PLAIN, headwear="cap"))
    shown = scene.materials[seen(scene)[20:64, 64]]
    assert shown[0] == CLOTH
    assert not (shown[np.argmax(shown == SKIN) :] == CLOTH).any()


@pytest.mark.parametrize("name", ["beanie", "cap", "top hat", "headscarf"])
def test_what_is_worn_is_lit_from_outside(name):
    """Shadows are looked up a little outside a surface, so that normals must point there."""
    meshes = headwear(person(2), replace(PLAIN, headwear=name), renderer.prepared(person(2))[0])
    outwards = meshes[0].points - hair.CENTER
    normals = np.empty_like(outwards)
    raster.vertex_normals(meshes[0].points, meshes[0].triangles, normals)
    assert ((normals * outwards).sum(1) >= 0).mean() > 0.9


def test_a_closed_eye_is_lid_and_lashes():
    for k in (14, 25):
        scene = renderer.build(person(k), replace(PLAIN, expression="wink"))
        owner = seen(scene)[:, 64:]  # the head's left eye
        shown = set(scene.materials[owner[owner >= 0]])
        assert LASH in shown
        assert EYE not in shown


def test_styles_keep_the_picture_and_lose_color():
    one = person(2)
    photo = small(one, PLAIN)
    for style in STYLES[1:]:
        drawn = small(one, replace(PLAIN, style=style))
        gray = np.corrcoef(drawn.mean(-1).ravel(), photo.mean(-1).ravel())[0, 1]
        assert gray > 0.4, style
        assert np.abs(drawn - photo).mean() > 2
        colorful = np.ptp(drawn, axis=-1).mean()
        assert colorful < 12 if style != "oil" else colorful > 12


def test_what_a_context_cannot_be_is_said():
    with pytest.raises(InputError, match=r"headwear='crown' is not known.*beanie"):
        Context(headwear="crown")
    with pytest.raises(InputError, match="too large; up to 50 and 20 degrees"):
        Context(yaw=51)
    with pytest.raises(InputError, match=r"no \['hat'\]; it has"):
        context(1, hat="cap")
    assert context(4, yaw=10.0).yaw == 10
    assert replace(context(4, yaw=10.0), yaw=context(4).yaw) == context(4)


def test_captions_tell_the_context():
    where = Context(
        expression="smile",
        yaw=40,
        light="lamp",
        headwear="cap",
        headwear_color="blue",
        eyewear="sunglasses",
        background="beach",
        style="oil",
    )
    text = caption(person(2), where, np.random.default_rng(0), looks=0.0)
    for words in (
        "an oil painting of a " + person(2).sex,
        "a blue cap",
        "sunglasses",
        "smiling",
        "turned far to the right",
        "lamp",
        "at the beach",
    ):
        assert words in text
    told = [caption(person(k), PLAIN, np.random.default_rng(k), looks=1.0) for k in range(60)]
    assert sum("hair" in one for one in told) > 20
    assert all("hair" not in caption(person(k), PLAIN, np.random.default_rng(k), looks=0.0) for k in range(20))


def test_the_rasterizer_covers_what_triangles_cover():
    generator = np.random.default_rng(3)
    screen = generator.uniform(0, 24, (30, 3)).astype(np.float32)
    triangles = np.arange(30, dtype=np.int32).reshape(10, 3)
    depth, owner = np.full((24, 24), raster.EMPTY), np.full((24, 24), -1, np.int32)
    weights = np.zeros((24, 24, 2), np.float32)
    raster.rasterize(screen, triangles, 10, 0, depth, owner, weights)
    nearest, who = np.full((24, 24), np.inf), np.full((24, 24), -1)
    centers = np.stack(np.meshgrid(np.arange(24) + 0.5, np.arange(24) + 0.5), -1)
    for t, corners in enumerate(screen[triangles].astype(np.float64)):
        a, b, c = corners
        solved = np.linalg.solve(np.stack([b - a, c - a], 1)[:2], (centers - a[:2]).reshape(-1, 2).T).T.reshape(24, 24, 2)
        z = a[2] + solved @ np.array([b[2] - a[2], c[2] - a[2]])
        inside = (solved.min(-1) >= 0) & (solved.sum(-1) <= 1) & (z < nearest)
        nearest, who = np.where(inside, z, nearest), np.where(inside, t, who)
    assert (who >= 0).sum() > 200
    assert (who == owner).mean() > 0.99  # pixels at edges may differ by rounding
    same = who == owner
    np.testing.assert_allclose(depth[same & (who >= 0)], nearest[same & (who >= 0)], atol=1e-3)
    shadow = np.full((24, 24), raster.EMPTY)
    raster.rasterize_depth(screen, triangles, 10, 0, shadow)
    np.testing.assert_allclose(shadow, depth, rtol=1e-4)
    backs = np.full((24, 24), -1, np.int32)
    raster.rasterize(screen, triangles, 10, 10, np.full((24, 24), raster.EMPTY), backs, weights)
    a, b, c = (screen[triangles[:, k], :2] for k in range(3))
    towards = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0] < 0
    assert set(np.unique(backs[backs >= 0])) <= set(np.flatnonzero(towards))


def test_skin_is_painted_where_it_belongs():
    one = replace(person(2), beard_cover=(1.0, 1.0, 1.0), hair_color=np.array([0.0, 1.0, 0.0]), scalp_cover=1.0, style="buzz")
    painted = skin.texture(one)
    at = skin.regions()
    hairy = painted[..., 3]
    assert hairy[at[skin.SCALP] > 3.5].min() > 0.9
    assert hairy[(at[skin.BEARD] > 0.9)].mean() > 0.9
    nose = at[skin.NOSE] > 0.9
    assert hairy[nose].max() < 0.1


def test_a_crowd_is_a_hundred_and_a_missing_face_is_a_miss():
    generator = np.random.default_rng(0)
    gallery = [generator.normal(size=128) for _ in range(200)]
    found = [one + 0.01 for one in gallery]
    assert all(gates.rank_one(gallery, found))
    found[3], found[4] = None, gallery[5]
    gallery[7] = None
    found[150] = gallery[20]  # an identical face in another crowd must not count as an error
    gallery[150] = gallery[20]
    right = gates.rank_one(gallery, found)
    assert [k for k, yes in enumerate(right) if not yes] == [3, 4, 7]
    assert {kind: gates.query(kind, 1).expression for kind in ("smile", "surprise")} == {"smile": "smile", "surprise": "surprise"}
    assert gates.query("turned", 1).yaw == 30
    assert max(abs(gates.query("hat", k).yaw) for k in range(40)) <= 20


def test_principal_components_rebuild_what_lies_in_their_span():
    generator = np.random.default_rng(2)
    basis = generator.uniform(0, 60, (10, 16, 16, 3))
    weights = generator.uniform(0, 0.4, (24, 8, 8, 10))
    pictures = np.einsum("nijk,kabc->niajbc", weights, basis).reshape(24, 128, 128, 3).round().astype(np.uint8)
    psnr = gates.linear_reconstruction(pictures, 4)
    assert psnr["8 x 8 x 64"] > 50  # ten directions span these pictures, except for rounding
    noise = generator.integers(0, 256, (24, 128, 128, 3)).astype(np.uint8)
    assert gates.linear_reconstruction(noise, 4)["8 x 8 x 64"] < 15


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A shard of four people for each split."""
    monkeypatch.setattr(pictures, "PEOPLE", 4)
    for split in pictures.FIRST:
        pictures.draw(tmp_path / "pictures", split, 0)
    return tmp_path


def test_shards_hold_what_their_names_say(few):
    file = pictures.shard_file(few / "pictures", "test", 0)
    before = file.stat().st_mtime_ns
    assert pictures.draw(few / "pictures", "test", 0) == file
    assert file.stat().st_mtime_ns == before  # the existing file must be kept
    data = pictures.Pictures.load(few / "pictures", "test")
    assert len(data) == 4 * pictures.EACH
    index = 2 * pictures.EACH + 3
    assert data.person(index).seed == 2_000_002
    np.testing.assert_array_equal(data[np.array([index])][0], render(data.person(index), data.context(index)))
    with pytest.raises(SystemExit, match="no pictures of train"):
        pictures.Pictures.load(few, "train")


def test_photos_look_ahead_and_hypernetworks_see_seen_contexts_alone():
    for k in range(0, 300, pictures.EACH):
        photos = [pictures.context_of(k), pictures.context_of(k + 1)]
        assert all(one.style == "photo" and one.headwear == "none" and abs(one.yaw) <= 15 for one in photos)
        assert all(pictures.is_seen(one) for one in (*photos, pictures.context_of(k + 2)))
    assert not all(pictures.is_seen(pictures.context_of(k)) for k in range(3, 300, pictures.EACH))
    assert len({pictures.context_of(k) for k in range(100)}) == 100


def test_the_tokenizer_knows_every_word_of_captions_and_none_is_cut_off():
    tokenizer = train.Heads().tokenizer()
    generator = np.random.default_rng(0)
    told = [caption(person(k), context(k), generator, looks=0.9) for k in range(300)]
    told += [caption(person(k), context(k), generator, subject="a [V] face") for k in range(50)]
    told += ["".join(slot[k % len(slot)] for slot in contexts.slots()) for k in range(12)]
    for text in told:
        assert len(tokenizer(text).input_ids) <= train.LENGTH
        assert all(token.endswith("</w>") or token == "[V]" for token in tokenizer.tokenize(text)), text
    assert all("[V]" in text for text in told[300:])


def test_classes_say_what_captions_say():
    for k in range(200):
        one = context(k)
        classes = contexts.classified(one)
        assert all(classes[kind] in names for kind, names in contexts.classes().items())
        text = caption(person(1), one, np.random.default_rng(k))
        assert ("far to the" in text) == classes["pose"].startswith("far")
        assert ("to the left" in text) == classes["pose"].endswith("left")
        assert ("to the right" in text) == classes["pose"].endswith("right")


class TinyHeads(train.Heads):
    autoencoder = Autoencoder(size=128, kept=(8, 12, 16, 24), widths=(16, 36, 60, 76, 88), groups=1)
    unet_widths = (64, 64)
    judge_widths = (8, 16)
    batches = dict.fromkeys(train.Heads.batches, 4)
    table_people = 2


def test_the_chain_runs_from_pictures_to_a_hypernetwork_that_draws(few, capsys):
    def run(*arguments: str) -> int:
        return train.main(TinyHeads, train.STAGES, train.OTHERS, [*arguments, "--runs", str(few)], "")

    with pytest.raises(SystemExit, match="isn't trained yet"):
        run("pro")
    for stage in ("encoder", "recogniser", "classifier", "decoder", "base"):
        assert run(stage, "--steps", "2") == 0
    for stage in ("pro", "table", "faithful"):
        assert run(stage, "--steps", "1") == 0
    assert run("export") == run("sample") == 0
    assert "dB on 8 test pictures" in capsys.readouterr().out
    assert (few / "sample-base.png").is_file()
    assert set(Judge.from_pretrained(few / "export" / "classifier").spec["heads"]) == set(contexts.classes())
    hdb = HyperDreamBooth.from_pretrained(str(few / "export" / "base"), hypernetwork=str(few / "export" / "hypernetwork"), device="cpu")
    assert hdb.info.base == "heads"
    data = pictures.Pictures.load(few / "pictures", "test")
    latents = hdb.backbone.encode_images(train.to_tensor(data[np.arange(8)]))
    assert latents.shape == (8, 24, 8, 8)
    rebuilt = hdb.backbone.decode_images(latents)
    assert train.psnr(rebuilt, train.to_tensor(data[np.arange(8)]))["psnr"] > 17  # low, as only twenty pictures were trained on
    assert hdb.describe(latents[:1])[0].startswith("a photo of a [V] face")


def test_the_protocol_asks_for_what_it_draws(tmp_path):
    pytest.importorskip("dlib")
    from hyperdreambooth.evaluation.judges import Dlib
    from worlds.heads import protocol

    dlib = Dlib()
    atlas, numbers = protocol.test_people(tmp_path, dlib, 2)
    assert atlas.truths.shape == (len(numbers), len(protocol.ASKED), 3, 128, 128)
    assert all("[V]" in prompt for prompt in atlas.prompts)
    assert "santa hat" in atlas.prompts[5]
    assert not atlas.seen[5]
    again, _ = protocol.test_people(tmp_path, dlib, 2)  # from the cached results
    assert torch.equal(again.truths, atlas.truths)
    right, left = (protocol.nose(dlib, atlas.truths[:1, index])[0] for index in (1, 2))
    assert right > 0 > left, "the nose must be on the side to which the head turns"
