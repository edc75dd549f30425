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
        words = repr(text.get_text())
        assert box.x0 >= -1 and box.y0 >= -1, f"{words} is cut by the page's edge"
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, f"{words} is cut by the page's edge"
        size = text.get_fontsize() * printed
        assert size >= SMALLEST - 0.01, f"{words} has {size:.1f} points at A4"
    for (one, a), (other, b) in combinations(texts, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 1 or high <= 1, f"{one.get_text()!r} and {other.get_text()!r} overlap"
