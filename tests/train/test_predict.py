"""Predictions: the model's own, for files, folders and lists, in their order, whatever else lies there."""

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import closing

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import train.images.transforms
import train.inference.image_paths
from convert import load_flax, load_weights, save
from convert.files import shown
from convert.image_files import LeftOut
from crossvit_jax.preprocess import UnreadableImage, normalised
from tests.train.small_weights import save_small
from train.data.bad_images import BadImages
from train.images.transforms import eval_transform
from train.inference.classify import classify
from train.inference.image_paths import FileSource, image_paths
from train.inference.model import load_classifier
from train.predict import main


@pytest.fixture
def weights(tmp_path):
    return save_small(tmp_path / "w.safetensors", "abcdefgh")


@pytest.fixture
def predict(weights, capsys):
    """Runs the command: status, output and errors."""

    def _predict(*arguments):
        # images come four at a time, so that the tests share a compiled program
        status = main([f"--weights={weights}", "--batch-size=4", *map(str, arguments)])
        return status, *capsys.readouterr()

    return _predict


@pytest.fixture
def photos(image_folder):
    """Six images in folders, and what is none."""
    for i, name in enumerate(("b.png", "a.png", "deep/c.jpg", "deep/er/d.PNG", "e.webp", "z/a.png")):
        image_folder(f"photos/{name}", seed=i)
    folder = image_folder() / "photos"
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(b"")
    return folder


_IN_ORDER = ["a.png", "b.png", "e.webp", "deep/c.jpg", "deep/er/d.PNG", "z/a.png"]


def _stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def _lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_probabilities_are_the_models_own_the_best_first(predict, weights, photos):
    status, out, error = predict("--format=jsonl", "--top-k=3", photos)
    assert (status, error.count("\n")) == (0, 1)
    assert "note: left out, as their suffix is none of an image: 1 .txt" in error
    lines = _lines(out)
    assert [line["path"] for line in lines] == [str(photos / name) for name in _IN_ORDER]

    model = load_flax(weights)
    transform = eval_transform(model.config)
    images = [
        transform({"image": (photos / name).read_bytes(), "label": 0, "name": name})["image"] for name in _IN_ORDER
    ]
    expected = np.asarray(jax.nn.softmax(nnx.jit(lambda m, x: m(x))(model, normalised(np.stack(images)))))
    assert len(set(expected.argmax(1))) > 1  # else the order of the images would not be seen
    for line, row in zip(lines, expected, strict=True):
        best = np.argsort(-row)[:3]
        assert [(p["class"], p["index"]) for p in line["predictions"]] == [("abcdefgh"[i], i) for i in best]
        np.testing.assert_allclose([p["probability"] for p in line["predictions"]], row[best], atol=1e-5)
        assert "attention" not in line


def test_the_same_in_three_formats(predict, photos, monkeypatch):
    monkeypatch.chdir(photos)
    file = "z/a.png"
    (line,) = _lines(predict("--format=jsonl", file)[1])
    predictions = line["predictions"]
    assert len(predictions) == 5

    head, *rows = csv.reader(io.StringIO(predict("--format=csv", file)[1]))
    assert head == ["path", "rank", "class", "index", "probability"]
    assert [(row[0], int(row[1]), row[2], int(row[3]), float(row[4])) for row in rows] == [
        (file, rank, p["class"], p["index"], p["probability"]) for rank, p in enumerate(predictions, start=1)
    ]

    head, *rows = predict(file)[1].splitlines()
    assert head.split() == ["image", "class", "probability"]
    assert [row.split()[-3:] for row in rows] == [
        [p["class"], f"{100 * p['probability']:.2f}", "%"] for p in predictions
    ]
    assert [row.startswith(file) for row in rows] == [True, False, False, False, False]
    assert len({row.index(p["class"], len(file)) for row, p in zip(rows, predictions, strict=True)}) == 1


def test_more_classes_than_there_are_is_all_of_them(predict, photos):
    (line,) = _lines(predict("--format=jsonl", "--top-k=100", photos / "a.png")[1])
    assert sorted(p["class"] for p in line["predictions"]) == list("abcdefgh")
    assert sum(p["probability"] for p in line["predictions"]) == pytest.approx(1, abs=1e-4)


def test_without_names_a_class_is_its_index(photos, tmp_path, capsys):
    weights = save_small(tmp_path / "nameless.safetensors", None, classes=8)
    assert main([f"--weights={weights}", "--format=jsonl", "--batch-size=4", str(photos / "a.png")]) == 0
    (line,) = _lines(capsys.readouterr().out)
    assert [p["class"] for p in line["predictions"]] == [str(p["index"]) for p in line["predictions"]]


