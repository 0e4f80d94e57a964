"""Files that are odd, damaged or made to do harm: one line within a second, and no memory that they have not."""

import io
import json
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

import convert
from convert.__main__ import main
from convert.errors import ConversionError
from tests.command_line import refusal
from tests.train.small_weights import save_small, small_timm_model


@pytest.fixture(scope="module")
def state_dict():
    return {name: tensor.clone() for name, tensor in small_timm_model(3).state_dict().items()}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    from tests.small_model import shrink

    shrink(monkeypatch.setitem)


def _shared(*shape):
    return torch.zeros(1).expand(*shape)  # stride 0: a file of some bytes


_HEADS = {"head.0.weight": (10**12, 12), "head.0.bias": (10**12,)} | {
    "head.1.weight": (10**12, 24),
    "head.1.bias": (10**12,),
}
_CHANGES = {
    "elements that share memory": lambda: {name: _shared(*shape) for name, shape in _HEADS.items()},
    "70 axes; weights have 8 at most": lambda: {"norm.0.weight": torch.zeros([1] * 70)},
    "has dtype complex64": lambda: {"norm.0.weight": torch.zeros(12, dtype=torch.complex64).conj()},
    "is no plain tensor": lambda: {"norm.0.weight": torch.eye(12).to_sparse()},
    "20000 unexpected": lambda: {f"extra{i}.weight": torch.zeros(()).reshape(1) for i in range(20_000)},
    "is one name too many for norm.0.weight": lambda: {"module.norm.0.weight": torch.ones(12)},
    "1 unexpected": lambda: {"x" * 200_000 + "\x1b[31m\n": torch.ones(12)},
}


@pytest.mark.parametrize("message", _CHANGES)
def test_odd_tensors_of_torch_are_one_line(state_dict, tmp_path, capsys, message):
    file = tmp_path / "w.pth"
    torch.save(state_dict | _CHANGES[message](), file)
    begin = time.process_time()
    with warnings.catch_warnings(action="ignore"):
        torch.load(file, weights_only=True)
    torchs = time.process_time() - begin  # of 20,000 tensors 5 to 7 s on a slow machine, most of it all
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other libraries say nothing before
        # beartype looks at the hints of what is made first in a process, and only under tests: see pyproject.toml
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        line = refusal(capsys, "python -m convert", main, file, tmp_path / "out.safetensors")
    assert message in line
    assert line.strip().isprintable()
    assert len(line) < 20_000
    assert time.process_time() - begin - torchs < 5  # a second, where no one counts what the tests cover


def test_negative_tensors_keep_their_values(state_dict, tmp_path):
    torch.save(state_dict | {"norm.0.weight": torch._neg_view(state_dict["norm.0.weight"])}, tmp_path / "w.pth")
    found = convert.load_weights(tmp_path / "w.pth").tensors["norm.0.weight"]
    np.testing.assert_array_equal(found, -state_dict["norm.0.weight"].numpy())


def test_zips_that_torch_does_not_write_are_one_line(state_dict, tmp_path, capsys):
    stored = io.BytesIO()
    torch.save(state_dict, stored)
    files = {}
    with zipfile.ZipFile(stored) as source:
        for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", how) as archive:
                for part in source.infolist():
                    archive.writestr(part.filename, source.read(part))
            files[f"{how}.pth"] = packed.getvalue()
    encrypted = bytearray(stored.getvalue())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = encrypted.find(mark)
        while start >= 0:
            encrypted[start + place] |= 1
            start = encrypted.find(mark, start + 4)
    files["encrypted.pth"] = bytes(encrypted)
    npz = io.BytesIO()
    np.savez(npz, **{name: tensor.numpy() for name, tensor in state_dict.items()})
    files["w.npz"] = npz.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        line = refusal(capsys, "python -m convert", main, tmp_path / name, tmp_path / "out.safetensors")
        assert ("no data.pkl" if name == "w.npz" else "compressed or encrypted zip") in line


def _header(file, change):
    """Rewrites the header of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length])
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def _twice(header):
    text = header.decode()
    start = text.index('"norm.0.bias":')
    end = text.index("}", start) + 1
    return f"{text[:start]}{text[start:end]},{text[start:]}".encode()


def _set(place, value):
    def change(header):
        values = json.loads(header)
        values["norm.0.bias"][place] = value
        return json.dumps(values).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_twice, "has names twice: norm.0.bias"),
        (_set("shape", [12, *[1] * 80]), "norm.0.bias (81 axes)"),
        (_set("shape", [2**62, 2**62]), "truncated or damaged"),
        (_set("dtype", "F8_E4M3"), "truncated or damaged"),
        (lambda _: b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "truncated or damaged"),
        (lambda header: header.replace(b'\\"format\\": 2', b"[" * 100_000), "is damaged"),
    ],
)
def test_odd_headers_of_safetensors_are_one_line(tmp_path, capsys, change, message):
    file = save_small(tmp_path / "w.safetensors", "abc")
    _header(file, change)
    assert message in refusal(capsys, "python -m convert", main, file, tmp_path / "out.pth")


def _stages(file, number):
    """Changes what a file tells, as another program might have written it."""
    told = {b'\\"stages\\": 1,': b'\\"stages\\": ' + number + b",", b"crossvit-sha256": b"other"}

    def change(header):
        for old, new in told.items():
            assert old in header
            header = header.replace(old, new)
        return header

    _header(file, change)


def test_a_billion_stages_are_refused_before_a_model_is_made(tmp_path):
    file = save_small(tmp_path / "w.safetensors", "abc")
    _stages(file, b"1000000000")
    with pytest.raises(ConversionError, match="stages must be a whole number from 1 to"):
        convert.load_weights(file)
    file = save_small(tmp_path / "v.safetensors", "abc")
    _stages(file, b"1000")
    begin = time.process_time()
    with pytest.raises(ConversionError, match="they are of 2000 blocks, and it has 76 tensors"):
        convert.load_weights(file)
    assert time.process_time() - begin < 5


def _too_many(small_file, flood):
    content = small_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + length]), len(content) - 8 - length
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header | {f"{flood}{number}": empty for number in range(60_000)}).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize(
    ("flood", "message"), [("e", "has 60,0"), ("x" * 300, "a header of more than 16,777,216 bytes")]
)
def test_a_flood_of_tensors_is_refused_before_they_are_looked_at(tmp_path, flood, message):
    file = save_small(tmp_path / "w.safetensors", "abc")
    file.write_bytes(_too_many(file, flood))
    begin = time.process_time()
    with pytest.raises(ConversionError, match=message):
        convert.load_weights(file)
    assert time.process_time() - begin < 2


def test_a_header_longer_than_its_file_takes_no_memory(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(ConversionError, match="damaged"):
        convert.load_weights(folder)


def test_containers_that_hold_one_another_end(state_dict, tmp_path):
    """A pickle keeps once what is there many times: of each level there are 60 times as many as of the one above."""
    keys: dict = {}
    keys.update({f"key{number}": keys for number in range(60)})
    items: list = []
    items += [items] * 60
    for name, more, message in (
        ("dict", {"a": keys}, "more than 500,000 values"),
        ("list", {"model_ema": items}, None),
    ):
        file = tmp_path / f"{name}.pth"
        torch.save({"model": state_dict, **more}, file)
        begin = time.process_time()
        if message is None:
            assert convert.load_weights(file, image_size=48).config.num_classes == 3
        else:
            with pytest.raises(ConversionError, match=message):
                convert.load_weights(file, image_size=48)
        assert time.process_time() - begin < 4
