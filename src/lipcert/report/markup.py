"""HTML from values: text is always escaped, elements are always closed."""

import html
import math
from collections.abc import Collection, Iterable, Sequence

_SPACE = "\N{NO-BREAK SPACE}"
_VOID = ("meta", "img", "br")


class Html(str):
    """Text that is HTML already; everything else is escaped on its way into an element."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: str) -> Html:
    """An element.

    Args:
        name: Its name.
        children: Its content in order: `Html` as it is, anything else as escaped text.
        attributes: Its attributes; `class_` stands for `class`, an underscore for a hyphen.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object, by: str = "") -> Html:
    """Pieces one after the other, escaped unless they are `Html`."""
    return Html(by.join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, words: Collection[str] = ()
) -> Html:
    """A table that scrolls sideways where it is too wide.

    Args:
        head: One heading a column.
        rows: The cells; the first of a row names the row.
        words: The headings of columns of text. They are aligned left, as the first column is; all
            others are numbers and aligned right.
    """
    sides = ["left" if i == 0 or title in words else "right" for i, title in enumerate(head)]

    def row(cells: Sequence[object], first: Html) -> Html:
        others = (tag("td", c, class_=s) for c, s in zip(cells[1:], sides[1:], strict=True))
        return tag("tr", first, *others)

    titles = (tag("th", t, scope="col", class_=s) for t, s in zip(head, sides, strict=True))
    body = (row(cells, tag("th", cells[0], scope="row", class_="left")) for cells in rows)
    whole = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", join(*body, by="\n")))
    return tag("div", whole, class_="scroll", tabindex="0")


def percent(fraction: float | None) -> str:
    """A fraction in percent with one decimal."""
    return "–" if fraction is None else f"{100 * fraction:z.1f}{_SPACE}%"


def number(value: float | None) -> str:
    """A number with three decimals, or in powers of ten where these say too little."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.2e}"


def rounded_down(radius: float) -> str:
    """A radius with three decimals, none more than was certified."""
    if math.isinf(radius):
        return "∞"
    return f"{math.floor(radius * 1000) / 1000:.3f}" if radius >= 1e-3 else "<0.001"
