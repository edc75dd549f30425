"""The pages of sweep.pdf."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from pages import no_overlaps
from sweep import pages, results
from test_sweep import record

ABOUT = "3 blocks; DIGITS"


def records_of(*cells):
    return [record(cls, 0, 4, seed, test) for cls, tests in cells for seed, test in enumerate(tests)]


def colours(figure):
    """Of the cells of the only panel."""
    image = figure.axes[0].images[0]
    return [tuple(image.to_rgba(image.get_array())[0, x, :3].round(2)) for x in range(image.get_array().shape[1])]


def test_only_differences_beyond_the_noise_have_colours():
    found = records_of((0, [80.0, 81.0, 82.0]), (2, [95.0, 96.25, 97.0]), (3, [80.0, 81.0, 82.5]), (4, [60, 60, 60]))
    (figure,) = pages.heat_maps(results.summarise(found), ABOUT)
    no_overlaps(figure)
    grey, more, less = (tuple(round(v, 2) for v in to_rgb(pages.DIFFERENCES[i])) for i in (1, 2, 0))
    zero, two, three, four = colours(figure)
    assert zero == three == grey and four == less
    assert two[2] > two[0] > two[1] and two != grey and more[2] > more[0]  # a lighter purple: it is the smaller one
    assert [text.get_text().split("\n")[-1] for text in figure.axes[0].texts] == ["n = 3", "+15.08", "+0.17", "-21.00"]


def test_without_seeds_for_an_interval_all_is_grey_and_ties_are_dashed():
    found = records_of((0, [80.0]), (2, [90.0]), (4, [90.0]))
    summary = results.summarise(found)
    (figure,) = pages.heat_maps(summary, ABOUT)
    no_overlaps(figure)
    assert len(set(colours(figure))) == 1 and len(figure.axes) == 1  # no colour bar
    frames = {
        round(p.get_x() + p.get_width() / 2): p.get_linestyle() for p in figure.axes[0].patches if type(p) is Rectangle
    }
    assert frames == {1: "--", 2: "-"}  # CLS at 4 has fewer FLOPs
    assert "tied with CLS at 2" in summary["verdict"]


def test_a_position_with_one_value_has_no_axes():
    found = records_of((0, [80.0, 81.0, 82.0]), (2, [90.0, 91.0, 92.0]))
    figure = pages.marginal_curves(found, ABOUT)
    no_overlaps(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == ["class token enters at block"]
    assert figure.axes[0].get_legend() is None
    assert pages.marginal_curves(records_of((0, [80.0])), ABOUT) is None
    no_overlaps(pages.accuracy_and_flops(results.summarise(found), ABOUT))


def covered(figure) -> list[str]:
    """Axes of the figure whose data a legend covers."""
    figure.draw_without_rendering()
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    return [axes.get_xlabel() for axes in figure.axes for box in legends if axes.get_window_extent().overlaps(box)]


@pytest.mark.parametrize("design", [{}, {"cls_mode": "reader", "class_attention": 2}])
def test_pages_of_a_large_grid(design):
    """Two positions, three counts of registers, and designs whose names are long."""
    counts = [(reg, count) for count in (0, 1, 16) for reg in ((0, 4, 8) if count else (None,))]
    found = [
        record(cls, reg, count, seed, 80 + 2 * seed + (cls or 0)) | other
        for cls in (0, 2, 4, 6, None) for reg, count in counts for seed in range(3) for other in ({}, design)
    ]  # fmt: skip
    sheets, curves = pages.heat_maps(results.summarise(found), ABOUT), pages.marginal_curves(found, ABOUT)
    for figure in (*sheets, curves, pages.accuracy_and_flops(results.summarise(found), ABOUT)):
        no_overlaps(figure)
        assert not covered(figure)
    colours = [{line.get_color() for line in axes.lines if line.get_marker() == "o"} for axes in curves.axes]
    assert colours[1] < colours[0] and len(colours[0]) == len(curves.axes[1].get_legend().get_texts())
    lacking = results.summarise(
        [one | {"hit_ratio": None if one["cls_pos"] is None else 40.0} for one in found], "hit_ratio"
    )
    assert "no such\nvalue" in [text.get_text() for text in pages.heat_maps(lacking, ABOUT)[0].axes[0].texts]
