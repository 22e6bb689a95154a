"""Text of others: visible and obeyed nowhere."""

import csv
import io
import json
import re
from html import escape

import pytest
from markdown_it import MarkdownIt

from nightshift.errors import StorageError
from nightshift.text import as_json, csv_cell, figure_label, markdown, masked, plain, plain_lines
from tests.hostile import HOSTILE, is_harmless

texts = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


@texts
def test_plain_text_is_one_line_that_a_terminal_obeys_nowhere(text: str) -> None:
    assert plain(text).isprintable()
    assert is_harmless(plain(text))


def test_what_cannot_be_printed_is_shown_as_repr_shows_it() -> None:
    shown = plain("\x1b[2J \r \n \u202e \udcff café \u8c93")
    assert shown == r"\x1b[2J \r \n \u202e \udcff café " + "\u8c93"
    assert plain_lines("one\ntwo\r") == ["one", r"two\r"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:9000/x?y", "http://user:***@host:9000/x?y"),
        (
            "(http://:secret@host), postgresql+asyncpg://u:se@cr/et@db/x",
            "(http://:***@host), postgresql+asyncpg://u:***@db/x",
        ),
        ("http://user:***@host", "http://user:***@host"),
        ("http://user@host http://localhost:9000/reports/a@b s3://bucket/a:b@c 12:30@x", None),
    ],
)
def test_a_password_in_a_url_is_masked_and_nothing_else(text: str, shown: str | None) -> None:
    assert masked(text) == (text if shown is None else shown)
    assert plain(text) == masked(text)


def test_masking_a_long_text_takes_no_longer_than_reading_it() -> None:
    for hostile in ("//a:" * 250_000, "//" * 500_000, "x@//a:" * 200_000, "@" * 1_000_000):
        masked(hostile)


def test_no_error_of_nightshifts_holds_a_password() -> None:
    error = StorageError("http://user:secret@host:9000 does not answer")
    assert str(error) == "http://user:***@host:9000 does not answer"
    assert "secret" not in repr(error)


@texts
def test_text_in_markdown_stays_in_its_cell_and_means_nothing(text: str) -> None:
    page = f"# {markdown(text)}\n\n| a | b |\n|---|---|\n| {markdown(text)} | end |\n"
    assert page.count("|") == 9
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page)
    assert set(re.findall(r"<(\w+)", html)) == {"h1", "table", "thead", "tbody", "tr", "th", "td"}
    assert f"<td>{escape(plain(text).strip())}</td>\n<td>end</td>" in html
    assert not re.search(r"://|www\.", page)  # what GitHub's Markdown makes a link of by itself


@texts
def test_a_spreadsheet_takes_text_for_no_formula_and_numbers_for_numbers(text: str) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text), csv_cell(-0.5), csv_cell(None)])
    shown, number, nothing = next(csv.reader(io.StringIO(file.getvalue())))
    assert not shown.startswith(("=", "+", "-", "@"))
    assert shown.removeprefix("'") == plain(text)
    assert (number, nothing) == ("-0.5", "")


@texts
def test_a_label_of_a_figure_is_short_and_no_formula(text: str) -> None:
    assert len(figure_label(text).replace(r"\$", "$")) <= 24
    assert not re.search(r"(?<!\\)\$", figure_label(text))


@pytest.mark.parametrize("text", [*HOSTILE.values(), "\x7f", "\udcff"])
def test_json_is_exact_and_has_no_control_characters(text: str) -> None:
    assert as_json({text: text}).isprintable()
    assert json.loads(as_json({text: text}, indent=1)) == {text: text}
