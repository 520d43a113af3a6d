"""Pictures from outside: every mode, every kind of damage."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperdreambooth import photos
from hyperdreambooth.errors import InputError

from .conftest import picture


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (png_header(30_000, 30_000), "megapixels"),
        (png_header(200_000, 200_000), "pixels"),
        (png_header(1, 1), "1 x 1"),
        (png_header(64, 64), "damaged"),
    ],
)
def test_what_is_no_photo_is_one_error_that_names_the_file(tmp_path, content, says):
    path = tmp_path / "photo.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        photos.load_photo(path)
    assert "photo.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_truncated_photos(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        photos.load_photo(tmp_path)
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"cut.{suffix}"
        picture(size=(128, 128)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=r"damaged|not a picture"):
            photos.load_photo(path)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright = photos.load_photo(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert np.asarray(upright)[:18].mean() > 240
    assert np.asarray(upright)[-18:].mean() < 15


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    values = np.full((32, 32), 40_000, np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else picture(size=(32, 32)).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    loaded = photos.load_photo(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB"
    assert loaded.size == (32, 32)
    if mode == "I;16":
        assert abs(np.asarray(loaded).mean() - 40_000 / 257) < 1  # scaled, not clipped


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(photos.load_photo(tmp_path / "clear.png")).min() == 255


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 200), st.integers(16, 200), st.integers(8, 96))
def test_squares_have_the_size_that_was_asked(width, height, size):
    assert photos.square(picture(size=(width, height)), size).size == (size, size)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_tensor_round_trip(seed):
    image = picture(seed)
    tensor = photos.to_tensor([image])
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert np.array_equal(np.asarray(photos.to_images(tensor)[0]), np.asarray(image))


def test_a_real_face_is_found(tmp_path):
    skimage = pytest.importorskip("skimage")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "astronaut.png")
    image = photos.load_photo(tmp_path / "astronaut.png")
    faces = photos.find_faces(image)
    assert len(faces) == 1
    face = faces[0]
    assert face.left < 225 < face.left + face.side  # Eileen Collins' nose is near (225, 115)
    assert face.top < 115 < face.top + face.side
    crop, note = photos.prepare(tmp_path / "astronaut.png", 64, "face")
    assert crop.size == (64, 64)
    assert note == ""
    with pytest.raises(InputError, match="no face 2"):
        photos.prepare(tmp_path / "astronaut.png", 64, "face", 2)


def test_several_faces_and_none(tmp_path):
    skimage = pytest.importorskip("skimage")
    one = Image.fromarray(skimage.data.astronaut()).crop((120, 0, 330, 260))
    both = Image.new("RGB", (520, 400), "white")
    both.paste(one.resize((315, 390)), (0, 0))
    both.paste(one.resize((157, 195)), (340, 60))
    both.save(tmp_path / "two.png")
    assert len(photos.find_faces(both)) == 2
    _, note = photos.prepare(tmp_path / "two.png", 64, "face")
    assert "took the largest" in note
    small, _ = photos.prepare(tmp_path / "two.png", 64, "face", 2)
    large, _ = photos.prepare(tmp_path / "two.png", 64, "face", 1)
    assert np.asarray(small).tolist() != np.asarray(large).tolist()
    Image.new("RGB", (200, 200), "gray").save(tmp_path / "none.png")
    with pytest.raises(InputError, match="--crop center"):
        photos.prepare(tmp_path / "none.png", 64, "face")


def test_identities_of_a_folder(tmp_path, people):
    found = photos.list_identities(people)
    assert list(found) == ["ann", "bob", "cyd", "dan"]
    assert len(found["ann"]) == 2
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("2", "10"):
        picture().save(flat / f"{name}.png")
    (flat / "notes.txt").write_text("no picture")
    assert list(photos.list_identities(flat)) == ["2", "10"]
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "empty", "holds no pictures"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(InputError, match=says):
            photos.list_identities(folder)


def test_png_metadata_and_overwriting(tmp_path):
    path = photos.save_png(picture(), tmp_path / "a.png", {"prompt": "ein Gesicht, größer"})
    assert photos.read_png_metadata(path)["prompt"] == "ein Gesicht, größer"
    with pytest.raises(InputError, match="--overwrite"):
        photos.save_png(picture(), path, {})


def test_grids_have_a_cell_for_every_picture():
    sheet = photos.grid(
        [[picture(), picture()], [picture()]], ["one", "a label that is far too long for the sheet " * 5], ["a", "b"], cell=50
    )
    assert sheet.width >= 100
    assert sheet.height >= 100
