"""Files that are written whole or not at all."""

import os

import pytest

from convert.files import NotWritten, write_whole


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten, match=f"{path} could not be written: no space left on device"):
        write_whole(path, b"newer")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])
