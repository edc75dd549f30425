"""What every page must keep to, whatever is on it."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

A4 = (8.27, 11.69)  # inches
SMALLEST = 6  # points


def drawn_texts(figure) -> list[tuple[Text, object]]:
    """Each text that drawing the figure draws, ticks included, and its bounding box in pixels."""
    found, draw = [], Text.draw

    def seen(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append((self, self.get_window_extent(renderer)))
        draw(self, renderer)

    figure.set_dpi(200)  # as in PDFs: letters are wider at fewer, where they fill whole pixels
    Text.draw = seen
    try:
        FigureCanvasAgg(figure).draw()
    finally:
        Text.draw = draw
    return found


def no_overlaps(figure):
    """No two texts share a pixel, the page cuts none, and none is under 6 points once the page is printed at A4."""
    texts = drawn_texts(figure)
    assert texts
    width, height = figure.get_size_inches()
    printed = max(min(a / width, b / height, 1) for a, b in (A4, A4[::-1]))
    for text, box in texts:
        words, (right, upper) = repr(text.get_text()), figure.bbox.max
        out = {"left": -box.x0, "lower": -box.y0, "right": box.x1 - right, "upper": box.y1 - upper}
        for edge, pixels in out.items():
            assert pixels <= 2, f"{words} is cut by the {edge} edge of the page ({pixels:.0f} pixels)"
        size = text.get_fontsize() * printed
        assert size >= SMALLEST - 0.01, f"{words} has {size:.1f} points at A4"
    for (one, a), (other, b) in combinations(texts, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 2 or high <= 2, f"{one.get_text()!r} and {other.get_text()!r} overlap"
