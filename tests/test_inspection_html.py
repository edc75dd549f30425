"""The file of `visualize_attention.py --format html`, opened from disk in a headless Chromium."""

import io
import json
import re
import shutil
import subprocess
import tarfile
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from selenium.webdriver import ActionChains, Keys

import visualize_attention
from browser import needs_browser
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from inspection import html, maps
from inspection.attention import rolled_shares, trace
from inspection.class_maps import relevance
from inspection.html import encode_image, write_viewer
from inspection.pages import COLOURS
from loading.memory import MemoryLoader, load_data
from models_dynamic import DynamicViT
from runs import noise, run, tiny
from tokens.layout import TokenLayout, blocks_with
from utils import BadInput

HOSTILE = '</script><script>window.hacked = 1</script><img src="https://example.org/x.png">&amp;"'


def model_words(model, name="late/best_model.pth"):
    return {
        "name": name, "depth": model.depth, "cls_pos": model.cls_pos, "dist_pos": model.dist_pos, "registers": [
            [(there := blocks_with(model, f"reg{r}"))[0], there[-1] + 1] for r in range(model.num_register_tokens)
        ],
    }  # fmt: skip


def encoded(model, image, name, blocks=None, **more):
    blocks = range(model.depth) if blocks is None else blocks
    attention = {i: model.attention(image[None], block=i)[0] for i in blocks}
    shown = (image * 40 + 128).clamp(0, 255).to(torch.uint8)
    layouts = {i: model.token_layout(i) for i in blocks}
    return encode_image(f"{name}.jpg, whole image", f"predicted: {name}", shown, layouts, attention, model.grid_size,
                        **more), attention  # fmt: skip


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """A model of 4 blocks, 3 heads, grid 4 x 6, in which tokens come and go; two images, one of them hostile."""
    model = tiny(cls_pos=2, reg_pos=(1, 0), reg_end=(4, 3), num_register_tokens=2)
    (one, first), (two, second) = (encoded(model, i, n) for i, n in zip(noise(model), ("lynx", HOSTILE), strict=True))
    file = tmp_path_factory.mktemp("viewer") / "attention.html"
    write_viewer(file, f"Attention of {HOSTILE}", [model_words(model)], [("lynx", [one]), (HOSTILE, [two])])
    return file, model, [first, second]


def expected(attention, layout, key, grid, head):
    """(out, in, half a step of each) of a token, in double precision."""
    rows = attention.double().numpy()
    place = layout.patches.start + int(key[7:]) * grid[1] + int(key[5:6]) if key.startswith("patch") else None
    if place is None:
        place = layout.cls.start if key == "cls" else layout.registers.start + layout.numbers.index(int(key[3:]))
    steps = rows[:, :, layout.patches].max(-1) / 255 / 2  # (H, N)
    heads = slice(None) if head == "mean" else slice(head, head + 1)
    out, into = rows[heads, place, layout.patches].mean(0), rows[heads, layout.patches, place].mean(0)
    return out, into, steps[heads, place].mean(0), steps[heads, layout.patches].mean(0)


@needs_browser
def test_every_map_is_the_attention(browser, explored):
    """Rows and columns of every block, head and kind of token, no further off than half a quantisation step."""
    file, model, attention = explored
    browser.open(file)
    for image in range(2):
        for block in range(model.depth):
            layout = model.token_layout(block)
            for head in ("mean", 0, 2):
                for key in ("patch4-2", "reg0", "reg1", "cls"):
                    out, into = browser.show(image=image, block=block, head=head, token=key)
                    why = {"cls": "enters at block 2", "reg0": "enters at block 1", "reg1": "left at block 3"}.get(key)
                    if block in {"cls": (0, 1), "reg0": (0,), "reg1": (3,)}.get(key, ()):
                        assert out is None and into is None
                        assert browser.text("#model0 .out .absent").endswith(f"absent at block {block} ({why})")
                        canvas = browser.driver.find_element("css selector", "#model0 .out .frame canvas")
                        assert not canvas.is_displayed()
                        continue
                    row, column, row_step, column_step = expected(attention[image][block], layout, key, (4, 6), head)
                    assert np.all(np.abs(out - row) <= row_step + 1e-7), (block, head, key)
                    exact = not key.startswith("patch")  # what goes to a token that is no patch is kept as it is
                    assert np.all(np.abs(into - column) <= (0 if exact else column_step) + 1e-6), (block, head, key)
                    assert not browser.driver.find_element("css selector", "#model0 .out .absent").is_displayed()


