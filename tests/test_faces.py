"""Face detection in a real photograph: at any tilt, with upright crops, the largest face first."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from PIL import Image

from hyperdreambooth import faces, photos
from hyperdreambooth.errors import InputError

skimage_data = pytest.importorskip("skimage.data")
pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """Eileen Collins (NASA, public domain), the photograph that scikit-image ships: 512 x 512."""
    return Image.fromarray(skimage_data.astronaut())


@pytest.fixture(scope="module")
def upright(astronaut) -> faces.Face:
    (face,) = faces.find_faces(astronaut)
    return face


def test_a_real_face_is_found(upright):
    assert math.dist((upright.x, upright.y), (225, 106)) < 8  # just below the midpoint between the eyes
    assert 80 < upright.side < 120
    assert upright.score > faces.SURE
    assert abs(upright.roll) < 5  # she holds her head nearly straight


@pytest.mark.parametrize("angle", [-135, -70, -45, -30, -15, 10, 25, 40, 55, 120, 180])
def test_tilted_faces_are_turned_upright(astronaut, upright, angle):
    tilted = astronaut.rotate(-angle, Image.Resampling.BICUBIC, expand=True, fillcolor="gray")
    found = faces.find_faces(tilted)
    assert len(found) == 1
    assert abs((found[0].roll - upright.roll - angle + 180) % 360 - 180) < 5
    turn = math.radians(angle)
    x, y = upright.x - 256, upright.y - 256
    where = x * math.cos(turn) - y * math.sin(turn) + tilted.width / 2, x * math.sin(turn) + y * math.cos(turn) + tilted.height / 2
    assert math.dist((found[0].x, found[0].y), where) < 0.1 * upright.side
    # the crop is nearly that of the upright photo, much closer than an unrotated crop of the tilted photo
    reference, aligned, as_it_is = (
        np.asarray(faces.crop_face(image, face).resize((64, 64)).convert("L"), float)[16:48, 16:48]
        for image, face in ((astronaut, upright), (tilted, found[0]), (tilted, found[0]._replace(roll=0.0)))
    )
    correlation = np.corrcoef([reference.ravel(), aligned.ravel(), as_it_is.ravel()])[0]
    assert correlation[1] > 0.9
    assert correlation[1] > correlation[2] + 0.05


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
def test_the_photos_size_doesnt_matter(astronaut, upright, scale):
    (face,) = faces.find_faces(astronaut.resize((round(512 * scale),) * 2))
    assert math.dist((face.x / scale, face.y / scale), (upright.x, upright.y)) < 5
    assert abs(face.side / scale - upright.side) < 10


@pytest.mark.parametrize("angle", [-25, 160])
@pytest.mark.parametrize("wide", [110, 240, 800])
def test_a_head_of_any_size_is_found_in_a_phones_photo(astronaut, wide, angle):
    photo = Image.fromarray(skimage_data.coffee()).resize((4000, 3000))
    head = astronaut.crop((140, 20, 310, 210)).resize((wide, round(wide * 190 / 170))).rotate(-angle, expand=True)
    photo.paste(head, (2500, 900))
    (face,) = faces.find_faces(photo)
    assert math.dist((face.x, face.y), (2500 + head.width / 2, 900 + head.height / 2)) < 0.2 * wide
    assert abs((face.roll - angle + 180) % 360 - 180) < 15


@pytest.mark.parametrize("box", [(160, 40, 290, 180), (190, 60, 262, 140)])
def test_a_face_that_fills_the_photo_is_found(astronaut, box):
    (face,) = faces.find_faces(astronaut.crop(box).resize((3000, 3200)))
    assert abs(face.roll) < 10


def test_margin_is_ffhqs(astronaut, upright):
    """There the crop is 4 times as wide as the eyes are apart; hers are 46 pixels apart."""
    assert abs(faces.crop_face(astronaut, upright).width - 4 * 46) < 20


def test_a_crop_that_leaves_the_picture_is_moved_inside_or_cut(astronaut):
    edge = faces.Face(20, 30, 97, 0.0, 0.9)
    assert faces.crop_face(astronaut, edge).size == (194, 194)
    assert faces.crop_face(astronaut, edge._replace(side=900)).size == (512, 512)
    turned = faces.crop_face(astronaut, edge._replace(side=900, roll=45.0))
    assert turned.width == turned.height == pytest.approx(512 / math.sqrt(2), abs=1)  # the crop must not reach outside the photo


def test_several_faces_and_none(tmp_path, astronaut):
    one = astronaut.crop((120, 0, 330, 260))
    both = Image.new("RGB", (520, 400), "white")
    both.paste(one.resize((315, 390)), (0, 0))
    both.paste(one.resize((157, 195)), (340, 60))
    both.save(tmp_path / "two.png")
    found = faces.find_faces(both)
    assert len(found) == 2
    assert found[0].side > 1.5 * found[1].side
    large, note = photos.prepare(tmp_path / "two.png", 64, "face")
    assert "2 faces, took the largest" in note
    first, none = photos.prepare(tmp_path / "two.png", 64, "face", 1)
    assert none == ""
    assert np.array_equal(np.asarray(large), np.asarray(first))
    second, _ = photos.prepare(tmp_path / "two.png", 64, "center", 2)  # a face number implies a face crop
    assert not np.array_equal(np.asarray(second), np.asarray(first))
    with pytest.raises(InputError, match=r"no face 3; 2 were found"):
        photos.prepare(tmp_path / "two.png", 64, "face", 3)
    Image.new("RGB", (200, 200), "gray").save(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"no face was found.*--crop center"):
        photos.prepare(tmp_path / "none.png", 64, "face")


@pytest.mark.parametrize(("light", "haze", "noise"), [(0.05, 0, 3), (0.15, 190, 0), (0.1, 120, 2)])
def test_dark_noisy_and_hazy_photos_show_the_face_too(astronaut, light, haze, noise):
    values = np.asarray(astronaut.crop((60, 0, 390, 330))) * light + haze + np.random.default_rng(0).normal(0, noise, (330, 330, 3))
    (face,) = faces.find_faces(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    assert math.dist((face.x + 60, face.y), (225, 106)) < 10


@pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket", "brick", "text", "retina"])
def test_pictures_without_a_face_have_none(name):
    assert faces.find_faces(Image.fromarray(getattr(skimage_data, name)())) == []


def test_a_face_in_profile_is_one_too():
    """The cameraman, whose face is turned away."""
    (face,) = faces.find_faces(Image.fromarray(skimage_data.camera()))
    assert math.dist((face.x, face.y), (243, 152)) < 25


def test_without_opencv_the_error_says_what_to_install(astronaut, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    faces._detector.cache_clear()
    with pytest.raises(InputError, match=r"hyperdreambooth\[faces\].*--crop center"):
        faces.find_faces(astronaut)
