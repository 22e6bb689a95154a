"""What the commands print to: a console that shows every string as it is, whoever wrote it."""

from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.text import Text

from nightshift.text import plain


class Screen(Console):
    """A console on which a string is one line, `text.plain`, without markup: printed, or in a cell of a table.

    Only `styled` text has a style.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        # rich would print what is neither text nor its own without asking `render_str`.
        super().print(*(part if isinstance(part, ConsoleRenderable) else str(part) for part in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def styled(text: object, style: str) -> Text:
    """The text, `plain`, in a style of rich's."""
    return Text(plain(text), style)


def joined(*parts: str | Text) -> Text:
    """The parts as one text, each with its style."""
    return Text.assemble(*(Text(plain(part)) if isinstance(part, str) else part for part in parts))