@needs_browser
def test_in_class_attention_only_cls_attends(browser, tmp_path):
    model = tiny(cls_pos=2, class_attention=1, num_register_tokens=1)
    image, attention = encoded(model, noise(model)[0], "lynx")
    write_viewer(tmp_path / "viewer.html", "Attention", [model_words(model)], [("lynx", [image])])
    browser.open(tmp_path / "viewer.html")
    out, _ = browser.show(image=0, block=3, head=0, token="cls")
    assert np.allclose(out, attention[3][0, 0, model.token_layout(3).patches], atol=1e-3)
    for token in ("reg0", "patch1-1"):
        out, into = browser.show(image=0, block=3, head=0, token=token)
        assert out is None and not np.any(into)  # patches do not attend to it either
        assert "does not attend at block 3" in browser.text("#model0 .out .absent")


PIXELS = """const canvas = document.querySelector(a), d = canvas.getContext("2d");
return [canvas.height, canvas.width, ...d.getImageData(0, 0, canvas.width, canvas.height).data]"""


def pixels(browser, selector):
    height, width, *values = browser.ask(PIXELS, selector)
    return np.array(values, np.uint8).reshape(height, width, 4)


@needs_browser
def test_an_attention_pooling_is_a_block_with_one_token(browser, tmp_path):
    """Of 2 heads after blocks of 3; the tokens before it have no rows there."""
    model = tiny(cls_pos=0, num_register_tokens=0)
    image = noise(model)[0]
    attention = {3: model.attention(image[None], block=3)[0], 4: (2 * torch.randn(2, 1, 24)).softmax(-1)}
    layouts = {3: model.token_layout(3), 4: TokenLayout(None, slice(0, 24), None, 24, pool=slice(0, 1))}
    rollout = {4: attention[4].mean(dim=0)}
    shown = torch.zeros(3, 16, 24, dtype=torch.uint8)
    view = encode_image("x.jpg", "", shown, layouts, attention, model.grid_size, rollout)
    write_viewer(tmp_path / "x.html", "x", [model_words(model) | {"pool_pos": 4}], [("x", [view])])
    browser.open(tmp_path / "x.html")
    assert browser.ask("return [viewer.state.block, viewer.state.token]") == [4, "pool"]
    for head, expected in (("mean", attention[4].mean(dim=0)[0]), (1, attention[4][1, 0])):
        out, into = browser.show(head=head)
        assert into is None and np.abs(out - expected.numpy()).max() <= float(attention[4].max()) / 509
    assert "attention pooling: nothing attends to it" in browser.text(".in .absent").lower()
    assert browser.show(head=2) == (None, None) and browser.text(".out .absent").endswith("has no head 2")
    assert browser.show(head="mean", token="patch0-0")[0] is None
    assert browser.text(".out .absent").endswith("at block 4, only the attention pooling does")
    out, _ = browser.show(token="pool", map="rollout")
    assert np.abs(out - rollout[4][0].numpy()).max() <= float(rollout[4].max()) / 509
    out, _ = browser.show(token="cls", block=3, map="attention")
    assert np.abs(out - attention[3][:, 0, 1:].mean(dim=0).numpy()).max() <= float(attention[3].max()) / 509
    assert browser.show(block=4)[0] is None and "left at block 4" in browser.text(".out .absent")
    assert browser.driver.get_log("browser") == []


