"""Unreadable images are told once, by name and with the reason; too many of them are an error that lists them."""

import os

import numpy as np
import pytest

from convert.image_files import accepted_unreadable
from crossvit_jax.preprocess import FORMATS
from train.data.bad_images import BadImages, too_many_error, unreadable
from train.data.folders.classes import open_folder


@pytest.fixture
def source(image_folder):
    """Nine images; 2 is empty, 3 is text, 5 has vanished."""
    for i in range(10):
        image_folder(f"only/{i}.png")
    source = open_folder(image_folder(), val_fraction=0.01, seed=0).train
    paths = [os.path.join(source.root, file) for file in source.files]
    open(paths[2], "wb").close()
    with open(paths[3], "w") as file:
        file.write("no image")
    os.remove(paths[5])
    return source


def _indices(*values):
    return np.array(values, np.int32)


def test_each_bad_image_is_told_once_with_its_name_and_the_reason(source):
    told = []
    bad = BadImages(source, told.append)
    bad.add(_indices(-1, -1))
    assert (bad.count, bad.names, told) == (0, [], [])
    bad.add(_indices(-1, 3, -1, 3))
    bad.add(_indices(5, 3, 2, -1))
    bad.add(_indices(2, 3, 5))
    names = [os.path.join(source.root, source.files[i]) for i in (3, 2, 5)]
    assert bad.names == names
    assert bad.count == 3
    assert told == [
        f"cannot read image {names[0]}: it is in no image format that is read: {', '.join(FORMATS)}",
        f"cannot read image {names[1]}: it is empty",
        f"cannot read image {names[2]}: No such file or directory",
    ]


def test_unreadable_images_are_found_among_those_looked_at(source):
    np.testing.assert_array_equal(unreadable(source, np.arange(9)), [2, 3, 5])
    np.testing.assert_array_equal(unreadable(source, np.array([8, 3, 0])), [3])


def test_an_image_that_has_recovered_is_told_too(source):
    told = []
    bad = BadImages(source, told.append)
    bad.add(_indices(0))
    assert bad.names == [os.path.join(source.root, source.files[0])]
    assert told == [f"could not read image {bad.names[0]}, which can be read now"]


@pytest.mark.parametrize(
    ("share", "images", "count"),
    [(0.01, 40, 3), (0.01, 12, 1.2), (0.01, 4, 0.4), (0.01, 1000, 10), (0.2, 40, 8), (0, 40, 0), (1, 5, 5)],
)
def test_one_picture_of_a_small_data_set_does_not_stop_a_run(share, images, count):
    assert accepted_unreadable(share, images) == pytest.approx(count)


def test_too_many_bad_images_are_listed_up_to_20(source):
    bad = BadImages(source, lambda line: None)
    bad.add(_indices(2, 3, 5))
    message = str(too_many_error(bad, 3, 9, 0.25))
    assert message == (
        "3 of 9 images cannot be read, more than the share of 0.25 that is accepted (--max-bad-images): "
        + ", ".join(bad.names)
    )
    # other processes have met more
    assert str(too_many_error(bad, 7, 9, 0.25)).endswith(f"{bad.names[2]} and 4 more")
    bad.names = [str(i) for i in range(30)]
    assert str(too_many_error(bad, 30, 90, 0.25)).endswith(" 18, 19 and 10 more")
