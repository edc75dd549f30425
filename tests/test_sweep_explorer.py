"""sweep.html in a real browser: numbers and maps are those of the records and of the models."""

import json
import shutil

import numpy as np
import pytest
import torch

import position_sweep
from browser import needs_browser
from checkpoints.models import load_model
from loading.memory import MemoryLoader, load_data
from runs import TINY
from sweep import cells, explorer, measures, pages, results
from training.film import token_maps

GRID = [*TINY, *"--data_set DIGITS --cls_pos 0 2 none --reg_pos 0 --num_reg 0 2 --seeds 0 1".split()]
GRID += "--repeats 0.2 --epochs 2 --mixup 0 --cutmix 0".split()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "IMAGES", 16)
        patch.setattr(pages, "draw_sweep", lambda *_: None)
        position_sweep.main([*GRID, "--output_dir", str(folder)])
    return folder


def opened(browser, file):
    browser.driver.get_log("browser")
    browser.driver.get(f"file://{file}")
    return browser.ask("return explorer.file")


@needs_browser
def test_the_numbers_and_the_maps_of_every_cell(browser, swept):
    content = opened(browser, swept / "sweep.html")
    records, data = results.collect(swept), load_data("DIGITS", None, (32, 32))
    assert len(content["cells"]) == 6 and len(records) == 12
    few = data.val.part(range(4))
    for i, cell in enumerate(content["cells"]):
        browser.ask("explorer.show({ cell: a, side: 0, block: 2 })", i)
        text = browser.text("section")
        mine = [r for r in records if results.label(r) == cell["label"]]
        tops = [record["test_top1"] for record in mine]
        assert cell["label"] in text and f"{np.mean(tops):.2f}" in text
        assert cell["values"]["flops"] == [record["flops"] / 1e6 for record in mine]
        path = explorer.path_of(swept, mine[0])
        epochs = [line for line in map(json.loads, path.with_name("log.txt").open()) if "epoch" in line]
        assert cell["curves"]["0"] == [epoch["val_top1"] for epoch in epochs]
        model, checkpoint = load_model(path)
        with torch.no_grad():
            found = token_maps(model, next(iter(MemoryLoader(few, checkpoint["data"], 4)))[0])
        assert cell["maps"]["tokens"].keys() == found.keys()
        for key, maps in found.items():
            for block in range(3):
                for image in range(4):
                    packed = cell["maps"]["tokens"][key][block][image]
                    absent = np.isnan(maps[image, block]).any()
                    assert (packed is None) == absent
                    if not absent:
                        shown = browser.ask("return Array.from(explorer.decode(a))", packed)
                        assert np.abs(np.array(shown) - maps[image, block].ravel()).max() <= packed["top"] / 509
        count = "return document.querySelectorAll('section .absent').length"
        absent, before = browser.ask(count), browser.ask(f"explorer.show({{ block: 1 }}); {count}")
        assert cell["column"] != "2" or (absent, before > 0) == (0, True)
    curves = "return [document.querySelectorAll('section polyline').length, document.querySelectorAll('figure').length]"
    assert browser.ask(curves) == [4, 2]
    browser.ask("explorer.file.cells.forEach((c) => { c.curves = { 0: [50] } }); explorer.show({ block: 1 })")
    assert browser.ask(curves) == [0, 0]  # one epoch makes no curve
    assert browser.driver.get_log("browser") == []


@needs_browser
def test_clicks_fill_the_sides_and_colours_follow_the_measure(browser, swept):
    content = opened(browser, swept / "sweep.html")
    labels = [cell["label"] for cell in content["cells"]]

    def sides():
        return [element.text for element in browser.driver.find_elements("css selector", "section h2")]

    def click(start):
        buttons = browser.driver.find_elements("css selector", "button")
        next(b for b in buttons if (b.get_attribute("aria-label") or b.text).startswith(start)).click()

    assert len(set(sides())) == 2
    click("right")
    click(labels[4])
    click("left")
    click(labels[1])
    assert sides() == [labels[1], labels[4]]
    assert browser.ask("return document.activeElement.getAttribute('aria-label')").startswith(labels[1])
    shades = "return [...document.querySelectorAll('#grids button')].map((b) => b.style.background)"
    before = browser.ask(shades)
    browser.ask("explorer.show({ measure: 'flops' })")
    flops = [cell["values"]["flops"][0] for cell in content["cells"]]
    assert browser.ask(shades) != before
    ends = [output.text for output in browser.driver.find_elements("css selector", "#scale output")]
    assert [float(end) for end in ends] == pytest.approx([min(flops), max(flops)], abs=0.01)