@needs_browser
def test_keys_change_block_and_head(browser, explored):
    file, model, attention = explored
    browser.open(file)
    browser.show(block=2, head=1, token="cls", top=100, opacity=1)
    pictures = []
    for keys, block, head in ((None, 2, 1), (Keys.ARROW_RIGHT, 3, 1), (Keys.ARROW_RIGHT, 3, 1), (Keys.ARROW_DOWN, 3, 2),
                              (Keys.ARROW_LEFT, 2, 2)):  # fmt: skip
        if keys:
            browser.driver.find_element("css selector", "body").send_keys(keys)
            browser.settled()
        assert browser.ask("return [viewer.state.block, viewer.state.head]") == [block, head]
        values = browser.values("out")
        row, _, step, _ = expected(attention[0][block], model.token_layout(block), "cls", (4, 6), head)
        assert np.all(np.abs(values - row) <= step + 1e-7)
        colours = colormaps[COLOURS](values.reshape(4, 6) / values.max(), bytes=True)
        pictures.append(pixels(browser, "#model0 .out .frame canvas"))
        assert np.array_equal(pictures[-1], colours)
        assert browser.text("#model0 .out output") == f"{float(f'{100 * values.max():.3g}'):.3g} %"
    assert not np.array_equal(pictures[0], pictures[1])


@needs_browser
def test_a_hand_points_keeps_and_lets_go(browser, explored):
    file, model, attention = explored
    browser.open(file)
    browser.show(block=3, head="mean", token="cls")
    layout, cls = model.token_layout(3), browser.values("out")

    def shows(key, title):
        row, column, step, steps = expected(attention[0][3], layout, key, (4, 6), "mean")
        browser.settled()
        assert browser.text("#model0 .out figcaption") == f"{title} attends to"
        assert browser.text("#model0 .in figcaption") == f"Patches attend to {title[0].lower() + title[1:]}"
        assert np.all(np.abs(browser.values("out") - row) <= step + 1e-7)
        assert np.all(np.abs(browser.values("in") - column) <= steps + 1e-6)

    browser.point("#model0 .picture .frame", 4, 1, (4, 6)).perform()
    shows("patch4-1", "Patch 4,1")
    browser.point("#model0 .picture .frame", 0, 3, (4, 6)).perform()
    shows("patch0-3", "Patch 0,3")
    ActionChains(browser.driver, duration=0).move_by_offset(0, 200).perform()  # off the picture
    shows("cls", "Class token")
    assert np.array_equal(browser.values("out"), cls)
    browser.point("#model0 .picture .frame", 2, 2, (4, 6)).click().perform()
    browser.point("#model0 .out .frame", 5, 0, (4, 6)).perform()
    shows("patch2-2", "Patch 2,2")  # it is kept, and a map under the mouse tells its values
    reading = browser.text("#model0 .out .reading")
    assert reading.startswith("at 5,0: ")
    value = browser.values("out")[5]
    assert float(reading.split()[2]) == pytest.approx(100 * value, rel=6e-3)
    browser.driver.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    shows("cls", "Class token")


@needs_browser
def test_scale_and_sums(browser, explored):
    file, model, attention = explored
    browser.open(file)
    browser.show(block=2, head=0, token="reg1")
    at = model.token_layout(2).registers.start + 1
    row = attention[0][2][0, at].double()
    layout = model.token_layout(2)
    table = [line.text for line in browser.driver.find_elements("css selector", "#model0 .sums tbody tr")]
    shares = {"patches, all": row[layout.patches].sum(), "Class token": row[layout.cls.start],
              "Register 0": row[at - 1], "itself": row[at], "total": 1}  # fmt: skip
    for name, share in shares.items():
        line = next(line for line in table if line.startswith(name))
        assert float(line.removeprefix(name).split()[0]) == pytest.approx(100 * float(share), rel=6e-3)
    places = {b: at.registers.start + at.numbers.index(1) for b in range(3) if (at := model.token_layout(b))}
    rows = {b: attention[0][b][:, place, model.token_layout(b).patches] for b, place in places.items()}
    largest = [max(float(rows[b].max()) for b in blocks) for blocks in ((2,), (0, 1, 2))]
    for scale, top in zip(("heads", "blocks"), largest, strict=True):
        browser.show(scale=scale, top=100)
        assert float(browser.text("#model0 .out output").split()[0]) == pytest.approx(100 * top, rel=6e-3)


