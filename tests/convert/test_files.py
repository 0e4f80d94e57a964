"""Files that are written whole or not at all."""

import os

import pytest

from convert.errors import ConversionError
from convert.files import NotWritten, csv_text, home_path, local_path, typed_path, write_whole


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten, match=f"{path} could not be written: no space left on device"):
        write_whole(path, b"newer")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])


@pytest.mark.parametrize(
    ("text", "what_to_do"),
    [
        ("gs://bucket/run", "use a path here, and copy with gcloud storage cp -r"),
        ("S3://bucket/run", "use a path here, and copy with aws s3 cp --recursive"),
        ("https://example.org/w.pth", "download it with curl -LO, and name the file"),
        (
            "https://huggingface.co/timm/crossvit_tiny_240.in1k/blob/main/model.safetensors",
            "weights on the Hugging Face hub are hf-hub:timm/crossvit_tiny_240.in1k",
        ),
        ("hf://timm/crossvit_tiny_240.in1k", "weights on the Hugging Face hub are hf-hub:timm/crossvit_tiny_240.in1k"),
        ("file:///data/w.pth", "name the path itself: /data/w.pth"),
        ("abfs+x://container@account/run", "use a path here, and copy"),
        ("gs:/bucket/run", "use a path here, and copy with gcloud storage cp -r"),
        ("dbfs:/mnt/run", "use a path here, and copy"),
    ],
)
def test_an_address_is_told_from_a_path_with_what_to_do(text, what_to_do):
    for read in (local_path, typed_path):
        with pytest.raises(ConversionError) as told:
            read(text)
        assert str(told.value) == f"{text} is an address, not a path on this machine: {what_to_do}"


@pytest.mark.parametrize("text", ["a:b", "C:/x", "a//b", "./gs://x", "hf-hub:timm/x", "é://x", ""])
def test_other_texts_are_paths(text):
    assert local_path(text) == text


def test_an_empty_text_names_no_path():
    with pytest.raises(ConversionError, match="a path is needed, and the text is empty"):
        home_path("")


def test_cells_that_spreadsheets_would_compute_are_quoted():
    cells = ["=cmd()", "+1+1", "-x", "@a", "\t=a", "-0.5", "+1e3", "cat", "猫=1", "a\udcff", 7, -7]
    assert csv_text([cells]) == "'=cmd(),'+1+1,'-x,'@a,'\t=a,-0.5,+1e3,cat,猫=1,a\udcff,7,-7\n"
