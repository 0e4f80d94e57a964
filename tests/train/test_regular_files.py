"""Only regular files are read: a named pipe is not waited for, a device not read to its end, whoever is given one."""

import os
import shutil
from pathlib import Path

import pytest

import convert
from convert.__main__ import main as convert_main
from convert.errors import ConversionError
from convert.image_files import LeftOut, image_files
from crossvit_jax import preprocess
from crossvit_jax.files import NotRegular, check_regular, open_regular, read_json, read_regular
from tests.command_line import refusal
from tests.train.small_weights import save_small
from train import evaluate, predict
from train import main as training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("weights") / "w.safetensors", "abc")


@pytest.fixture
def odd(tmp_path):
    """What is no regular file, by kind."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "none")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    return [tmp_path / f"{kind}.png" for kind in ("pipe", "zero", "folder", "nowhere", "loop")]


def test_what_is_no_regular_file_is_not_opened(odd):
    pipe, zero, folder, nowhere, loop = odd
    for path, kind in ((pipe, "a named pipe"), (zero, "a device"), (folder, "a folder")):
        with pytest.raises(NotRegular, match=f"it is {kind}, not a regular file"):
            open_regular(path)
    for path in (nowhere, loop, "a\0b"):
        with pytest.raises(OSError):
            open_regular(path)
    for path in odd:
        with pytest.raises(preprocess.UnreadableImage):
            preprocess.read_image(path)


def test_a_link_to_a_regular_file_is_one_and_a_length_is_kept(tmp_path):
    (tmp_path / "file").write_bytes(b"[1, 2]")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == [1, 2]
    assert read_regular(tmp_path / "link", at_most=6) == b"[1, 2]"
    with pytest.raises(OSError, match="it has 6 bytes; read are 5 at most"):
        read_regular(tmp_path / "link", at_most=5)
    os.truncate(tmp_path / "file", 2**40)  # takes no room on the disk
    with pytest.raises(preprocess.UnreadableImage, match=r"1,099,511,627,776 bytes"):
        preprocess.read_image(tmp_path / "file")


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", "9" * 5000])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


def test_folders_of_links_that_lead_in_circles_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    check_regular(tmp_path)
    os.mkfifo(tmp_path / "a" / "b" / "pipe")
    with pytest.raises(NotRegular):
        check_regular(tmp_path)


def test_in_a_folder_of_images_they_are_left_out_and_told(odd):
    left_out = LeftOut()
    assert [Path(path).name for path in image_files(odd[0].parent, left_out=left_out)] == ["loop.png", "nowhere.png"]
    assert left_out.notes() == [f"left out, as they are no regular files: {odd[0]}, {odd[1]}"]


def test_every_command_refuses_them_in_one_line(weights, odd, tmp_path, capsys):
    pipe, zero, *_ = odd
    for path, kind in ((pipe, "named pipe"), (zero, "device")):
        line = refusal(capsys, "python -m convert", convert_main, path, tmp_path / "out.pth")
        assert f"{path} cannot be read: it is a {kind}, not a regular file" in line
        assert f"is a {kind}" in refusal(capsys, "python -m train.main", training.main, "--init", path)
        given = ("--weights", path, tmp_path / "photo.jpg")
        (tmp_path / "photo.jpg").touch()
        assert f"is a {kind}" in refusal(capsys, "python -m train.predict", predict.main, *given)
        assert "is neither a file nor a folder" in refusal(
            capsys, "python -m train.predict", predict.main, "--weights", weights, path
        )
        given = ("--weights", weights, "--dataset=digits", "--class-order", path)
        assert f"is a {kind}" in refusal(capsys, "python -m train.evaluate", evaluate.main, *given)


@pytest.mark.parametrize("file", ["crossvit/metadata", "params/_METADATA", "params/manifest.ocdbt", "fingerprint/new"])
def test_in_an_orbax_folder_they_are_refused(weights, tmp_path, file):
    source = convert.load_weights(weights)
    folder = convert.save(source.tensors, source.config, tmp_path / "orbax")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(ConversionError, match="cannot be read: it is a named pipe"):
        convert.load_weights(folder)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "pipe"])
def test_in_a_prepared_data_set_they_are_refused(weights, few_digits_dir, tmp_path, capsys, file):
    shutil.copytree(few_digits_dir, tmp_path / "data")
    path = next((tmp_path / "data").rglob("features.json")).with_name(file)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    given = ("--weights", weights, "--dataset=digits", "--data-dir", tmp_path / "data")
    assert f"{path}: it is a named pipe" in refusal(capsys, "python -m train.evaluate", evaluate.main, *given)
