import pytest

from convert.errors import SettingsError
from train.data.dense.open import open_dense_sets


def _open(dataset, kind):
    return open_dense_sets(dataset, kind, seed=0, val_fraction=0.1)


def test_the_scenes_of_digits_are_the_default_of_both_tasks():
    assert _open("digits", "detection").class_names == tuple("0123456789")
    assert _open("digits", "segmentation").class_names == ("background", *"0123456789")


@pytest.mark.parametrize(
    "dataset, kind, message",
    [
        ("folder:x", "detection", "has neither boxes nor masks; for detection: digits, coco:PATH"),
        ("masks:x", "detection", "has masks; for detection: digits, coco:PATH"),
        ("coco:x", "segmentation", "has boxes; for segmentation: digits, masks:PATH"),
        ("voc:", "detection", "needs a path behind the colon"),
        ("coco:x/nowhere", "detection", "there is no file or folder x/nowhere"),
        ("yolo:x/nowhere.yaml", "detection", "cannot read x/nowhere.yaml: No such file"),
        ("masks:x/nowhere", "segmentation", "there is no folder x/nowhere"),
        (__file__, "detection", "is a path, and what is there is told before it: digits, coco:PATH"),
        ("cocoo:x", "detection", "did you mean 'coco'[?] Accepted: digits, coco:PATH"),
        ("masks", "segmentation", "unknown data set 'masks'.* Accepted: digits, masks:PATH"),
    ],
)
def test_data_sets_that_do_not_serve_a_task_are_refused_in_a_line(dataset, kind, message):
    with pytest.raises(SettingsError, match=message):
        _open(dataset, kind)
