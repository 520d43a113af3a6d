"""Loading of user pictures: all color modes, and all kinds of damaged files."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from hyperdreambooth import checkpoint, folders, photos
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
    assert str(caught.value).count("photo.png") == 1  # the message isn't nested in another
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


def test_limits_before_decoding_are_messages_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(9000, 9000))  # between the library's limit and Pillow's own
    with pytest.raises(InputError, match=r"large\.png has 9000 x 9000 pixels.*megapixels") as caught:
        photos.load_photo(path)
    assert "damaged" not in str(caught.value)
    picture().save(path)
    monkeypatch.setattr(photos, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="the limit is"):
        photos.load_photo(path)


def test_what_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="can't be read: File name too long"):
        photos.load_photo("a" * 300 + ".png")
    path = tmp_path / "mine.png"
    picture().save(path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"mine\.png can't be read: Permission denied"):
        photos.load_photo(path)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(photos.FORMATS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_are_a_picture_or_one_error(tmp_path_factory, format, changes):
    path = tmp_path_factory.mktemp("damaged") / "photo"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(32, 24)).save(path, format, **({} if format in ("BMP", "GIF") else {"exif": exif}))
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning may reach the user
        try:
            message, mode = "", photos.load_photo(path).mode
        except InputError as error:
            message, mode = str(error), ""
    assert mode == "RGB" or message.count(str(path)) == 1


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation tag: rotate by 90 degrees clockwise
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
        assert abs(np.asarray(loaded).mean() - 40_000 / 257) < 1  # values must be scaled, not clipped


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_any_mode_of_pillow_becomes_rgb_of_the_same_size(mode, width, height):
    image = picture(size=(width, height))
    image = (
        image.convert("L").convert(mode)
        if mode in ("I", "I;16", "F")
        else image.convert("P").convert(mode)
        if mode == "PA"
        else image.convert(mode)
    )
    converted = photos.to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.size == (width, height)


def test_wide_numbers_are_scaled_and_gaps_are_black():
    ramp = np.array([[0, 2**29, 2**30]], np.int32)
    assert np.asarray(photos.to_rgb(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 128, 255]
    gap = np.array([[np.nan, 0.2, 1.0]], np.float32)
    assert np.asarray(photos.to_rgb(Image.fromarray(gap)))[0, :, 0].tolist() == [0, 51, 255]


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(photos.load_photo(tmp_path / "clear.png")).min() == 255


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 200), st.integers(16, 200), st.integers(8, 96))
def test_squares_have_the_size_that_was_asked(width, height, size):
    assert photos.prepare(picture(size=(width, height)), size, "center")[0].size == (size, size)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_tensor_round_trip(seed):
    image = picture(seed)
    tensor = photos.to_tensor([image])
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert np.array_equal(np.asarray(photos.to_images(tensor)[0]), np.asarray(image))


def test_identities_of_a_folder(tmp_path, people):
    found = folders.list_identities(people)
    assert list(found) == ["ann", "bob", "cyd", "dan"]
    assert len(found["ann"]) == 2
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("2", "10", "²"):
        picture().save(flat / f"{name}.png")
    (flat / "notes.txt").write_text("no picture")
    assert list(folders.list_identities(flat)) == ["2", "10", "²"]  # "²" is a digit that int() refuses
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "empty", "holds no pictures"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(InputError, match=says):
            folders.list_identities(folder)


@pytest.mark.parametrize("other", ["anna.png", "anna/1.png"])
def test_two_people_of_one_name_are_refused(tmp_path, other):
    (tmp_path / other).parent.mkdir(exist_ok=True)
    for name in ("anna.jpg", "bob.png"):
        picture().save(tmp_path / name)
    (tmp_path / "anna.txt").write_text("a caption")
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "notes.doc").write_text("no picture")
    assert list(folders.list_identities(tmp_path)) == ["anna", "bob"]
    picture().save(tmp_path / other)
    with pytest.raises(InputError, match=r"anna\S* and anna\S* are both called anna\. Rename one"):
        folders.list_identities(tmp_path)


def test_names_that_are_no_utf_8_are_percent_encoded_and_can_be_written(tmp_path):
    name = os.fsdecode(b"m\xfcller 1")
    picture().save(tmp_path / f"{name}.png")
    picture().save(tmp_path / "müller 2%.png")
    assert list(folders.list_identities(tmp_path)) == ["müller 2%", "m%FCller 1"]
    written = checkpoint.save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"name": name, "other": "müller"})
    assert checkpoint.read_tensors(written)[1] == {"name": "m\\udcfcller 1", "other": "müller"}
    assert checkpoint.read_json(checkpoint.write_json(tmp_path / "a.json", {"file": name})) == {"file": name}


def test_png_metadata_and_overwriting(tmp_path):
    path = photos.save_png(picture(), tmp_path / "a.png", {"prompt": "ein Gesicht, größer"})
    assert photos.read_png_metadata(path)["prompt"] == "ein Gesicht, größer"
    with pytest.raises(InputError, match="--overwrite"):
        photos.save_png(picture(), path, {})
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:200])
    for broken in (tmp_path / "none.png", tmp_path / "cut.png", tmp_path):
        with pytest.raises(InputError, match="is not a whole PNG"):
            photos.read_png_metadata(broken)


def test_grids_have_a_cell_for_every_picture():
    sheet = photos.grid(
        [[picture(), picture()], [picture()]], ["one", "a label that is far too long for the sheet " * 5], ["a", "b"], cell=50
    )
    assert sheet.width >= 100
    assert sheet.height >= 100


def test_a_label_that_is_too_long_goes_on_below():
    def sheet(rows: list[str], columns: list[str]) -> Image.Image:
        return photos.grid([[picture(), picture()]] * len(rows), rows, columns, cell=150)

    short, long, two = "a [V] face", "a [V] face wearing a santa hat on a purple background, as a pencil sketch, in the rain", "one, two"
    one, more = sheet([short, short], [two, two]), sheet([short, long], [two, long])
    assert more.height > one.height
    assert more.crop((0, 0, 150, 20)).tobytes() == one.crop((0, 0, 150, 20)).tobytes()
    font = ImageFont.load_default(13)
    for text in (long, "x" * 200, " spaces   and\nlines ", ""):
        lines = photos.wrapped(text, font, 150).splitlines()
        assert all(font.getlength(line) <= 150 for line in lines)
        assert "".join(lines).replace(" ", "") == "".join(text.split())
