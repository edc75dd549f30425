"""The pages of sweep.pdf."""

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
    figure = pages.heat_maps(results.summarise(found), ABOUT)
    grey, more, less = (tuple(round(v, 2) for v in to_rgb(pages.DIFFERENCES[i])) for i in (1, 2, 0))
    zero, two, three, four = colours(figure)
    assert zero == three == grey and four == less
    assert two[2] > two[0] > two[1] and two != grey and more[2] > more[0]  # a lighter purple: it is the smaller one
    assert [text.get_text().split("\n")[-1] for text in figure.axes[0].texts] == ["n = 3", "+15.08", "+0.17", "-21.00"]


def test_without_seeds_for_an_interval_all_is_grey_and_ties_are_dashed():
    found = records_of((0, [80.0]), (2, [90.0]), (4, [90.0]))
    summary = results.summarise(found)
    figure = pages.heat_maps(summary, ABOUT)
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
