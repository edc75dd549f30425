"""The file of `visualize_attention.py --format html`, opened from disk in a headless Chromium."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service

import visualize_attention
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from conftest import noise, run, tiny
from inspection import html
from inspection.html import encode_image, write_viewer
from inspection.pages import COLOURS
from loading.memory import MemoryLoader, load_data
from models_dynamic import DynamicViT
from tokens.layout import blocks_with
from utils import BadInput

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
HOSTILE = '</script><script>window.hacked = 1</script><img src="https://example.org/x.png">&amp;"'
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


class Browser:
    def __init__(self, folder):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS.split(), f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_script_timeout(30)

    def open(self, file):
        self.driver.get(f"file://{file}")
        self.ask("await viewer.ready")

    def ask(self, words, *args):
        """The value of an async function's body; `args` are its a, b, ..."""
        names = ", ".join("abcd"[: len(args)])
        call = f"(async ({names}) => {{ {words} }})(...Array.from(arguments).slice(0, -1))"
        done = "const done = arguments[arguments.length - 1];"
        answer = self.driver.execute_async_script(
            f"{done} {call}.then((value) => done({{ value }}), (error) => done({{ error: String(error) }}))", *args
        )
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def show(self, **change):
        self.ask("await viewer.show(a)", change)
        return self.values("out"), self.values("in")

    def values(self, direction):
        values = self.ask("return viewer.values(a)", direction)
        return None if values is None else np.array(values)

    def settled(self):
        """Wait for what a hand has begun."""
        self.ask("while (document.body.dataset.status === 'loading') await new Promise((r) => setTimeout(r, 5))")

    def text(self, selector):
        return self.driver.find_element("css selector", selector).text

    def point(self, selector, x, y, grid):
        """Move the mouse to the middle of a patch; returns the chain to go on with."""
        frame = self.driver.find_element("css selector", selector)
        width, height = frame.size["width"], frame.size["height"]
        dx, dy = round(((x + 0.5) / grid[1] - 0.5) * width), round(((y + 0.5) / grid[0] - 0.5) * height)
        return ActionChains(self.driver, duration=0).move_to_element_with_offset(frame, dx, dy)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.driver.quit()


def model_words(model):
    return {
        "depth": model.depth, "heads": model.model_args["num_heads"], "cls_pos": model.cls_pos,
        "dist_pos": model.dist_pos, "registers": [
            [(there := blocks_with(model, f"reg{r}"))[0], there[-1] + 1] for r in range(model.num_register_tokens)
        ],
    }  # fmt: skip


def encoded(model, image, name, blocks=None):
    blocks = range(model.depth) if blocks is None else blocks
    attention = {i: model.attention(image[None], block=i)[0] for i in blocks}
    shown = (image * 40 + 128).clamp(0, 255).to(torch.uint8)
    layouts = {i: model.token_layout(i) for i in blocks}
    return encode_image(name, f"predicted: {name}", shown, layouts, attention, model.grid_size), attention


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """A model of 4 blocks, 3 heads, grid 4 x 6, in which tokens come and go; two images, one of them hostile."""
    model = tiny(cls_pos=2, reg_pos=(1, 0), reg_end=(4, 3), num_register_tokens=2)
    (one, first), (two, second) = (encoded(model, i, n) for i, n in zip(noise(model), ("lynx", HOSTILE), strict=True))
    file = tmp_path_factory.mktemp("viewer") / "attention.html"
    write_viewer(file, f"Attention of {HOSTILE}", model_words(model), [one, two])
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
                        assert browser.text("#out .absent").endswith(f"absent at block {block} ({why})")
                        assert not browser.driver.find_element("css selector", "#out .frame canvas").is_displayed()
                        continue
                    row, column, row_step, column_step = expected(attention[image][block], layout, key, (4, 6), head)
                    assert np.all(np.abs(out - row) <= row_step + 1e-7), (block, head, key)
                    exact = not key.startswith("patch")  # what goes to a token that is no patch is kept as it is
                    assert np.all(np.abs(into - column) <= (0 if exact else column_step) + 1e-6), (block, head, key)
                    assert not browser.driver.find_element("css selector", "#out .absent").is_displayed()


@needs_browser
def test_in_class_attention_only_cls_attends(browser, tmp_path):
    model = tiny(cls_pos=2, class_attention=1, num_register_tokens=1)
    image, attention = encoded(model, noise(model)[0], "lynx")
    write_viewer(tmp_path / "viewer.html", "Attention", model_words(model), [image])
    browser.open(tmp_path / "viewer.html")
    out, _ = browser.show(image=0, block=3, head=0, token="cls")
    assert np.allclose(out, attention[3][0, 0, model.token_layout(3).patches], atol=1e-3)
    for token in ("reg0", "patch1-1"):
        out, into = browser.show(image=0, block=3, head=0, token=token)
        assert out is None and not np.any(into)  # patches do not attend to it either
        assert "does not attend at block 3" in browser.text("#out .absent")


PIXELS = """const canvas = document.querySelector(a), d = canvas.getContext("2d");
return [canvas.height, canvas.width, ...d.getImageData(0, 0, canvas.width, canvas.height).data]"""


def pixels(browser, selector):
    height, width, *values = browser.ask(PIXELS, selector)
    return np.array(values, np.uint8).reshape(height, width, 4)


