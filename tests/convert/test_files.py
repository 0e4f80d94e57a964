"""Image files below a folder, and files that are written whole or not at all."""

import os

import pytest

from convert.files import NotWritten, image_files, write_whole


def _below(folder):
    return [os.path.relpath(path, folder) for path in image_files(folder)]


def test_a_folders_own_images_come_before_those_of_the_folders_in_it(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "c/z.webp",
        "c/a/1.tif",
        "b/2.gif",
        "notes.txt",
        ".c.png",
        ".git/x.png",
        "d.png/e.ppm",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert _below(tmp_path) == ["a.JPG", "b.png", "b/2.gif", "c/z.webp", "c/a/1.tif", "d.png/e.ppm"]


def test_links_are_followed_unless_they_lead_back(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "1.png").touch()
    (here / "link").symlink_to(there)
    (there / "back").symlink_to(here)
    (here / "file.png").symlink_to(there / "1.png")
    assert _below(here) == ["1.png", "file.png", "link/1.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(image_files(tmp_path / "none"))


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten, match=f"{path} could not be written: no space left on device"):
        write_whole(path, b"newer")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])
