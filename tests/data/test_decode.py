"""Decoding: the fast path gives Pillow's pixels, or a smaller picture of the same; Pillow judges what is odd."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from detr_accel.data import decode
from detr_accel.data.decode import _read_jpeg, header, header_size, read_rgb, size_fault
from detr_accel.structures import UserError

COCO_FREE = Path(__file__).parents[3] / "shared/data/coco_free/train"


def photo(h: int, w: int, seed: int = 0) -> Image.Image:
    """Smooth, as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (h // 16 + 2, w // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_path_gives_the_same_pixels_as_pillow(tmp_path, mode, subsampling, progressive):
    path = tmp_path / "a.jpg"
    photo(75, 101).convert(mode).save(path, subsampling=subsampling, progressive=progressive, quality=87)
    assert _read_jpeg(path.read_bytes(), (75, 101), None) is not None, "it is taken"
    assert np.array_equal(read_rgb(path, (75, 101)), np.array(Image.open(path).convert("RGB")))


@pytest.mark.skipif(not COCO_FREE.is_dir(), reason=f"{COCO_FREE} is absent")
def test_real_photographs_come_out_the_same():
    files = sorted(COCO_FREE.glob("*.jpg"))
    assert len(files) > 50
    for path in files:
        with Image.open(path) as picture:
            assert np.array_equal(read_rgb(path, (picture.height, picture.width)), np.array(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("wanted", "decoded"),
    [((400, 600), (400, 600)), ((401, 600), (800, 1200)), ((399, 601), (800, 1200)), ((150, 200), (200, 300)),
     ((99, 149), (100, 150)), ((100, 151), (200, 300)),
     ((60, 60), (100, 150)), ((37, 56), (50, 75)), ((1, 1), (1, 1)), ((900, 1400), (800, 1200))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_large_picture_is_decoded_no_larger_than_it_must_be(tmp_path, wanted, decoded, name):
    path = tmp_path / name
    photo(800, 1200).save(path, quality=92)
    small = read_rgb(path, (800, 1200), wanted)
    assert small.shape == (*decoded, 3)
    whole = Image.open(path).convert("RGB").resize(decoded[::-1], Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.array(whole)).mean() < 1.0, "the same picture, not shifted"


def test_a_rotation_is_pillows(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 60).save(path, exif=exif)
    assert read_rgb(path, (40, 60), (5, 5)).shape[1] > read_rgb(path, (40, 60), (5, 5)).shape[0], "stored pixels"
    assert read_rgb(path, (60, 40), (50, 30)).shape == (60, 40, 3)
    assert read_rgb(path, (60, 40), (15, 10)).shape == (15, 10, 3), "no larger than it must be, as any other"
    assert read_rgb(path, None).shape == (60, 40, 3)


@pytest.mark.law8
@pytest.mark.parametrize("turn", [3, 6, 8])
def test_a_turned_tiff_has_one_shape_in_its_header_and_in_its_pixels(tmp_path, turn):
    """Pillow turns a TIFF itself while decoding, and of late swaps its size before that."""
    path, exif, stored = tmp_path / "a.tif", Image.Exif(), photo(40, 60)
    exif[0x0112] = turn
    stored.save(path, exif=exif)
    shape = (40, 60) if turn == 3 else (60, 40)
    pixels = read_rgb(path, None)
    assert pixels.shape[:2] == shape == header_size(path, upright=True) == header(path)[0]
    jpeg = tmp_path / "a.jpg"
    stored.save(jpeg, exif=exif, quality=95)
    assert np.abs(pixels.astype(int) - read_rgb(jpeg, None)).mean() < 8, "as a viewer shows it"
    assert np.array_equal(read_rgb(path, shape), pixels) and size_fault(path, shape) == ("", "")
    if turn != 3:  # boxes of the stored rows would lie on turned pixels
        with pytest.raises(UserError, match="its record says 60x40"):
            read_rgb(path, (40, 60))
        assert size_fault(path, (40, 60))[0] == "image.other_size"


def test_what_is_damaged_is_refused_as_before(tmp_path):
    stream = io.BytesIO()
    photo(64, 64).save(stream, "JPEG")
    whole = stream.getvalue()
    path = tmp_path / "cut.jpg"
    for length in (3, 20, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.jpg cannot be decoded"):
            read_rgb(path, (64, 64), (10, 10))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="its record says 63x64"):
        read_rgb(path, (64, 63))


def test_ink_and_other_formats_are_pillows(tmp_path):
    photo(30, 40).convert("CMYK").save(tmp_path / "ink.jpg")
    photo(30, 40).save(tmp_path / "named.jpg", "PNG")
    assert _read_jpeg((tmp_path / "ink.jpg").read_bytes(), (30, 40), None) is None
    assert read_rgb(tmp_path / "ink.jpg", (30, 40)).shape == (30, 40, 3)
    assert np.array_equal(read_rgb(tmp_path / "named.jpg", (30, 40)), np.array(photo(30, 40)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "turned.jpg"])
def test_a_file_is_read_once_and_reading_is_timed(tmp_path, monkeypatch, name):
    """Whoever decodes it: a slow disk is waited for once, and all of the wait is reading."""
    path, exif, opened = tmp_path / name, Image.Exif(), []
    exif[0x0112] = 6
    photo(40, 60).save(path, **({"exif": exif} if "turned" in name else {}))
    plain, open_ = decode.read_bytes, Image.open

    def slow(path):
        opened.append(path)
        time.sleep(0.05)
        return plain(path)

    monkeypatch.setattr(decode, "read_bytes", slow)
    monkeypatch.setattr(Image, "open", lambda what: opened.append(what) if what == path else open_(what))
    before = decode.seconds_reading()
    assert read_rgb(path, (60, 40) if "turned" in name else (40, 60)).ndim == 3
    assert opened == [path] and 0.05 <= decode.seconds_reading() - before < 0.15
