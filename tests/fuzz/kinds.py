"""Damaged and hostile input of every kind that is read, each from a seed; and what should come of it.

A kind has a template, which is made once, and a function that damages it, gives it to the code that people call, and
returns its exit status. What should not be is raised: a result that is wrong though nothing was said.
"""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import convert
from convert.__main__ import main as convert_main
from convert.command_line import run
from convert.errors import UserError
from convert.formats.run_folder import how_trained
from convert.image_files import FORMATS, LeftOut, image_files
from convert.metadata import DIGEST, describe, understand
from convert.training.run_checkpoint import read_run_checkpoint
from crossvit_jax.config import get_config
from crossvit_jax.preprocess import UnreadableImage
from tests.fuzz.damage import VALUES, damage_a_file, damaged_bytes, damaged_json
from tests.fuzz.dense import DENSE_KINDS, make_dense_templates
from tests.fuzz.requests import request
from tests.small_model import small_config, small_detector, small_segmenter
from train.config import TrainConfig
from train.flags import parse_flags
from train.images.transforms import EvalTransform
from train.run.folder import run_behind, write_config
from train.run.metrics_log import MetricsLog, read_metrics

_FLAGS = [f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__]
_TEXTS = [value for value in VALUES if isinstance(value, str)] + [
    "-1",
    "0",
    "1",
    "1e400",
    "nan",
    "0.5,1",
    "1,1/0",
    "é",
]
_TEXTS += ["data=4", "natural", "digits", "folder:", "folder:/dev/null", "~nobody/x", "host:99999", "embed_dim=1"]

_ENDINGS = ["", ".png", ".jpg", "\n.png", "\udcff.png", ".txt"]


def make_templates(folder: Path) -> int:
    """What is damaged, in a folder. Uses jax: in a process of its own."""
    from tests.train.small_weights import save_small

    source = convert.load_weights(save_small(folder / "w.safetensors", "abc"))
    convert.save(source.tensors, source.config, folder / "w.pth")
    convert.save(source.tensors, source.config, folder / "orbax", class_names=source.class_names)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for form in FORMATS:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form)
        (folder / f"picture.{form}").write_bytes(file.getvalue())
    make_dense_templates(folder)
    return 0


def picture(chance: random.Random, templates: Path, work: Path) -> int:
    content = (templates / f"picture.{chance.choice(list(FORMATS))}").read_bytes()
    sample = {"image": damaged_bytes(chance, content), "label": 0, "name": "x"}
    try:
        image = EvalTransform((48, 48), 0.875, chance.choice(["keep", "apply"]))(sample)["image"]
    except UnreadableImage as error:
        assert str(error).isprintable()
        return 2
    assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)
    return 0


def _converted(source: Path, templates: Path, work: Path, *flags: str, checked: bool) -> int:
    """`checked`: the format has checksums, so that what is read is what was written."""
    out = work / "out.safetensors"
    status = convert_main([str(source), str(out), "--overwrite", *flags])
    assert status in (0, 2)
    if status == 0 and checked:
        ours, theirs = convert.load_weights(out).tensors, convert.load_weights(templates / "w.safetensors").tensors
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours), "wrong weights, and nothing said"
    return status