def test_paths_come_from_standard_input_too(predict, photos, monkeypatch):
    names = [photos / "e.webp", photos / "deep", photos / "gone.png", photos / "a.png"]
    _stdin(monkeypatch, "".join(f"{name}\r\n\n" for name in names).encode())
    status, out, error = predict("--format=jsonl", photos / "b.png", "-", photos / "e.webp")
    assert status == 1  # a file that went away is no mistake in the command, but told like any unreadable image
    assert [os.path.relpath(line["path"], photos) for line in _lines(out)] == [
        *("b.png", "e.webp", "deep/c.jpg", "deep/er/d.PNG", "a.png", "e.webp")
    ]
    assert f"cannot read image {photos / 'gone.png'}: No such file or directory" in error


@pytest.mark.parametrize(
    ("written", "other"),
    [
        (lambda names: "".join(f"{name}\0" for name in names).encode(), "no\npath"),
        (lambda names: "\0".join(names).encode(), "no path"),
        (lambda names: "".join(f"{name}\r\n" for name in names).encode("utf-16"), "no path"),
        (lambda names: "".join(f"{name}\r\n" for name in names).encode("utf-16-le"), "no path"),
        (lambda names: b"\xfe\xff" + "\n".join(names).encode("utf-16-be"), "no path"),
        (lambda names: "".join(f"{name}\r\n" for name in names).encode("utf-32"), "no path"),
        (lambda names: "".join(f"{name}\n" for name in names).encode("utf-32-be"), "no path"),
        (lambda names: "".join(f"{name}\r\n" for name in names).encode("utf-8-sig"), "no\0path"),
        (lambda names: "".join(f"{name}\n" for name in names).encode(), "x" * 5000),
    ],
    ids=[
        "NULs behind",
        "NULs between",
        "UTF-16",
        "UTF-16 without a mark",
        "UTF-16-BE",
        "UTF-32",
        "UTF-32-BE without one",
        "UTF-8 with a mark",
        "lines",
    ],
)
def test_lists_on_standard_input_may_be_written_in_many_ways(photos, monkeypatch, written, other):
    good = [str(photos / "ä.png"), str(photos / "a.png")]
    (photos / "e.webp").rename(good[0])
    _stdin(monkeypatch, written([good[0], other, good[1]]))
    paths = image_paths(["-"], LeftOut())
    assert paths == [good[0], other, good[1]]
    source = FileSource(tuple(paths))
    assert len(source[0]["image"]) and len(source[2]["image"])
    with pytest.raises(UnreadableImage):
        source[1]


def test_names_on_standard_input_that_cannot_be_read_are_told_and_the_others_answered(predict, photos, monkeypatch):
    os.mkfifo(photos / "pipe.png")
    locked = photos / "locked"
    locked.mkdir()
    listed = train.inference.image_paths.image_files

    def fails_there(folder, **how):
        if str(folder) == str(locked):
            raise PermissionError(13, "Permission denied", str(locked))
        return listed(folder, **how)

    monkeypatch.setattr(train.inference.image_paths, "image_files", fails_there)  # root may read all folders
    wrong = ["a\0b", "x" * 5000, photos / "pipe.png", "/dev/null", locked]
    names = [photos / "b.png", *wrong, photos / "a.png"]
    _stdin(monkeypatch, "".join(f"{name}\n" for name in names).encode())
    status, out, error = predict("--format=jsonl", "-")
    assert status == 1
    assert [os.path.relpath(line["path"], photos) for line in _lines(out)] == ["b.png", "a.png"]
    told = error.splitlines()
    reasons = ["it is no path: embedded null byte", "File name too long", "it is a named pipe, not a regular file"]
    reasons += ["it is a device, not a regular file", "it is a folder, not a regular file"]
    for line, name, reason in zip(told, wrong, reasons, strict=False):
        assert f"cannot read image {shown(str(name))}: {reason}" in line
    assert told[5:] == ["python -m train.predict: 5 of 7 images could not be read"]