@needs_browser
def test_nothing_leaves_the_page_and_no_name_breaks_it(browser, explored):
    file, _, _ = explored
    for kind in ("browser", "performance"):
        browser.driver.get_log(kind)  # empties it
    browser.open(file)
    browser.show(image=1, block=3, token="patch0-0", scale="blocks")
    assert browser.ask("return window.hacked ?? null") is None
    assert browser.text("h1") == f"Attention of {HOSTILE}"
    assert browser.driver.title == f"Attention of {HOSTILE} · {HOSTILE} · block 3 · Patch 0,0 · mean over heads"
    assert browser.text("#model0 .about") == f"late/best_model.pth · {HOSTILE}.jpg, whole image · 6 x 4 patches"
    assert browser.text("#model0 .picture figcaption") == HOSTILE
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert f"file://{file}" in asked
    assert all(url.partition("#")[0] == f"file://{file}" or url.startswith("data:") for url in asked)
    assert browser.driver.get_log("browser") == []


@needs_browser
def test_on_a_phone(browser, explored):
    file, model, attention = explored
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        browser.open(file)
        browser.show(block=3, token="cls")
        assert browser.ask("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        box = browser.ask("""document.querySelector("#model0 .picture").scrollIntoView();
            const b = document.querySelector("#model0 .picture .frame").getBoundingClientRect();
            return [b.x, b.y, b.width, b.height]""")
        point = {"x": box[0] + box[2] * 3.5 / 6, "y": box[1] + box[3] * 2.5 / 4}
        for kind, points in (("touchStart", [point]), ("touchEnd", [])):
            browser.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        browser.ask(
            "for (let i = 0; i < 200 && viewer.state.token !== 'patch3-2'; i++)"
            " await new Promise((r) => setTimeout(r, 5))"
        )
        browser.settled()
        assert browser.ask("return viewer.state.token") == "patch3-2"
        row, _, step, _ = expected(attention[0][3], model.token_layout(3), "patch3-2", (4, 6), "mean")
        assert np.all(np.abs(browser.values("out") - row) <= step + 1e-7)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


@needs_browser
def test_the_file_of_the_script(browser, trained, tmp_path, capsys):
    """Some blocks of several images of a checkpoint's test set."""
    argv = ["--model_path", trained / "model.pth", "--format", "html", "--img_num", 3, 0, "--layer_num", 0, 2]
    status, out, err = run(visualize_attention.main, [*argv, "--output_dir", tmp_path], capsys)
    assert status == 0, err
    (file,) = tmp_path.iterdir()
    assert str(file) in out and "2 images, blocks 0, 2" in out
    browser.open(file)
    disabled = [not b.is_enabled() for b in browser.driver.find_elements("css selector", "#blocks button")]
    assert disabled == [False, True, False]
    checkpoint = load_checkpoint(trained / "model.pth")
    images, _ = next(iter(MemoryLoader(load_data("DIGITS", None, (32, 32)).test, checkpoint["data"], 4)))
    maps = model_from_checkpoint(checkpoint).attention_maps(images, [2])[2].cls  # (B, H, gh, gw): what the pages show
    for image, number in enumerate((3, 0)):
        for head in range(3):
            out, _ = browser.show(image=image, block=2, head=head, token="cls")
            data = maps[number, head].flatten().numpy()
            assert np.abs(out - data).max() <= data.max() / 510 + 1e-6
    browser.driver.find_element("css selector", "body").send_keys(Keys.ARROW_LEFT)
    browser.settled()
    assert browser.ask("return viewer.state.block") == 0  # block 1 is not in the file
    assert browser.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A model of grid 4 x 6 with a register, and one of grid 2 x 3 and depth 2 without; maps of all kinds."""
    models = [tiny(cls_pos=1, num_register_tokens=1), tiny(patch_size=8, depth=2, num_heads=2, num_register_tokens=0)]
    views, attentions, rolled = [], [], []
    for model in models:
        image, shares, roll = noise(model)[0], {}, rolled_shares(model)
        trace(model, image[None], attention=lambda i, attn, at=shares, roll=roll: at.update({i: roll(i, attn)[0]}))
        classes = {"gradient x attention, dog": relevance(model, image[None])[0]}
        view, attention = encoded(model, image, "lynx", rollout=shares, classes=classes)
        views, attentions, rolled = [*views, view], [*attentions, attention], [*rolled, (shares, classes)]
    file = tmp_path_factory.mktemp("compared") / "compared.html"
    words = [model_words(model, name) for model, name in zip(models, ("fine.pth", "coarse.pth"))]
    write_viewer(file, "Attention of fine.pth and coarse.pth", words, [("lynx", views)])
    return file, models, attentions, rolled


@needs_browser
def test_two_models_side_by_side(browser, compared):
    file, models, attentions, _ = compared
    browser.open(file)
    browser.show(block=1, head=1, token="patch5-2")
    for m, (key, grid) in enumerate((("patch5-2", (4, 6)), ("patch2-1", (2, 3)))):  # the same place
        row, column, step, steps = expected(attentions[m][1], models[m].token_layout(1), key, grid, 1)
        assert np.all(np.abs(np.array(browser.ask("return viewer.values('out', a)", m)) - row) <= step + 1e-7)
        assert np.all(np.abs(np.array(browser.ask("return viewer.values('in', a)", m)) - column) <= steps + 1e-6)
        assert browser.text(f"#model{m} .out figcaption") == f"Patch {key[5]},{key[7]} attends to"
    browser.point("#model1 .picture .frame", 0, 1, (2, 3)).click().perform()
    browser.settled()
    assert browser.ask("return viewer.state.token") == "patch1-3"
    assert [browser.text(f"#model{m} .out figcaption")[:9] for m in range(2)] == ["Patch 1,3", "Patch 0,1"]
    away = browser.driver.find_element("css selector", "h1")
    browser.point("#model1 .picture .frame", 0, 1, (2, 3)).click().move_to_element(away).perform()  # releases it
    for change, words in (
        ({"token": "reg0"}, "Register 0: not in this model"),
        ({"token": "cls", "head": 2}, "coarse.pth has no head 2"),
        ({"token": "cls", "block": 3, "head": 0}, "coarse.pth has no block 3 in this file"),
    ):
        browser.show(**change)
        assert browser.text("#model1 .out .absent") == words
        assert browser.values("out") is not None
    assert browser.text("#model1 .about").startswith("coarse.pth · lynx.jpg, whole image · 3 x 2 patches")


@needs_browser
def test_rollout_and_class_maps(browser, compared):
    file, models, _, rolled = compared
    browser.open(file)
    for m, model in enumerate(models):
        shares, classes = rolled[m]
        for key in ("cls", "patch1-1"):
            browser.show(map="rollout", block=1, token=key)
            grid, layout = model.grid_size, model.token_layout(1)
            ours = key if m == 0 or key == "cls" else "patch0-0"  # the same place in a grid half as fine
            at = layout.cls.start if key == "cls" else layout.patches.start + int(ours[7]) * grid[1] + int(ours[5])
            want = shares[1][at].numpy()
            out = browser.ask("return viewer.values('out', a)", m)
            assert np.abs(np.array(out) - want).max() <= want.max() / 510 + 1e-7
        browser.show(map="class0")
        out = browser.ask("return viewer.values('out', a)", m)
        assert out == pytest.approx(classes["gradient x attention, dog"].flatten().tolist(), rel=1e-4, abs=1e-9)
        assert browser.text(f"#model{m} .out figcaption") == "gradient x attention, dog"
    assert not browser.driver.find_element("css selector", "#blocks").is_displayed()


@needs_browser
def test_a_link_restores_the_view_and_the_address_follows(browser, explored):
    file, model, _ = explored
    browser.driver.get("about:blank")
    browser.open(f"{file}#image=1&block=2&token=reg1&head=1&curve=log")
    assert browser.ask("const s = viewer.state; return [s.image, s.block, s.token, s.head, s.curve]") == [
        1, 2, "reg1", 1, "log"]  # fmt: skip
    browser.show(block=3, token="patch4-1", head="mean", curve="linear")
    assert browser.driver.current_url.endswith("#image=1&block=3&token=patch4-1")
    browser.ask("location.hash = '#image=0&block=1&token=reg0'; await new Promise((r) => setTimeout(r, 50))")
    browser.settled()
    assert browser.ask("return [viewer.state.image, viewer.state.block, viewer.state.token]") == [0, 1, "reg0"]
    browser.driver.get("about:blank")
    browser.open(f"{file}#image=9&block=1")
    assert browser.text("#problem").startswith("The link cannot be followed: there is no image 9.")
    assert browser.ask("return [viewer.state.image, viewer.state.block]") == [0, 3]
    browser.show(block=2)
    assert not browser.driver.find_element("css selector", "#problem").is_displayed()


@needs_browser
def test_colours_grow_with_attention_to_a_printed_percentile(browser, explored):
    """Half way up a scale of 0.6, alpha is 0.5 ** (1 / 0.6 - 1); a logarithmic scale has three decades."""
    file, _, _ = explored
    browser.driver.get("about:blank")
    browser.open(file)
    out, _ = browser.show(block=3, head=0, token="cls")
    top = np.percentile(out, 99)
    assert browser.text("#model0 .out output") == f"{float(f'{100 * top:.3g}'):.3g} %"
    words = f"99th percentile of this map, largest {float(f'{100 * out.max():.3g}'):.3g} %"
    assert browser.text("#model0 .out .top") == words
    for curve, level in (("linear", out / top), ("log", 1 + np.log10(out / top) / 3)):
        browser.show(curve=curve)
        level = np.clip(level, 0, 1).reshape(4, 6)
        alpha = pixels(browser, "#model0 .out .frame canvas")[..., 3]
        assert np.abs(alpha - 255 * level ** (1 / 0.6 - 1)).max() <= 1
    assert browser.text("#model0 .out .low") == f"{float(f'{top / 10:.3g}'):.3g} %"
    grey = browser.ask("""const photo = document.querySelector("#model0 .out img");
        const c = document.createElement("canvas"); await photo.decode(); c.getContext("2d").drawImage(photo, 0, 0);
        return [...c.getContext("2d").getImageData(0, 0, 24, 16).data]""")
    grey = np.array(grey).reshape(16, 24, 4)
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])


BYTES = "return Array.from(new Uint8Array(await (await viewer.exported(a)).arrayBuffer()))"


@needs_browser
def test_the_view_as_svg_and_png(browser, explored, tmp_path):
    file, _, _ = explored
    browser.open(file)
    browser.show(image=1, block=2, token="reg1", head=0, map="attention")
    svg = ElementTree.fromstring(bytes(browser.ask(BYTES, "svg")))
    words = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    header = f"late/best_model.pth · {HOSTILE}.jpg, whole image · 6 x 4 patches · block 2 · Register 1 · head 0"
    assert words[0] == header and "Register 1 attends to" in words
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}image"))) == 3
    assert len([r for r in svg.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill-opacity")]) == 2 * (24 + 64)
    width, height = float(svg.get("width")), float(svg.get("height"))
    image = Image.open(io.BytesIO(bytes(browser.ask(BYTES, "png"))))
    assert image.size == pytest.approx((2 * width, 2 * height), abs=2)
    assert len(image.convert("RGB").getcolors(10**6)) > 100  # photo and maps are there
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    browser.driver.find_elements("css selector", "#save button")[1].click()
    for _ in range(100):
        if saved := [file for file in tmp_path.glob("*.svg") if file.stat().st_size]:  # at first it is empty
            break
        time.sleep(0.05)
    assert saved[0].name.endswith(".svg") and ElementTree.parse(saved[0]).getroot().tag.endswith("svg")


@pytest.fixture(scope="session")
def axe(pytestconfig):
    """The source of axe-core, which npm keeps between runs."""
    folder = pytestconfig.cache.mkdir("axe-core")
    if not (kept := list(folder.glob("axe-core-*.tgz"))):
        if not shutil.which("npm"):
            pytest.skip("needs axe-core: apt-get install npm")
        call = ["npm", "pack", "axe-core@4", "--fetch-retries=0", "--fetch-timeout=10000"]
        subprocess.run(call, cwd=folder, capture_output=True, timeout=60, check=False)
        if not (kept := list(folder.glob("axe-core-*.tgz"))):
            pytest.skip("needs axe-core: npm cannot fetch it, without network or package index")
    with tarfile.open(kept[0]) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(browser, explored, compared, axe, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for file, change in (
            (explored[0], {"token": "reg0"}),
            (compared[0], {"token": "patch1-1", "block": 1}),
            (compared[0], {"map": "class0"}),
        ):
            browser.open(file)
            browser.show(**change)
            browser.driver.execute_script(axe)
            found = browser.ask("return (await axe.run()).violations")
            found = [(f["id"], f["impact"], [n["html"] for n in f["nodes"]][:2]) for f in found]
            assert [f for f in found if f[1] in ("serious", "critical")] == []
            assert browser.ask("return document.documentElement.scrollWidth") <= width
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_without_a_mouse(browser, explored):
    """Arrow keys on the picture select patches, what is shown is announced, and the focus can be seen."""
    file, _, _ = explored
    browser.open(file)
    browser.show(image=0, block=3, token="cls", head="mean")
    frame = browser.driver.find_element("css selector", "#model0 .picture .frame")
    for key, token in ((Keys.ARROW_RIGHT, "patch3-2"), (Keys.ARROW_RIGHT, "patch4-2"), (Keys.ARROW_UP, "patch4-1")):
        frame.send_keys(key)
        browser.settled()
        assert browser.ask("return [viewer.state.block, viewer.state.token]") == [3, token]
    values = browser.values("out")
    at = int(values.argmax())
    said = browser.ask("return document.querySelector('#said').textContent")
    assert said.startswith("Patch 4,1 attends to: largest ") and f" at {at % 6},{at // 6}, " in said
    assert browser.ask("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    frame.send_keys(Keys.ESCAPE)
    browser.settled()
    assert browser.ask("return viewer.state.token") == "cls"


def about_of(file):
    return json.loads(re.search('id="about">(.*)</script>', file.read_text())[1])


def test_models_and_images_of_the_same_name_are_told_apart(trained, photos, tmp_path, capsys, monkeypatch):
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
        shutil.copy(trained / "model.pth", tmp_path / name / "best_model.pth")
        Image.new("RGB", (60, 40), "red").save(tmp_path / name / "dog.png")
    files = [tmp_path / name / "best_model.pth" for name in ("early", "late")]
    images = [tmp_path / name / "dog.png" for name in ("early", "late")]
    argv = ["--format", "html", "--pages", "rollout", "class", "--target", "3", "--output_dir", tmp_path / "new"]
    status, _, err = run(visualize_attention.main, ["--compare", *files, "--image_path", *images, *argv], capsys)
    assert status == 0, err
    (file,) = (tmp_path / "new").iterdir()
    about, title = about_of(file), "Attention of early/best_model.pth and late/best_model.pth: 2 images"
    assert file.name == "compared_2_images.html" and about["title"] == title
    assert f"<title>{title}</title>" in file.read_text()
    assert [model["name"] for model in about["models"]] == ["early/best_model.pth", "late/best_model.pth"]
    assert [picture["name"] for picture in about["pictures"]] == ["early/dog.png", "late/dog.png"]
    view = about["pictures"][1]["views"][0]
    assert view["about"] == "dog.png, centre crop of 60 x 40 pixels"
    assert list(view["classes"]) == ["gradient x attention, 3", "Grad-CAM, input of block 2, 3"]
    assert list(view["rollout"]) == ["0", "1", "2"]
    status, _, err = run(visualize_attention.main, html_argv(trained, tmp_path, "--pages", "heads"), capsys)
    assert status == 2 and "of --pages leave out heads" in err
    monkeypatch.setitem(maps.PAGES, "mine", "of my own")
    status, _, err = run(visualize_attention.main, html_argv(trained, tmp_path, "--pages", "rollout", "mine"), capsys)
    assert status == 2 and "of --pages leave out mine" in err  # rather than a file without it


def test_size_of_a_vit_small(tmp_path):
    """12 blocks, 6 heads, 196 patches, CLS and 4 registers; random rows are the hardest to compress."""
    model = DynamicViT(img_size=224, patch_size=16, embed_dim=6, depth=12, num_heads=6, num_classes=2,
                       cls_pos=0, reg_pos=0, num_register_tokens=4)  # fmt: skip
    attention = {i: torch.randn(6, 201, 201).mul(2).softmax(-1) for i in range(12)}
    layouts = {i: model.token_layout(i) for i in range(12)}
    shown = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    picture = encode_image("noise", "", shown, layouts, attention, (14, 14))
    size = write_viewer(tmp_path / "a.html", "Attention", [model_words(model)], [("noise", [picture])])
    assert size == (tmp_path / "a.html").stat().st_size
    assert 1e6 < size < 5e6


def html_argv(trained, tmp_path, *more):
    return ["--model_path", trained / "model.pth", "--format", "html", "--output_dir", tmp_path / "new", *more]


def test_a_size_that_is_too_large_is_refused_before_anything_is_computed(trained, tmp_path, capsys, monkeypatch):
    model = model_from_checkpoint(load_checkpoint(trained / "model.pth"))
    size = html.packed_size({i: model.token_layout(i) for i in range(3)}, 3)
    argv = html_argv(trained, tmp_path, "--img_num", 0, 1)
    monkeypatch.setattr(html, "LIMIT", 2 * size)
    assert run(visualize_attention.main, argv, capsys)[0] == 0
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(html, "LIMIT", 2 * size - 1)
    monkeypatch.setattr("inspection.maps.watch_calls", lambda *_, **__: pytest.fail("attention was computed"))
    monkeypatch.setattr(DynamicViT, "forward", lambda *_: pytest.fail("an image was classified"))
    status, _, err = run(visualize_attention.main, argv, capsys)
    assert status == 2
    assert "choose fewer blocks (--layer_num), fewer images, or a smaller --input_size" in err
    assert not (tmp_path / "new").exists()


def test_unreadable_images_are_left_out_and_listed(trained, photos, tmp_path, capsys):
    shutil.copytree(photos / "test" / "red", tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    argv = html_argv(trained, tmp_path, "--image_path", tmp_path / "images", "--layer_num", 2)
    status, out, err = run(visualize_attention.main, argv, capsys)
    assert status == 1
    assert "1 of 3 images could not be read, the others are done: cannot read the image" in err and "1.png" in err
    assert "2 images, blocks 2" in out
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "attention_2_images.html"
    assert [picture["name"] for picture in about_of(file)["pictures"]] == ["0.png", "2.png"]


def test_what_cannot_be_shown(tmp_path, monkeypatch):
    model = tiny(cls_pos=0, num_register_tokens=0)
    picture, attention = encoded(model, noise(model)[0], "a", [1])
    layouts = {1: model.token_layout(1)}
    attention[1][0, 3, 4] = float("nan")
    with pytest.raises(BadInput, match="block 1 is not finite"):
        encode_image("a", "", torch.zeros(3, 16, 24, dtype=torch.uint8), layouts, attention, model.grid_size)
    monkeypatch.setattr(html, "LIMIT", 1.5 * picture["bytes"])
    write_viewer(tmp_path / "one.html", "one", [model_words(model)], [("noise", [picture])])
    with pytest.raises(BadInput, match="choose fewer blocks"):
        write_viewer(tmp_path / "two.html", "two", [model_words(model)], [("noise", [picture])] * 2)
    assert not (tmp_path / "two.html").exists()
