"""A verdict as a short table in plain text, for a terminal and for a chat."""

from collections.abc import Sequence

from nightshift.refs import Guard, Verdict
from nightshift.text import plain

_WIDEST = 28


def guards_table(verdict: Verdict, most: int = 10) -> list[str]:
    """The whole and the guards that are broken or closest to it, a line each below a line of titles.

    Empty where nothing was compared.

    Args:
        most: how many guards are shown beside the whole.
    """
    if not verdict.guards:
        return []
    whole, *parts = verdict.guards
    rows = [("", "images", "points", "95 % interval", ""), *map(_row, [whole, *parts[:most]])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    if more := verdict.guarded - len(parts[:most]):
        lines.append(f"{more:,} more {'guards' if more > 1 else 'guard'}, further from being broken")
    return lines


def _row(guard: Guard) -> tuple[str, str, str, str, str]:
    name = plain(guard.name) or "(no name)"
    return (
        name if len(name) <= _WIDEST else f"{name[: _WIDEST - 1]}…",
        f"{guard.images:,}",
        f"{100 * guard.difference:+.2f}",
        f"{100 * guard.low:+.2f} to {100 * guard.high:+.2f}",
        "" if guard.ok else "refused",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, verdict = row
    cells = [name.ljust(widths[0])]
    cells += [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([*cells, verdict]).rstrip()