def test_unreadable_images_are_told_and_skipped(predict, photos):
    (photos / "b.png").write_bytes(b"")
    (photos / "deep" / "c.jpg").write_bytes(b"no image")
    whole = (photos / "e.webp").read_bytes()
    (photos / "e.webp").write_bytes(whole[: len(whole) // 2])
    status, out, error = predict("--format=jsonl", photos)
    assert status == 1
    assert [os.path.relpath(line["path"], photos) for line in _lines(out)] == ["a.png", "deep/er/d.PNG", "z/a.png"]
    told = error.splitlines()
    assert len(told) == 5
    for line, name in zip(told[1:], ("b.png", "e.webp", "deep/c.jpg"), strict=False):
        assert f"cannot read image {photos / name}: " in line
    assert "3 of 6 images could not be read" in told[4]


def test_when_no_image_can_be_read_only_the_header_is_there(predict, photos):
    status, out, error = predict("--format=csv", photos / "notes.txt")
    assert status == 1
    assert out == "path,rank,class,index,probability\n"
    assert "notes.txt" in error


def test_file_names_of_any_bytes_are_found_again(weights, photos, capsysbinary):
    odd = os.fsencode(photos) + b"/\xff\n,\xc3\xa9.png"
    os.rename(photos / "a.png", odd)

    def run(*flags):
        assert main([f"--weights={weights}", *flags, os.fsdecode(odd)]) == 0
        return capsysbinary.readouterr().out

    _, row, *_ = csv.reader(io.StringIO(run("--format=csv").decode("utf-8", "surrogateescape")))
    assert os.fsencode(row[0]) == odd
    (line,) = _lines(run("--format=jsonl").decode("ascii"))
    assert os.fsencode(line["path"]) == odd


def test_in_a_table_a_file_name_cannot_break_the_line(predict, image_folder):
    file = image_folder("a\nb\x1b[2J.png")
    _, out, _ = predict("--top-k=1", file)
    assert len(out.splitlines()) == 2
    assert "a\\nb\\x1b[2J.png" in out


def test_results_come_long_before_the_last_image_is_read(weights, photos, monkeypatch):
    read = []
    decode = train.images.transforms.decode_pixels
    monkeypatch.setattr(
        train.images.transforms, "decode_pixels", lambda *given: (read.append(given[1]), decode(*given))[1]
    )
    classifier = load_classifier(str(weights))
    paths = tuple(str(photos / name) for name in (*_IN_ORDER, *(40 * ["a.png"])))
    source = FileSource(paths)
    with closing(
        classify(classifier, source, BadImages(source, pytest.fail), batch_size=4, workers=0, top_k=1)
    ) as batches:
        first = next(batches)
        assert tuple(result.path for result in first) == paths[:4]
        assert len(read) < len(paths)
        assert [result.path for results in batches for result in results] == list(paths[4:])
    assert len(read) == len(paths)


def test_links_that_lead_in_circles_end(predict, photos):
    (photos / "deep" / "back").symlink_to(photos)
    (photos / "elsewhere").symlink_to(photos / "z")
    status, out, error = predict("--format=jsonl", photos)
    names = [os.path.relpath(line["path"], photos) for line in _lines(out)]
    assert (status, names) == (0, _IN_ORDER)
    assert f"seen already: {photos}/deep/back, {photos}/elsewhere" in error


def test_pictures_of_attention_are_one_per_image_even_of_the_same_name(predict, photos, tmp_path):
    pictures = tmp_path / "made" / "pictures"
    images = [photos / name for name in ("a.png", "e.webp", "z/a.png")]
    status, out, _ = predict("--format=jsonl", f"--attention={pictures}", *images)
    assert status == 0
    named = [line["attention"] for line in _lines(out)]
    names = ["a.png", "e.png", "z/a.png"]
    assert named == [str(pictures / name) for name in names]
    assert set(_contents(pictures)) == {pictures / name for name in names}
    for path in _contents(pictures):
        with Image.open(path) as image:
            assert image.format == "PNG"


@pytest.mark.parametrize("recorded", [None, "keep", "apply"])
def test_images_with_an_orientation_are_taken_as_in_training_and_told(predict, weights, image_folder, recorded):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = image_folder()
    with Image.open(image_folder("upright.png", size=(40, 56))) as upright:
        stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(folder / "stored.png")
    stored.save(folder / "tagged.png", exif=exif)
    known = load_weights(weights)
    file = folder / "known.safetensors"
    save(known.tensors, known.config, file, class_names=known.class_names, exif=recorded)

    def told(*flags):
        names = ("tagged.png", "stored.png", "upright.png")
        _, out, error = predict(f"--weights={file}", "--format=jsonl", *flags, *(folder / name for name in names))
        tagged, stored, upright = (line["predictions"] for line in _lines(out))
        assert stored != upright
        return [name for name, seen in (("stored", stored), ("upright", upright)) if tagged == seen], error

    note = "python -m train.predict: note: 1 of 3 images carry an EXIF orientation and were "
    turned, kept = f"{note}turned by it\n", f"{note}taken as they are stored, "
    unknown = "as timm does; the weights do not tell what training did, and --exif apply turns them\n"
    expected = {
        None: (["stored"], kept + unknown),
        "keep": (["stored"], f"{kept}as in training\n"),
        "apply": (["upright"], turned),
    }
    assert told() == expected[recorded]
    assert told("--exif=apply") == (["upright"], turned)
    assert told("--exif=keep") == (["stored"], f"{kept}as asked for\n")


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("linked", [None, "folder", "file", "hard"])
def test_no_picture_of_attention_replaces_an_image(predict, photos, tmp_path, linked):
    out, target = photos, photos / "a.png"
    if linked:
        out = tmp_path / "out"
        target = out / "a.png"
    if linked == "folder":
        out.symlink_to(photos)
    elif linked:
        out.mkdir()
        target.symlink_to(photos / "a.png") if linked == "file" else target.hardlink_to(photos / "a.png")
    before = _contents(photos)
    status, told, error = predict(f"--attention={out}", photos / "e.webp", photos)
    assert (status, told) == (2, "")
    assert f"error: {target} is one of the files to be read, and is not replaced" in error
    assert error.count("\n") == 1
    assert _contents(photos) == before


def test_pictures_of_attention_replace_their_like_and_no_other_file(predict, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(f"--attention={out}", photos / "a.png", photos / "b.png")[0] == 0
    assert predict(f"--attention={out}", photos / "z" / "a.png")[0] == 0
    for content in ((photos / "e.webp").read_bytes(), b""):
        (out / "a.png").write_bytes(content)
        before = _contents(out)
        status, told, error = predict(f"--attention={out}", photos / "b.png", photos / "a.png")
        assert (status, told) == (2, "")
        assert f"error: {out / 'a.png'} exists and was not written by this command" in error
        assert _contents(out) == before
    (out / "a.png").unlink()
    (out / "a.png").symlink_to(tmp_path / "nowhere")
    assert predict(f"--attention={out}", photos / "a.png")[0] == 2
    assert not (tmp_path / "nowhere").exists()


def test_attention_that_cannot_be_drawn_is_one_line_and_no_success(predict, photos, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("train.inference.classify.draw_attention", fail)
    out = tmp_path / "out"
    status, told, error = predict("--format=jsonl", f"--attention={out}", photos / "a.png")
    assert (status, told) == (2, "")
    assert error == f"python -m train.predict: error: {out / 'a.png'} could not be written: no fonts\n"
    assert not list(out.iterdir())


def test_a_list_without_an_end_is_refused(predict, monkeypatch):
    monkeypatch.setattr("train.inference.image_paths._LONGEST_LIST", 1000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.FileIO("/dev/zero"))))
    status, out, error = predict("-")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert "the list on standard input is longer than 1,000 bytes: give it in parts" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PATH"),
        (["/nowhere.png"], "there is no file or folder /nowhere.png"),
        (["/dev/null"], "/dev/null is neither a file nor a folder"),
        (["{empty}"], "no images in "),
        (["--top-k=0", "{photos}"], "argument --top-k: must be a whole number, 1 or more; got '0'"),
        (["--format=xml", "{photos}"], "argument --format: invalid choice: 'xml'"),
        (["--image-size=50", "{photos}"], "does not divide into whole patches"),
        (["--crop-pct=0", "{photos}"], "argument --crop-pct: must be above 0"),
        (["--attention={photos}/a.png", "{photos}"], "a.png: File exists"),
        (["--weights=/nowhere.pth", "{photos}"], "/nowhere.pth does not exist"),
        (["--weights=~nobody-of-this-name/x", "{photos}"], "~nobody-of-this-name is nobody's home folder"),
        (["--attention=~nobody-of-this-name/x", "{photos}"], "argument --attention: ~nobody-of-this-name/x: "),
        (["--quantize=int2", "{photos}"], "argument --quantize: invalid choice: 'int2'"),
        (["--quantize=int4", "--attention={empty}/maps", "{photos}"], "leave out --quantize"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(weights, photos, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(photos=photos, empty=tmp_path / "empty") for argument in arguments]
    try:
        status = main([f"--weights={weights}", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_list_is_a_mistake(predict, monkeypatch):
    _stdin(monkeypatch, b"\n")
    status, out, error = predict("-")
    assert (status, out) == (2, "")
    assert "no images in -" in error


@pytest.mark.slow
def test_nobody_reading_is_no_error_to_tell(weights, photos):
    command = f"{sys.executable} -m train.predict --weights {weights} --batch-size=4 {photos}/*.png | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.split() == ["image", "class", "probability"]
    assert done.stderr == ""


def test_help_needs_no_framework(capsys):
    for module in ("train.predict", "train.evaluate"):
        script = (
            f"import sys; sys.argv[1:] = ['--help']; import {module} as m\ntry: m.main()\nexcept SystemExit: pass\n"
        )
        script += "print('loaded', 'jax' in sys.modules or 'torch' in sys.modules or 'matplotlib' in sys.modules)"
        out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
        assert "exit status" in out
        assert out.endswith("loaded False\n")