@needs_browser
def test_the_verdict_on_another_measure(browser, swept, tmp_path):
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    explorer.write_explorer(tmp_path, load_data("DIGITS", None, (32, 32)), "", "loss")
    content = opened(browser, tmp_path / "sweep.html")
    assert "by loss (less is better)" in content["verdict"]
    marks = "return [...document.querySelectorAll('#grids small')].map((mark) => mark.textContent)"
    assert "best" in browser.ask(marks) and "best held-out" not in browser.ask(marks)
    cell = next(cell for cell in content["cells"] if cell["against"])
    base = next(one for one in content["cells"] if one["base"] and one["panel"] == cell["panel"])
    browser.ask("explorer.show({ cell: a, side: 0 })", content["cells"].index(cell))
    mean = np.mean(cell["values"]["test_loss"]) - np.mean(base["values"]["test_loss"])
    assert cell["against"]["mean"] == pytest.approx(mean)
    assert f"Against 0/0: test loss {mean:+.2f}." in browser.text("section")  # two seeds have no interval


@needs_browser
def test_positions_that_fell_say_when(browser, swept, tmp_path):
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("cells/*/model.pth"):
        file.unlink()
    place = {**dict.fromkeys(cells.AXES), **cells.DESIGN, "num_reg": 2, "rung": 1}
    fell = [
        place | {"cls_pos": 1, "reg_pos": 0, "epochs": 2, "val_top1": {"mean": 61.25, "sd": 1.0, "n": 2}},
        place | {"cls_pos": 2, "reg_pos": 1, "epochs": 1, "val_top1": None},
    ]
    halved = {"fell": fell, "eta": 3, "rungs": [(1, 2), (3, 1)], "positions": fell}
    explorer.write_explorer(tmp_path, load_data("DIGITS", None, (32, 32)), "", halved=halved)
    content = opened(browser, tmp_path / "sweep.html")
    assert len(content["cells"]) == 6
    grid = browser.driver.find_elements("css selector", "#grids table")[1]
    rows = [
        [td.text.split("\n") for td in tr.find_elements("tag name", "td")]
        for tr in grid.find_elements("tag name", "tr")
    ]
    assert len(rows[1]) == 4 and rows[1][1] == ["stopped after 2 epochs", "held-out 61.25 %"]  # CLS at 0, 1, 2, none
    assert rows[2][2] == ["stopped after 1 epoch", "a cell failed"] and rows[2][0] == [""]
    assert browser.driver.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_cut_off_and_nothing_leaves_the_page(browser, swept, width):
    browser.driver.set_window_size(width, 900)
    opened(browser, swept / "sweep.html")
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert browser.ask("return document.documentElement.scrollWidth") <= width
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.set_window_size(1280, 900)
    text = (swept / "sweep.html").read_text()
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_hostile_names_and_cells_without_models(swept, tmp_path):
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    data = load_data("DIGITS", None, (32, 32))
    data.classes = ["</script><script>hacked = 1</script>"] * 10
    for file in tmp_path.glob("cells/*/model.pth"):
        file.unlink()
    size = explorer.write_explorer(tmp_path, data, "<b>")
    text = (tmp_path / "sweep.html").read_text()
    assert size == len(text.encode()) and "hacked = 1</script>" not in text
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert all(cell["maps"] is None for cell in content["cells"]) and content["images"][0]["name"] == data.classes[0]
