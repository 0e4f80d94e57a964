"""The order of classes is timm's where that is asked for, and said where it is another."""

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from convert import ConversionError
from convert.class_names import in_order, read_names, unlike_timm
from tests.convert.conftest import run
from tests.train.small_weights import save_small

_NAMES = ["class10", "Class2", "a", "B", "b1c02", "B1C10", "7", "10", "x9 y", "x10 y", "ä2", "Ä10", "01", "1a"]


def test_natural_order_is_that_of_timms_reader(tmp_path):
    for name in _NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    _, class_to_index = find_images_and_targets(str(tmp_path))
    assert in_order(_NAMES, "natural") == tuple(class_to_index)
    assert in_order(_NAMES, "text") == tuple(sorted(_NAMES)) != tuple(class_to_index)


def test_names_that_timm_takes_as_equal_have_an_order_too():
    assert in_order(["a2", "A2", "a02"], "natural") == ("A2", "a02", "a2")
    assert unlike_timm(["a2", "A2", "a02"]) is None  # any of their orders may be timm's


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["class1", "class10", "class2"], "class 1 is 'class10', and 'class2' in timm's natural order"),
        (["B", "a"], "class 0 is 'B', and 'a' in timm's natural order"),
        (["0", "1", "2"], None),
        (["n01440764", "n01443537"], None),
        ([], None),
    ],
)
def test_the_first_difference_from_timms_order_is_told(names, told):
    assert unlike_timm(names) == told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a\n\nb\n", "line 2 of .* is empty"),
        (b"a\nb\na\n", "names classes twice: a"),
        ("a\nb".encode("utf-16"), "read from UTF-8 text"),
        (None, "is neither natural nor text, nor a file of class names: No such file"),
        (b"a\nc\n", "names other classes than the data set: not in the file: b; only in the file: c"),
    ],
)
def test_a_file_of_names_that_will_not_do_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(ConversionError, match=message) as error:
        in_order(["a", "b"], str(tmp_path / "names"))
    assert "\n" not in str(error.value)


def test_a_file_of_names_is_read_as_editors_write_it(tmp_path):
    (tmp_path / "names").write_bytes("\ufeffb ä\r\n a\r\n\r\n".encode())
    assert read_names(str(tmp_path / "names")) == ("b ä", "a")


def test_two_classes_of_one_name_have_no_order():
    with pytest.raises(ConversionError, match="classes of the same name have no order: crane"):
        in_order(["crane", "heron", "crane"], "text")


@pytest.mark.parametrize(
    ("names", "ending", "told"),
    [
        (("c1", "c10", "c2"), ".pth", True),
        (("c1", "c10", "c2"), ".safetensors", True),
        (("c1", "c10", "c2"), ".flax.safetensors", False),
        (("c1", "c2", "c10"), ".safetensors", False),
        (None, ".pth", False),
    ],
)
def test_what_is_written_for_timm_says_where_its_classes_are_in_another_order(capsys, tmp_path, names, ending, told):
    source = save_small(tmp_path / "source.safetensors", names, classes=3)
    status, out, _ = run(capsys, source, tmp_path / f"out{ending}")
    assert status == 0
    assert ("class 1 is 'c10', and 'c2' in timm's natural order: timm takes" in out) == told
    assert out.count("note") == told
