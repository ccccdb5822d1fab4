import pytest
from PIL import Image

from detr_accel.data import ImageFiles
from detr_accel.structures import UserError


def _picture(path, size=(30, 20)):
    Image.new("RGB", size).save(path)
    return path


def test_a_folder_stands_for_its_images_by_name(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        _picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "deeper").mkdir()
    single = _picture(tmp_path / "deeper" / "z.png", (8, 6))
    source = ImageFiles([single, tmp_path])
    assert [p.name for p in source.paths] == ["z.png", "a.JPG", "b.png", "c.webp"]
    assert [source.image_id(i) for i in range(len(source))] == [1, 2, 3, 4]
    assert source.size_px(0) == (6, 8) and source.sample(0).image.shape == (6, 8, 3)


def test_a_folder_without_images_and_a_file_that_is_none_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        ImageFiles([tmp_path])
    with pytest.raises(UserError, match="there is no image .*gone.jpg"):
        ImageFiles([tmp_path / "gone.jpg"])
    (tmp_path / "x.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of 1 files is an image; .*x.jpg"):
        ImageFiles([tmp_path])


def test_a_folder_of_folders_says_that_they_are_not_entered(tmp_path):
    (tmp_path / "deeper").mkdir()
    with pytest.raises(UserError, match="holds no image .*; folders in it are not entered; give files"):
        ImageFiles([tmp_path])


def test_a_file_that_is_no_image_is_skipped_with_its_reason_and_keeps_its_number(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no")
    _picture(tmp_path / "b.png")
    source = ImageFiles([tmp_path])
    assert [source.image_id(i) for i in range(len(source))] == [2] and source.sample(0).image_id == 2
    ((name, reason),) = source.skipped
    assert name == str(tmp_path / "a.jpg") and name in reason