def safetensors(chance: random.Random, templates: Path, work: Path) -> int:
    content = (templates / "w.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    file = work / "w.safetensors"
    if chance.random() < 0.4:  # a bit of the weights or of the header, as a disk flips it
        start = chance.choice([0, 8 + length])
        place = chance.randrange(start, len(content) if start else 8 + length)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
        return _converted(file, templates, work, checked=True)
    header = json.loads(content[8 : 8 + length])
    said = header["__metadata__"]
    del said[DIGEST]  # or all else that is wrong would be told as that
    if chance.random() < 0.5:
        said["crossvit"] = damaged_json(chance, json.loads(said["crossvit"])).decode("latin-1")
        text = json.dumps(header).encode()
    else:
        text = damaged_json(chance, header)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return _converted(file, templates, work, checked=False)


def torch_file(chance: random.Random, templates: Path, work: Path) -> int:
    file = work / "w.pth"
    file.write_bytes(damaged_bytes(chance, (templates / "w.pth").read_bytes()))
    branches = map(str, small_config(3).branches)  # which such a file does not tell
    return _converted(file, templates, work, "--image-size=48", "--branches", *branches, checked=True)


def orbax(chance: random.Random, templates: Path, work: Path) -> int:
    folder = work / "orbax"
    shutil.copytree(templates / "orbax", folder)
    damage_a_file(chance, folder)
    return _converted(folder, templates, work, checked=True)


def description(chance: random.Random, templates: Path, work: Path) -> int:
    classifiers = [small_config(3), get_config("15-dagger-408", num_classes=3)]
    config = chance.choice([*classifiers, small_detector(), small_segmenter()])
    names = tuple(f"c{number}" for number in range(config.num_classes))
    text = damaged_json(chance, describe(config, names, chance.choice([None, "keep"]))).decode("utf-8", "replace")
    try:
        config, names = understand(text)
    except UserError:
        return 2
    assert names is None or len(names) == config.num_classes
    return 0


def settings(chance: random.Random, templates: Path, work: Path) -> int:
    run_settings = {
        "train": {},
        "model": describe(small_config(3), None),
        "data": {"fingerprint": "x", "steps_per_epoch": 2},
    }
    fields = TrainConfig.__dataclass_fields__.values()
    run_settings["train"] = {field.name: field.default for field in fields}
    write_config(work, run_settings)
    (work / "config.json").write_bytes(damaged_json(chance, run_settings))
    how_trained(work)
    run_behind(str(work))
    with contextlib.suppress(UserError):
        read_run_checkpoint(work)

    def resumed() -> int:
        parse_flags([f"--resume={work}"])
        return 0

    return run("train", resumed)


def log(chance: random.Random, templates: Path, work: Path) -> int:
    lines = [{"step": step, "epoch": 1, "train/loss": 2.5, "eval/top1": 50.0} for step in range(1, 20)]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if chance.random() < 0.5:
        content = b"\n".join(damaged_json(chance, line) for line in lines)
    (work / "metrics.jsonl").write_bytes(damaged_bytes(chance, content))
    log = MetricsLog(work, position=chance.choice([0, 100, len(content), 10**6]), say=lambda line: print(line))
    log.write(step=30, epoch=2, values={"train/loss": 1.0})
    log.close()
    assert read_metrics(work)[-1] == {"step": 30, "epoch": 2, "train/loss": 1.0}
    return 0


def flags(chance: random.Random, templates: Path, work: Path) -> int:
    given = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        flag, text = chance.choice(_FLAGS), chance.choice(_TEXTS)
        given.append(f"{flag}={text}")

    def parsed() -> int:
        parse_flags(given)
        return 0

    return run("train", parsed)


def image_folder(chance: random.Random, templates: Path, work: Path) -> int:
    root = work / "images"
    root.mkdir()
    folders = [root]
    for index in range(chance.randrange(1, 12)):
        place = chance.choice(folders) / (str(index) + chance.choice(_ENDINGS))
        how = chance.randrange(6)
        if how == 0:
            place.mkdir()
            folders.append(place)
        elif how == 1:
            os.mkfifo(place)
        elif how == 2:
            place.symlink_to(chance.choice([root, place, "/dev/zero", "..", "../..", chance.choice(folders)]))
        else:
            place.write_bytes(b"x")
    left_out = LeftOut()
    found = image_files(root, left_out=left_out)
    assert len(found) == len(set(found))
    assert all(note.isprintable() for note in left_out.notes())
    return 0


KINDS: dict[str, Callable[[random.Random, Path, Path], int]] = {
    kind.__name__: kind
    for kind in (picture, safetensors, torch_file, orbax, description, settings, log, flags, image_folder, request)
} | DENSE_KINDS
