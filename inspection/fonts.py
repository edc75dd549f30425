"""Fonts for names in any script: an installed one that has the characters, or the escaped name."""

from functools import cache
from textwrap import wrap
from unicodedata import east_asian_width

PLAIN = "DejaVu Sans"  # comes with matplotlib


def drawable(text: str) -> str:
    r"""`text` without what no font here can draw: 猫 is \u732b where there is no font for it."""
    if text.isascii():
        return text
    known = frozenset().union(*map(_glyphs, fonts_of(text)))
    return "".join(c if c == "\n" or ord(c) in known else ascii(c)[1:-1] for c in text)


def letter_count(text: str) -> int:
    """How many letters wide it is: Chinese ones and the like count as two."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of what can be drawn of `text`, at most `width` letters wide."""
    filled = "".join(c + "\0" * (letter_count(c) - 1) for c in drawable(text))
    return [line.replace("\0", "") for line in wrap(filled, max(width, 2))]


def fonts_of(text: str) -> list[str]:
    """Installed families that have the characters of `text` between them, as far as there are any."""
    fonts, lacking = [PLAIN], {ord(c) for c in text if c.isprintable()} - _glyphs(PLAIN)
    while lacking:
        family = _family_with(min(lacking))
        fonts += [family] if family else []
        lacking -= _glyphs(family) if family else {min(lacking)}
    return fonts


def use_fonts(figure):
    """Give each text of a figure fonts that have its characters, and escape what none has; returns the figure.

    A name like `$a$` is drawn as it is; only matplotlib's own labels of logarithmic scales are TeX.
    """
    from matplotlib.text import Text

    for artist in figure.findobj(Text):
        text = artist.get_text()
        if not text.isascii():
            artist.set_text(drawable(text))
            artist.set_fontfamily(fonts_of(text))
        if "$" in text and r"\mathdefault" not in text:
            artist.set_parse_math(False)
    return figure


@cache
def _glyphs(family) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont

    return _glyphs_in(findfont(FontProperties(family=[family])))  # a name may have a "-"


@cache
def _glyphs_in(file) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(file).get_charmap())


@cache
def _family_with(character) -> str | None:
    from matplotlib.font_manager import fontManager

    fonts = (font for font in fontManager.ttflist if not font.name.startswith("Last Resort"))  # draws boxes
    # By file: to look for a family that has no plain weight prints a warning.
    fonts = sorted(fonts, key=lambda font: (font.style, font.stretch, font.weight) != ("normal", "normal", 400))
    return next((font.name for font in fonts if character in _glyphs_in(font.fname)), None)
