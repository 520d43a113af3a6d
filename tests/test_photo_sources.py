"""One loader: every source and container gives the same picture; folders name what they don't take."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from hyperdreambooth import photos
from hyperdreambooth.errors import InputError

from .conftest import picture


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["PNG", "TIFF", "AVIF", "JPEG"]), st.integers(1, 8), st.sampled_from(["RGB", "L"]), st.booleans())
def test_all_sources_of_a_file_give_one_picture(tmp_path_factory, container, orientation, mode, bad_profile):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path_factory.mktemp("sources") / "photo.txt"  # the suffix says nothing
    extra = {"icc_profile": b"no profile"} if bad_profile and container == "PNG" else {}
    picture(size=(48, 32)).convert(mode).save(path, container, exif=exif, **extra)
    loaded, note = photos.read_photo(path)
    assert loaded.size == ((48, 32) if orientation < 5 else (32, 48))
    assert ("profile" in note) == bool(extra)
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), path.as_uri()):
        assert np.array_equal(photos.load_photo(source), loaded)
    array = np.asarray(loaded)
    for source in (array, array / 255.0, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert np.array_equal(photos.load_photo(source), loaded)


def test_long_texts_profiles_and_web_addresses(tmp_path):
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2_000_000, zip=True)
    picture().save(tmp_path / "text.png", pnginfo=text)
    assert np.array_equal(photos.load_photo(tmp_path / "text.png"), picture().convert("RGB"))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture().save(tmp_path / "lab.png", icc_profile=lab)
    assert "ignored" in photos.read_photo(tmp_path / "lab.png")[1]
    with pytest.raises(InputError, match="nothing is fetched"):
        photos.load_photo("https://example.org/a.png")


def test_phone_photos_over_the_limit_are_decoded_smaller(tmp_path, monkeypatch):
    picture(size=(512, 512)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(photos, "MAX_PIXELS", 400 * 400)
    assert photos.load_photo(tmp_path / "a.jpg").size == (128, 128)


def test_folders_take_pictures_by_content_and_name_the_rest(tmp_path, capsys):
    (tmp_path / "c" / "deep").mkdir(parents=True)
    for name in ("a", "b.jfif", "c/deep/x.odd"):
        picture().save(tmp_path / name, "JPEG")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.doc").write_text("words")
    for quiet in ("Thumbs.db", "._b.jfif", ".DS_Store", "b.txt"):
        (tmp_path / quiet).write_text("a man  in a hat\n")
    assert list(photos.list_identities(tmp_path)) == ["a", "b", "c"]
    said = capsys.readouterr().err
    assert "2 files" in said
    assert all(name in said for name in ("gone.png", "notes.doc"))
    assert "Thumbs" not in said
    assert photos.read_caption(tmp_path / "b.jfif") == "a man in a hat"
