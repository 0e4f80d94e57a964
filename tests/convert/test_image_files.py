"""Image files below a folder: which count, in which order, and each once."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.export.calibration import find_images
from convert.image_files import FORMATS, IMAGE_SUFFIXES, LeftOut, image_files
from crossvit_jax.preprocess import decode_image
from train.images.decode import decode_pixels
from train.inference.image_paths import image_paths


@pytest.fixture
def made(tmp_path):
    """Makes empty files below the folder that it returns."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def _below(folder, **how):
    return [os.path.relpath(path, folder) for path in image_files(folder, **how)]


def test_a_folders_own_images_come_before_those_of_the_folders_in_it(made):
    folder = made("b.png", "a.JPG", "c/z.webp", "c/a/1.tif", "b/2.gif", "notes.txt", "d.png/e.ppm")
    assert _below(folder) == ["a.JPG", "b.png", "b/2.gif", "c/z.webp", "c/a/1.tif", "d.png/e.ppm"]


@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/.", "."])
def test_paths_begin_with_the_folder_as_it_is_named(made, monkeypatch, spelled):
    monkeypatch.chdir(made("a.png", "b/c.png"))
    folder = spelled.format(os.getcwd())
    start = "." if spelled == "." else os.getcwd()
    assert image_files(folder) == [f"{start}/a.png", f"{start}/b/c.png"]


def test_what_is_hidden_is_left_out_at_any_depth_without_a_word(made):
    hidden = (".c.png", ".git/x.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/b/.x/y/2.png", "a/._1.png")
    folder, left_out = made(*hidden, "__MACOSX/a/1.png", "a/@eaDir/1.png/thumb.jpg", "a/1.png"), LeftOut()
    assert _below(folder, left_out=left_out) == ["a/1.png"]
    assert left_out.notes() == []


def test_files_left_out_are_told_in_one_line_with_counts_by_suffix(made):
    left_out = LeftOut()
    image_files(made("1.heic", "2.HEIC", "a/3.heic", "notes.txt", "Makefile", "4.png"), left_out=left_out)
    assert left_out.notes() == ["left out, as their suffix is none of an image: 3 .heic, 1 without suffix, 1 .txt"]


def test_what_is_no_file_is_no_image(made):
    folder = made("1.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "to-pipe.png").symlink_to("pipe.png")
    assert _below(folder) == ["1.png"]


def test_links_to_folders_above_are_not_followed(made):
    folder = made("cat/1.png", "cat/deep/2.png", "dog/3.png")
    for name, target in (("cat", "../cat"), ("self", "self"), ("all", ".."), ("root", "/"), ("deep/up", "../..")):
        (folder / "cat" / name).symlink_to(target)
    left_out = LeftOut()
    assert _below(folder, left_out=left_out) == ["cat/1.png", "cat/deep/2.png", "dog/3.png"]
    assert len(left_out.links) == 4  # the fifth leads nowhere
    assert left_out.notes()[-1].startswith("links are not followed to folders above, beside or seen already: ")


def test_links_to_folders_elsewhere_are_followed_and_each_folder_is_there_once(made):
    folder = made("here/1.png", "here/b/2.png", "pool/x/3.png", "pool/y/4.png")
    for name, target in (("a", "b"), ("c", "../pool/x"), ("d", "../pool"), ("e", "../pool/y")):
        (folder / "here" / name).symlink_to(target)
    (folder / "pool" / "back").symlink_to(folder / "here")
    (folder / "pool" / "up").symlink_to(folder)
    assert _below(folder / "here") == ["1.png", "b/2.png", "c/3.png", "d/y/4.png"]


def test_links_to_files_are_followed_and_each_file_is_there_once(made):
    folder = made("here/b.png", "pool/1.png")
    for name, target in (
        *(("a.png", "b.png"), ("c.png", "../pool/1.png"), ("d.png", "../pool/1.png"), ("gone.png", "nowhere.png")),
        ("link", "../pool"),
    ):
        (folder / "here" / name).symlink_to(target)
    assert _below(folder / "here") == ["b.png", "gone.png", "link/1.png"]  # who reads gone.png is told
    (folder / "here" / "link").unlink()
    assert _below(folder / "here") == ["b.png", "c.png", "gone.png"]


def test_folders_apart_are_not_entered_by_links(made):
    folder = made("cat/1.png", "dog/2.png", "dog/deep/3.png")
    for name, target in (("dog", "../dog"), ("deep", "../dog/deep"), ("both", "..")):
        (folder / "cat" / name).symlink_to(target)
    apart = {str(folder / "cat"), str(folder / "dog")}
    assert _below(folder / "cat", apart=apart) == ["1.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        image_files(tmp_path / "none")


def test_prediction_and_calibration_find_the_same_files(made):
    folder = made("a.png", "c/b.avif", "c/.x/1.png", "c/d.txt", "e.jfif")
    (folder / "c" / "up").symlink_to("..")
    expected = [str(folder / name) for name in ("a.png", "e.jfif", "c/b.avif")]
    left_out = LeftOut(), LeftOut()
    assert image_paths([str(folder)], left_out[0]) == expected
    assert sorted(map(str, find_images(str(folder), left_out[1]))) == sorted(expected)
    assert left_out[0] == left_out[1] == LeftOut({".txt": 1}, [f"{folder}/c/up"])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_found_by_each_of_its_suffixes_and_read_by_its_content(tmp_path, format):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    lossless = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(tmp_path / "image", format=format, **lossless)
    encoded = (tmp_path / "image").read_bytes()
    for suffix in FORMATS[format]:
        (tmp_path / f"1{suffix}").write_bytes(encoded)
    assert len(image_files(tmp_path)) == len(FORMATS[format])
    read = decode_pixels(encoded, "1.png")  # another format's suffix
    np.testing.assert_array_equal(read, np.asarray(decode_image(encoded, "1")))
    assert read.shape == pixels.shape
    if format in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        np.testing.assert_array_equal(read, pixels)


def test_grey_and_black_and_white_netpbm_files_are_read(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "1.pgm")
    Image.fromarray(grey > 31).save(tmp_path / "2.pbm")
    read = [decode_pixels(Path(path).read_bytes(), path) for path in image_files(tmp_path)]
    np.testing.assert_array_equal(read[0][..., 1], grey)
    np.testing.assert_array_equal(read[1][..., 1], 255 * (grey > 31))


def test_the_published_suffixes_are_all_there():
    asked = ".jpg .jpeg .jfif .jpe .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .avif .jp2"
    assert set(asked.split()) <= set(IMAGE_SUFFIXES)
