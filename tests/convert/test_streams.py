"""What is printed of anybody's text."""

import pytest

from convert.streams import safe, tell, tell_error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\r\nfake: error", r"a\x1b[31mred\r\nfake: error"),
        ("a\x9b2J", r"a\x9b2J"),
        ("a\udcff\u202e", r"a\udcff\u202e"),
        ("猫 · é", "猫 · é"),
    ],
)
def test_what_would_move_the_cursor_is_written_out(text, shown, capsys):
    assert safe(text) == shown
    tell_error(text)
    assert capsys.readouterr().err == f"{shown}\n"
    tell(f"one\n{text}".replace("\n", " "))
    assert capsys.readouterr().out.count("\n") == 1


def test_a_line_is_written_in_one_piece(monkeypatch):
    """With -u, or where a stream writes through, print would write its end apart: another process comes between."""
    written = []
    stream = type("Stream", (), {"write": lambda self, text: written.append(text), "flush": lambda self: None})()
    for name, function in (("stdout", tell), ("stderr", tell_error)):
        monkeypatch.setattr(f"sys.{name}", stream)
        function("a line")
    assert written == ["a line\n"] * 2


def test_lines_of_ours_stay_lines(capsys):
    tell("one\ntwo\x1b")
    assert capsys.readouterr().out == "one\ntwo\\x1b\n"


def test_of_what_nobody_reads_the_middle_is_left_out():
    text = safe("begin" + "x" * 10**6 + "end")
    assert len(text) < 10_000
    assert text.startswith("begin")
    assert text.endswith("end")
