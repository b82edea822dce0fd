"""The page in a real browser: from a file, with the network off. `make test-browser` runs it."""

import base64
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_sparse_moe import explain_routing
from hf_sparse_moe.insight.page import _blocks, _number, _percent, _signed
from insight.conftest import TEXTS


pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MANY = [*TEXTS, "法院可以依法罚款。", "يجوز للمحكمة أن تفرض غرامة"] * 5
PHONE, DESK = (375, 800), (1200, 900)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        told = "needs Debian's packages chromium and chromium-driver: `make test-browser` in CI installs them"
        (pytest.fail if os.environ.get("SPARSE_MOE_REQUIRE_BROWSER") == "1" else pytest.skip)(told)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver


@pytest.fixture
def explained(mixture, tokenizer):
    groups = [*["political_speech", "python_code"] * 3, "中文", "عربي"] * 5
    return explain_routing(mixture("llama"), tokenizer, MANY, groups, ablate=True)


@pytest.fixture
def page(browser, explained, tmp_path):
    """The page opened; afterwards, that it wrote no error and asked for nothing outside."""
    path = tmp_path / "routing.html"
    explained.to_html(path)
    browser.get_log("browser"), browser.get_log("performance")
    look(browser, DESK)
    browser.get(path.as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


def look(browser, size, scheme="light"):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def shown_rows(explained, side="decoder"):
    return np.concatenate(
        [list(block) for block in _blocks(explained.measurement, explained.measurement.tokens[side])]
    )


def test_the_slider_and_the_tokens(page, explained):
    from selenium.webdriver import ActionChains, Keys

    words, rows = find(page, ".text span"), shown_rows(explained)
    assert len(words) == len(rows)
    slider, output = find(page, "input[type=range]")[0], find(page, "output")[0]
    for key, place in ((Keys.HOME, 0), (Keys.END, 1), (Keys.ARROW_LEFT, 0)):
        slider.send_keys(key)
        layer = explained.measurement.layers[place]
        assert output.text == layer.label
        shown = page.execute_script(
            "return [...document.querySelectorAll('.text span')].map((word) => word.dataset.e)"
        )
        assert list(map(int, shown)) == layer.index[rows, 0].tolist()

    layer, panel = explained.measurement.layers[0], find(page, ".panel")[0]

    def assert_panel_shows(row):
        found = [(int(e), float(share)) for e, share in re.findall(r"expert (\d+) ([\d.]+) %", panel.text)]
        assert [e for e, _ in found] == layer.index[row].tolist()
        np.testing.assert_allclose([share / 100 for _, share in found], layer.weights[row], atol=0.01)
        entropy = float(re.search(r"entropy of the router ([\d.]+)", panel.text)[1])
        assert entropy == pytest.approx(layer.entropy[row], abs=0.01)
        assert "margin to the runner-up" in panel.text

    ActionChains(page).scroll_to_element(words[3]).move_to_element(words[3]).perform()
    assert_panel_shows(rows[3])
    page.execute_script("arguments[0].focus()", words[3])
    words[3].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == words[4]
    assert_panel_shows(rows[4])
    slider.send_keys(Keys.END)
    layer = explained.measurement.layers[1]
    assert_panel_shows(rows[4])


def assert_card_is_that_of_the_dict(page, explained, place, expert):
    card, layer = find(page, f"#x-{place}-{expert}")[0], explained.to_dict()["layers"][place]
    assert card.is_displayed()
    assert f"load {_number(layer['load'][expert] * layer['num_experts'])}×" in card.text
    rows = {row.text.split("\n")[0].split(" ")[0]: row for row in card.find_elements("css selector", "tbody tr")}
    for name, values in layer["groups"].items():
        expected = [_percent(values["share"][expert]), f"{_number(values['lift'][expert])}×",
                    _signed(layer["added_loss"][name][expert])]  # fmt: skip
        cells = [cell.text for cell in rows[name].find_elements("css selector", "td")]
        assert [cells[0], *cells[2:]] == [name, *expected]
    tokens = [code.text for code in card.find_elements("css selector", "dd:first-of-type code")]
    assert [token for token in tokens if token.strip()] == [
        found["token"] for found in layer["input_tokens"][expert] if found["token"].strip()
    ]


def test_an_expert_opens(page, explained):
    layers = explained.to_dict()["layers"]
    shown = [[cell.text for cell in row.find_elements("css selector", "td")] for row in find(page, "#load tbody tr")]
    assert shown == [[_number(load * 4) for load in layer["load"]] for layer in layers]
    for place, expert in ((0, 1), (1, 2)):
        link = find(page, f"#load a[href='#x-{place}-{expert}']")[0]
        page.execute_script("arguments[0].scrollIntoView()", link)
        link.click()
        assert_card_is_that_of_the_dict(page, explained, place, expert)
        assert page.execute_script("return document.activeElement.id") == f"x-{place}-{expert}"


def test_without_scripts(page, explained):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.refresh()
        assert find(page, ".panel")[0].is_displayed() is False
        assert len({word.value_of_css_property("background-color") for word in find(page, ".text span")[:60]}) > 1
        find(page, "#load a[href='#x-0-1']")[0].click()
        assert_card_is_that_of_the_dict(page, explained, 0, 1)
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_on_paper(page):
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(find(page, "details")) > 1
    assert find(page, "details:not([open])") == []  # every layer's cards are printed
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not find(page, "nav")[0].is_displayed()
        assert all(card.is_displayed() for card in find(page, ".card"))
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize(
    ("name", "size", "scheme"), [("light", DESK, "light"), ("dark", DESK, "dark"), ("phone", PHONE, "light")]
)
def test_how_it_looks(page, tmp_path, name, size, scheme):
    look(page, size, scheme)
    page.refresh()
    wide = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "it scrolls sideways"
    for table in find(page, "#who table"):
        assert page.execute_script("return arguments[0].scrollWidth <= arguments[0].parentElement.clientWidth", table)
    for selector in ("body", ".faint", ".claims b", "nav a", ".heat td", ".chip", ".text span"):
        for element in find(page, selector)[:40]:
            assert contrast(page, element) >= 4.5, (selector, element.text)
    folder = Path(os.environ.get("SPARSE_MOE_SCREENSHOTS") or tmp_path)
    height = page.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": size[0], "height": height, "scale": 1}
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def contrast(page, element):
    """Of a text and its ground, by WCAG 2.2."""
    ink, ground = page.execute_script(
        """
        const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const pixel = () => [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
        const chain = [];
        for (let part = arguments[0]; part; part = part.parentElement) chain.unshift(getComputedStyle(part));
        for (const style of chain) { paint.fillStyle = style.backgroundColor; paint.fillRect(0, 0, 1, 1); }
        const ground = pixel();
        paint.fillStyle = chain.at(-1).color; paint.fillRect(0, 0, 1, 1);
        return [pixel(), ground];
        """,
        element,
    )
    bright = []
    for colour in (ink, ground):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        bright.append(float(np.dot(linear, [0.2126, 0.7152, 0.0722])))
    return (max(bright) + 0.05) / (min(bright) + 0.05)
