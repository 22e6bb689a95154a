"""Text that somebody writes into the bucket, or calls a file, to see whether it is obeyed where it is shown."""

HOSTILE = {
    "closing markup": "[/red]",
    "a link of rich's": "[link=file:///etc/passwd]x[/link]",
    "a title, a bell and a cleared screen": "\x1b]0;owned\x07\x1b[2J",
    "an eight-bit control": "\x9b31m",
    "a carriage return": "good\rbad",
    "another line": "a\nrun-2  finished",
    "right to left": "gnp\u202egnp.exe",
    "math": r"$\frac{$",
    "a formula": '=HYPERLINK("http://evil/?x")',
    "a cell": "a|b",
    "a script": "<script>alert(1)</script>",
    "the end of a link": "](javascript:x)",
    "a link": "[x](https://evil) <https://evil> https://evil www.evil.com",
    "emphasis": "**Promoted** ~~not~~ `x` _x_",
    "an emoji's name": ":skull:",
    "a password": "http://user:secret@host/",
    "much": "x" * 10_000,
    "nothing": "",
}


def is_harmless(printed: str) -> bool:
    """Whether a terminal shows all of this, line by line, and obeys none of it; and no password is in it."""
    return all(line.isprintable() for line in printed.split("\n")) and "secret" not in printed