@needs_browser
def test_keys_change_block_and_head(browser, explored):
    file, model, attention = explored
    browser.open(file)
    browser.show(block=2, head=1, token="cls")
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
        pictures.append(pixels(browser, "#out .frame canvas"))
        assert np.array_equal(pictures[-1], colours)
        assert browser.text("#out output") == f"{float(f'{100 * values.max():.3g}'):.3g} %"
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
        assert browser.text("#out figcaption") == f"{title} attends to"
        assert browser.text("#in figcaption") == f"Patches attend to {title[0].lower() + title[1:]}"
        assert np.all(np.abs(browser.values("out") - row) <= step + 1e-7)
        assert np.all(np.abs(browser.values("in") - column) <= steps + 1e-6)

    browser.point("#picture .frame", 4, 1, (4, 6)).perform()
    shows("patch4-1", "Patch 4,1")
    browser.point("#picture .frame", 0, 3, (4, 6)).perform()
    shows("patch0-3", "Patch 0,3")
    ActionChains(browser.driver, duration=0).move_by_offset(0, 200).perform()  # off the picture
    shows("cls", "Class token")
    assert np.array_equal(browser.values("out"), cls)
    browser.point("#picture .frame", 2, 2, (4, 6)).click().perform()
    browser.point("#out .frame", 5, 0, (4, 6)).perform()
    shows("patch2-2", "Patch 2,2")  # it is kept, and a map under the mouse tells its values
    reading = browser.text("#out .reading")
    assert reading.startswith("at 5,0: ")
    value = browser.values("out")[5]
    assert float(reading.split()[2]) == pytest.approx(100 * value, rel=6e-3)
    browser.driver.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    shows("cls", "Class token")


@needs_browser
def test_opacity_scale_and_sums(browser, explored):
    file, model, attention = explored
    browser.open(file)
    browser.show(block=2, head=0, token="reg1")
    browser.show(opacity=0.25)
    assert browser.ask("return getComputedStyle(document.querySelector('#out .frame canvas')).opacity") == "0.25"
    at = model.token_layout(2).registers.start + 1
    row = attention[0][2][0, at].double()
    layout = model.token_layout(2)
    table = [line.text for line in browser.driver.find_elements("css selector", "#sums tbody tr")]
    shares = {"patches, all": row[layout.patches].sum(), "Class token": row[layout.cls.start],
              "Register 0": row[at - 1], "itself": row[at], "total": 1}  # fmt: skip
    for name, share in shares.items():
        line = next(line for line in table if line.startswith(name))
        assert float(line.removeprefix(name).split()[0]) == pytest.approx(100 * float(share), rel=6e-3)
    places = {b: at.registers.start + at.numbers.index(1) for b in range(3) if (at := model.token_layout(b))}
    rows = {b: attention[0][b][:, place, model.token_layout(b).patches] for b, place in places.items()}
    largest = [max(float(rows[b].max()) for b in blocks) for blocks in ((2,), (0, 1, 2))]
    for scale, top in zip(("heads", "blocks"), largest, strict=True):
        browser.show(scale=scale)
        assert float(browser.text("#out output").split()[0]) == pytest.approx(100 * top, rel=6e-3)


@needs_browser
def test_nothing_leaves_the_page_and_no_name_breaks_it(browser, explored):
    file, _, _ = explored
    for kind in ("browser", "performance"):
        browser.driver.get_log(kind)  # empties it
    browser.open(file)
    browser.show(image=1, block=3, token="patch0-0", scale="blocks")
    assert browser.ask("return window.hacked ?? null") is None
    assert browser.text("h1") == f"Attention of {HOSTILE}" == browser.driver.title
    assert browser.text("#picture figcaption") == HOSTILE
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert f"file://{file}" in asked
    assert all(url == f"file://{file}" or url.startswith("data:") for url in asked)
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
        box = browser.ask("""document.querySelector("#picture").scrollIntoView();
            const b = document.querySelector("#picture .frame").getBoundingClientRect();
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


def test_size_of_a_vit_small(tmp_path):
    """12 blocks, 6 heads, 196 patches, CLS and 4 registers; random rows are the hardest to compress."""
    model = DynamicViT(img_size=224, patch_size=16, embed_dim=6, depth=12, num_heads=6, num_classes=2,
                       cls_pos=0, reg_pos=0, num_register_tokens=4)  # fmt: skip
    attention = {i: torch.randn(6, 201, 201).mul(2).softmax(-1) for i in range(12)}
    layouts = {i: model.token_layout(i) for i in range(12)}
    shown = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    picture = encode_image("noise", "", shown, layouts, attention, (14, 14))
    size = write_viewer(tmp_path / "a.html", "Attention", model_words(model), [picture])
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
    about = re.search('id="about">(.*)</script>', file.read_text())[1]
    assert [picture["name"] for picture in json.loads(about)["pictures"]] == ["0", "2"]


def test_what_cannot_be_shown(tmp_path, monkeypatch):
    model = tiny(cls_pos=0, num_register_tokens=0)
    picture, attention = encoded(model, noise(model)[0], "a", [1])
    layouts = {1: model.token_layout(1)}
    attention[1][0, 3, 4] = float("nan")
    with pytest.raises(BadInput, match="block 1 is not finite"):
        encode_image("a", "", torch.zeros(3, 16, 24, dtype=torch.uint8), layouts, attention, model.grid_size)
    monkeypatch.setattr(html, "LIMIT", 1.5 * picture["bytes"])
    write_viewer(tmp_path / "one.html", "one", model_words(model), [picture])
    with pytest.raises(BadInput, match="choose fewer blocks"):
        write_viewer(tmp_path / "two.html", "two", model_words(model), [picture, picture])
    assert not (tmp_path / "two.html").exists()
