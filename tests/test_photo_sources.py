"""The photo loader: every source and container gives the same picture; skipped files of a folder are named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from hyperdreambooth import folders, photos
from hyperdreambooth.errors import InputError

from .conftest import picture


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["PNG", "TIFF", "AVIF", "JPEG"]), st.integers(1, 8), st.sampled_from(["RGB", "L"]), st.booleans())
def test_all_sources_of_a_file_give_one_picture(tmp_path_factory, container, orientation, mode, bad_profile):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path_factory.mktemp("sources") / "photo.txt"  # the wrong suffix must not matter
    extra = {"icc_profile": b"no profile"} if bad_profile and container == "PNG" else {}
    picture(size=(48, 32)).convert(mode).save(path, container, exif=exif, **extra)
    loaded, note = photos.read_photo(path)
    assert loaded.size == ((48, 32) if orientation < 5 else (32, 48))
    assert ("profile" in note) == bool(extra)
    at_its_end = io.BytesIO(path.read_bytes())
    at_its_end.seek(0, 2)
    for source in (
        path.read_bytes(),
        memoryview(path.read_bytes()),
        at_its_end,
        at_its_end,
        Image.open(path),
        path.as_uri(),
        Path(path.as_uri()),
    ):
        assert np.array_equal(photos.load_photo(source), loaded)
    array = np.asarray(loaded)
    for source in (array, array / 255.0, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert np.array_equal(photos.load_photo(source), loaded)


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float16),
        RAMP * 1.0001 - 0.00005,  # resizing can exceed the range slightly
        RAMP * 255,
        RAMP * 2 - 1,
        (RAMP * 255).astype(np.uint16),
        (RAMP * 4095).astype(np.uint32),
        (RAMP * 65535).astype(">u2"),
        np.dstack([RAMP, np.ones_like(RAMP)]),
        torch.from_numpy(RAMP).to_sparse(),
        Image.fromarray((RAMP * 255).astype(np.uint8)).convert("I"),
        Image.fromarray((RAMP * 65535).astype(np.uint16)),
        Image.fromarray((RAMP * 255).astype(np.float32)),
        Image.fromarray((RAMP * 255).astype(np.uint8)).convert("LA").convert("La"),
    ],
)
def test_numbers_are_read_by_the_range_they_have(values):
    assert np.abs(np.asarray(photos.load_photo(values), float)[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RAMP * 2, "0..2"),
        (RAMP * 5000 - 2000, "-2000..3000"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "nan"),
        (Image.fromarray((RAMP * 9).astype(np.float32)), "0..9"),  # unbounded linear light, which would be shown nearly black
        ((RAMP * 300).astype(int), "0..300"),
        (RAMP.astype(complex), "complex128"),
        (RAMP.astype(object), "object"),
        (RAMP[None, None], "shape"),
    ],
)
def test_numbers_that_could_mean_anything_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        photos.load_photo(values)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"photometric": "miniswhite"}, "inverted"),
        ({"dtype": np.int16}, "signed"),
        ({"planarconfig": "separate", "photometric": "rgb"}, "planes"),
    ],
)
def test_tiffs_that_pillow_misreads_are_refused(options, says):
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    values = (RAMP * 32000).astype(options.pop("dtype", np.uint16))
    tifffile.imwrite(file, np.stack([values] * 3) if "planarconfig" in options else values, **options)
    with pytest.raises(InputError, match=says):
        photos.load_photo(file)


def test_profiles_count_by_what_they_hold():
    colors = picture(size=(64, 64)).convert("RGB")

    def read(image: Image.Image, profile: ImageCms.core.CmsProfile) -> tuple[np.ndarray, str]:
        image.save(file := io.BytesIO(), "TIFF", icc_profile=ImageCms.ImageCmsProfile(profile).tobytes())
        loaded, note = photos.read_photo(file)
        return np.asarray(loaded, int), note

    for image in (colors, colors.convert("L")):
        values, note = read(image, ImageCms.createProfile("sRGB"))
        assert note == ""
        assert np.abs(values - np.asarray(image.convert("RGB"), int)).max() <= 1
    lab = ImageCms.profileToProfile(colors, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert np.abs(read(lab, ImageCms.createProfile("LAB"))[0] - np.asarray(colors, int)).mean() < 3


@pytest.mark.parametrize(
    "wrap", [str, lambda path: path, lambda path: path.read_bytes(), lambda path: io.BytesIO(path.read_bytes()), Image.open]
)
def test_photos_come_in_every_form(tmp_path, wrap):
    picture(size=(64, 48)).save(path := tmp_path / "a.png")
    photo = wrap(path)
    assert photos.read_photos(photo, 32)[0].shape == (1, 3, 32, 32)
    assert photos.read_photos(photo, 32)[0].shape == (1, 3, 32, 32)  # again, to check that the stream is rewound
    pixels = np.asarray(picture(size=(64, 48)))
    assert photos.read_photos(np.stack([pixels, pixels]), 32)[0].shape == (2, 3, 32, 32)
    for wrong in (None, 3):
        with pytest.raises(InputError, match="is no picture"):
            photos.read_photos(wrong, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_of_photos_is_float32_and_doubts_are_said(dtype):
    pixels = photos.to_tensor([picture(1, (32, 32)), picture(2, (32, 32))]).to(dtype)
    found, notes = photos.read_photos(pixels, 32)
    assert found.dtype == torch.float32
    assert torch.equal(found, pixels.float())
    assert notes == []
    assert "taken as -1..1" in photos.read_photos((pixels + 1) / 2, 32)[1][0]
    with pytest.raises(InputError, match="no photo was given"):
        photos.read_photos(pixels[:0], 32)


def test_long_texts_profiles_and_web_addresses(tmp_path):
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2_000_000, zip=True)
    picture().save(tmp_path / "text.png", pnginfo=text)
    assert np.array_equal(photos.load_photo(tmp_path / "text.png"), picture().convert("RGB"))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture().save(tmp_path / "lab.png", icc_profile=lab)
    assert "ignored" in photos.read_photo(tmp_path / "lab.png")[1]
    for address in ("https://example.org/a.png", "s3://bucket/a.png", f"file://server{tmp_path}/text.png", Path("https://a.org/a.png")):
        with pytest.raises(InputError, match="nothing is fetched"):
            photos.load_photo(address)
    with (tmp_path / "text.png").open() as text_file, pytest.raises(InputError, match="binary mode"):
        photos.load_photo(text_file)


def test_phone_photos_over_the_limit_are_decoded_smaller(tmp_path, monkeypatch):
    picture(size=(512, 512)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(photos, "MAX_PIXELS", 400 * 400)
    assert photos.load_photo(tmp_path / "a.jpg").size == (128, 128)


def test_folders_take_pictures_by_content_and_name_the_rest(tmp_path, capsys):
    (tmp_path / "c" / "deep").mkdir(parents=True)
    for name in ("masks", "c/Masks", "@eaDir"):
        (tmp_path / name).mkdir()
    for name in ("a", "b.jfif", "c/deep/x.odd", "c/Masks/x.png", "masks/a.png", "@eaDir/a.jpg"):
        picture().save(tmp_path / name, "JPEG")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.doc").write_text("words")
    for quiet in ("Thumbs.db", "._b.jfif", ".DS_Store", "b.txt", "a.caption"):
        (tmp_path / quiet).write_text("\ufeffa man  in\r\na hat\n")
    assert list(folders.list_identities(tmp_path)) == ["a", "b", "c"]
    said = capsys.readouterr().err
    assert "4 files" in said
    assert all(name in said for name in ("gone.png", "notes.doc", "c/Masks/x.png", "masks/a.png"))
    assert "Thumbs" not in said
    assert folders.caption_of(tmp_path / "b.jfif") == folders.caption_of(tmp_path / "a") == "a man in a hat"
    (tmp_path / "d.jpg.txt").write_text("a woman")
    assert folders.caption_of([str(tmp_path / "d.jpg")]) == "a woman"
    assert folders.caption_of("") is None


def test_auto_takes_the_face_or_says_that_it_took_the_middle(tmp_path):
    """A tall photo whose head is in the upper part: the middle alone would lose it. The default of every command."""
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("cv2")
    astronaut = Image.fromarray(skimage.data.astronaut())
    tall = Image.new("RGB", (512, 1100), "gray")
    tall.paste(astronaut, (0, 0))
    found, note = photos.prepare(tall, 64)
    assert "took the face" in note
    assert photos.prepare(tall, 64, "face")[0].tobytes() == found.tobytes() != photos.prepare(tall, 64, "center")[0].tobytes()
    for turn in (90, 180):
        turned, _ = photos.prepare(tall.rotate(turn, expand=True), 64)
        assert np.abs(np.asarray(turned, float) - np.asarray(found, float)).mean() < 25  # the crop must be the same upright face
    _, note = photos.prepare(Image.new("RGB", (400, 300), "gray"), 64)
    assert "took the middle" in note
    crop = astronaut.resize((250, 250))  # small pictures are assumed to be cropped
    assert photos.prepare(crop, 64) == photos.prepare(crop, 64, "center")


def test_a_phones_heic_is_upright_and_whole(tmp_path):
    """As iPhones write it: turned by a mark, with transparency, of more than 8 bits, with a second picture beside the first."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    pixels = np.zeros((96, 160, 3), np.uint8)
    pixels[:, :80] = 220, 40, 40
    image, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x112] = 6

    def read(write) -> tuple[Image.Image, str]:
        buffer = io.BytesIO()
        write(buffer)
        (tmp_path / "photo").write_bytes(buffer.getvalue())  # the format is detected from the content
        return photos.read_photo(tmp_path / "photo")

    upright, _ = read(lambda file: image.save(file, "HEIF", quality=95, exif=turned.tobytes()))
    assert upright.size == (96, 160)
    assert np.abs(np.asarray(upright)[20, 48] - np.array([220.0, 40, 40])).max() < 8
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(read(lambda file: clear.save(file, "HEIF"))[0]).min() > 250
    deep = heif.from_bytes(mode="RGB;16", size=(160, 96), data=(pixels.astype(np.uint16) * 257).tobytes())
    assert np.abs(np.asarray(read(lambda file: deep.save(file, quality=95))[0])[20, 20] - np.array([220.0, 40, 40])).max() < 8
    two = heif.HeifFile()
    two.add_from_pillow(image)
    two.add_from_pillow(image)
    assert "first of 2 frames" in read(two.save)[1]


def test_of_a_phones_hdr_jpeg_the_picture_that_every_screen_shows_is_taken(tmp_path):
    """Ultra HDR: an ordinary JPEG with, behind it, a gray picture that says how much brighter each part may be."""
    about = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0"/>'
    shown, gains = Image.effect_mandelbrot((200, 160), (-2, -1, 1, 1), 50).convert("RGB"), Image.new("L", (50, 40), 200)
    shown.save(tmp_path / "hdr.jpg", format="MPO", save_all=True, append_images=[gains.convert("RGB")], xmp=about, quality=95)
    shown.save(tmp_path / "plain.jpg", quality=95)
    found, note = photos.read_photo(tmp_path / "hdr.jpg")
    assert (found.size, note) == ((200, 160), "")
    assert np.abs(np.asarray(found, float) - np.asarray(photos.load_photo(tmp_path / "plain.jpg"), float)).max() <= 1
