"""Untrusted text, made harmless for the place where it is shown. Nothing else in nightshift does that.

A class name, a key, a message or a file name may come from anybody who can write to the bucket. What was typed stays
visible, and nothing interprets it: no terminal, table, spreadsheet, Markdown page or figure.
"""

import json
import re
from typing import Any

# First to the last @ of a word and then from the left: one expression for both is slow on a long word.
_UP_TO_THE_LAST_AT = re.compile(r"(?<!\S)\S+@")
_PASSWORD = re.compile(r"//([^/:@]*):(?!\d{1,5}/).*@")
# In the middle of a line, nothing else means anything to CommonMark, to GitHub's tables and links, or to math.
_MARKDOWN = re.compile(r"[\\`*_~$<>&|@\[\]]|:(?=//)|(?<=www)\.")
_FORMULA = tuple("=+-@＝＋－＠")
_LABEL_LENGTH = 24


def masked(text: str) -> str:
    """The text with `***` for each password inside a URL, such as http://user:***@host."""
    return _UP_TO_THE_LAST_AT.sub(lambda word: _PASSWORD.sub(r"//\1:***@", word[0]), text)


def is_utf8(text: str) -> bool:
    """Whether it can be written in UTF-8, which the name of a file or a folder need not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(text: object) -> str:
    r"""The text as one line that nothing obeys, without passwords.

    Characters that `repr` escapes are escaped the same way: \x1b, \n, overrides of the writing direction, halves of
    surrogate pairs.
    """
    shown = str(text)
    if not shown.isprintable():
        shown = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode() for character in shown
        )
    return masked(shown)


def plain_lines(text: object) -> list[str]:
    """Each line of the text, `plain`: for messages that may have several."""
    return [plain(line) for line in str(text).split("\n")]


def markdown(text: object) -> str:
    """The text for the inside of a line or of a table's cell: no link, no HTML, no emphasis, no further cell.

    It uses character references, which mean the same to every reader of Markdown, in tables too.
    """
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", plain(text))


def csv_cell(value: Any) -> Any:
    """A value for a cell of CSV: a number as it is, and text that no spreadsheet takes for a formula.

    After OWASP's "CSV injection": a quote is put before what a formula may begin with.
    """
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def short(text: object) -> str:
    """The text as a label of a few words' length, `plain`."""
    shown = plain(text)
    return shown if len(shown) <= _LABEL_LENGTH else f"{shown[: _LABEL_LENGTH - 1]}…"


def figure_label(text: object) -> str:
    """The text for a figure: `short`, and no formula of matplotlib's."""
    return short(text).replace("$", r"\$")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON in printable ASCII (and line ends, if indented), from which the exact text can be read back."""
    # json.dumps escapes every other control character.
    return json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f")
