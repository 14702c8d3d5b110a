"""The page in a browser: every test looks at pixels of headless Chromium."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from browser import CHROMIUM, Browser
from test_comparison import NASTY, ball

from genmed.comparison import OBSERVED, REDUNDANT, UNOBSERVED, Column, comparison_page
from genmed.files import write_bytes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
KINDS = {OBSERVED: (86, 180, 233), UNOBSERVED: (230, 159, 0), REDUNDANT: (181, 54, 127)}


def bone(height: float = 60) -> trimesh.Trimesh:
    """Looks different from everywhere: a bent rod with a ball at one end."""
    rod = trimesh.creation.capsule(height, 8, count=(8, 12))
    knob = ball(14, (18, 6, height), detail=2)
    return trimesh.util.concatenate([rod, knob])


def classes(mesh: trimesh.Trimesh) -> np.ndarray:
    z = mesh.vertices[:, 2]
    return np.select([z < 15, z < 45], [OBSERVED, UNOBSERVED], REDUNDANT).astype(np.uint8)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mesh = bone()
    plane = np.array([[-40, 0, -20], [40, 0, -20], [40, 0, 90], [-40, 0, 90.0]])
    columns = [
        Column("Completed", mesh, classes(mesh), {"Dice": "0.913", "Chamfer ×100": "0.12", "UHD ×100": "4.3"}),
        Column(NASTY, bone(50)),
        Column("The same again", mesh, classes(mesh)),
    ]
    text = comparison_page(columns, title="Three bones", truth=bone(75), planes=[plane])
    return write_bytes(tmp_path_factory.mktemp("page") / "page.html", text.encode())


def pictures(browser: Browser) -> list[np.ndarray]:
    """What the window shows of every canvas, (height, width, 3)."""
    shot = browser.screenshot().astype(int)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect())"
        ".map(r => [r.top, r.bottom, r.left, r.right].map(Math.round))"
    )
    return [shot[top + 3 : bottom - 3, left + 3 : right - 3] for top, bottom, left, right in boxes]


def drawn(picture: np.ndarray) -> np.ndarray:
    """Pixels that differ from the background, which the upper left corner shows."""
    return np.abs(picture - picture[0, 0]).sum(axis=-1) > 30


def of_kind(picture: np.ndarray, kind: int) -> int:
    """Pixels of a colour up to its brightness."""
    colour = np.array(KINDS[kind]) / np.linalg.norm(KINDS[kind])
    length = np.linalg.norm(picture, axis=-1) + 1e-9
    return int(((picture @ colour / length > 0.985) & drawn(picture)).sum())


def differ(first: np.ndarray, second: np.ndarray) -> float:
    """Share of pixels that changed."""
    return float((np.abs(first - second).sum(axis=-1) > 30).mean())


def say(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('view').textContent"))


def tick(browser: Browser, id: str) -> None:
    browser.evaluate(f"document.getElementById('{id}').click()")
    browser.settle()


def test_every_column_is_drawn_from_a_lone_file_without_complaint(browser: Browser, page: Path) -> None:
    browser.requests.clear()
    browser.logs.clear()
    browser.open(page, 900, 560)
    shown = pictures(browser)
    assert len(shown) == 3 and all(0.05 < drawn(picture).mean() < 0.7 for picture in shown)
    assert differ(shown[0], shown[1]) > 0.02 and differ(shown[0], shown[2]) < 0.002  # the third is as the first
    assert browser.requests == [page.resolve().as_uri()] and browser.logs == []
    assert browser.evaluate("document.getElementById('problem').hidden")
    assert browser.evaluate("document.images.length") == 0  # the title that would be markup is text
    assert browser.evaluate("document.querySelectorAll('h2')[1].textContent") == NASTY


def test_matter_has_three_colours_that_can_be_switched_off(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    coloured = pictures(browser)
    for kind in KINDS:
        assert of_kind(coloured[0], kind) > 100 and of_kind(coloured[1], kind) < 30
    tick(browser, "colours")
    plain = pictures(browser)
    assert max(of_kind(plain[0], kind) for kind in KINDS) < 30
    assert np.abs(drawn(plain[0]).mean() - drawn(coloured[0]).mean()) < 0.01
    tick(browser, "colours")
    assert differ(pictures(browser)[0], coloured[0]) == 0


def test_ghost_and_planes_can_be_switched_off(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    everything = pictures(browser)[0]
    for id in ("ghost", "planes"):
        tick(browser, id)
        less = pictures(browser)[0]
        assert drawn(less).sum() < drawn(everything).sum() - 100
        assert of_kind(less, OBSERVED) > 0.95 * of_kind(everything, OBSERVED)
        tick(browser, id)
        assert differ(pictures(browser)[0], everything) == 0


def test_dark_and_light_follow_the_system_and_the_button(browser: Browser, page: Path) -> None:
    paper = {}
    for scheme in ("light", "dark"):
        browser.open(page, 900, 560, scheme)
        assert browser.evaluate("document.documentElement.dataset.theme") is None
        paper[scheme] = pictures(browser)[1]
    assert paper["light"][0, 0].min() > 240 and paper["dark"][0, 0].max() < 50
    assert all(drawn(picture).mean() > 0.05 for picture in paper.values())
    tick(browser, "theme")
    assert differ(pictures(browser)[1], paper["light"]) == 0
    tick(browser, "theme")
    assert differ(pictures(browser)[1], paper["dark"]) == 0


def test_keys_turn_all_columns_together_and_0_resets(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    start = pictures(browser)
    browser.evaluate("document.querySelectorAll('canvas')[1].focus()")
    steps = {
        "ArrowRight": "turned 40°, tilted 15°, zoom 100 %",
        "ArrowUp": "turned 40°, tilted 25°, zoom 100 %",
        "+": "turned 40°, tilted 25°, zoom 115 %",
    }
    for key, words in steps.items():
        before = pictures(browser)
        browser.press(key)
        after = pictures(browser)
        assert say(browser) == words
        assert all(differ(a, b) > 0.01 for a, b in zip(before, after, strict=True)), key
        assert differ(after[0], after[2]) < 0.002
    for key in ("ArrowLeft", "ArrowDown", "-"):
        browser.press(key)
    # Focused pictures have an outline: compare one that never had it.
    assert say(browser) == "turned 30°, tilted 15°, zoom 100 %" and differ(pictures(browser)[0], start[0]) < 0.002
    browser.press("ArrowUp")
    browser.press("0")
    assert say(browser) == "turned 30°, tilted 15°, zoom 100 %"


def test_view_from_the_front_has_the_right_side_on_the_left_and_superior_up(browser: Browser, tmp_path: Path) -> None:
    """RAS: a ball at +x (right), one at +z (superior), one at +y (anterior); as a radiologist faces a patient."""
    balls = [ball(6, centre) for centre in ((30, 0, 0), (0, 0, 30), (0, 30, 0))]
    mesh = trimesh.util.concatenate(balls)
    kinds = np.repeat([OBSERVED, UNOBSERVED, REDUNDANT], len(balls[0].vertices)).astype(np.uint8)
    path = write_bytes(tmp_path / "balls.html", comparison_page([Column("balls", mesh, kinds)]).encode())
    browser.open(path, 500, 600)
    browser.evaluate("document.querySelector('canvas').focus()")
    for _ in range(3):
        browser.press("ArrowLeft")
    assert say(browser).startswith("turned 0°")
    picture = pictures(browser)[0]

    def middle(kind: int) -> np.ndarray:
        colour = np.array(KINDS[kind]) / np.linalg.norm(KINDS[kind])
        return np.argwhere((picture @ colour / np.linalg.norm(picture, axis=-1) > 0.985) & drawn(picture)).mean(axis=0)

    right, superior, anterior = (middle(kind) for kind in (OBSERVED, UNOBSERVED, REDUNDANT))
    assert right[1] < anterior[1] - 30 and abs(superior[1] - anterior[1]) < 25  # columns, in perspective
    assert superior[0] < right[0] - 30 and right[0] < anterior[0]  # rows; seen from above, the front is lower


def test_mouse_drags_and_wheel_zooms_once_clicked(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    before = pictures(browser)
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=150, y=300, deltaX=0, deltaY=-120)
    browser.settle()
    assert say(browser) == "turned 30°, tilted 15°, zoom 100 %"
    browser.mouse("mousePressed", 150, 300)
    browser.mouse("mouseMoved", 190, 280)
    browser.mouse("mouseReleased", 190, 280)
    browser.settle()
    assert say(browser) == "turned 50°, tilted 5°, zoom 100 %"
    assert all(differ(a, b) > 0.01 for a, b in zip(before, pictures(browser), strict=True))
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=150, y=300, deltaX=0, deltaY=-120)
    browser.until("document.getElementById('view').textContent.endsWith('zoom 122 %')")
    tick(browser, "reset")
    assert say(browser) == "turned 30°, tilted 15°, zoom 100 %"


def test_touch_drags_and_pinches(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    browser.touch("touchStart", (100, 300))
    browser.touch("touchMove", (120, 310))
    browser.touch("touchEnd")
    browser.settle()
    assert say(browser) == "turned 40°, tilted 20°, zoom 100 %"
    browser.touch("touchStart", (120, 300), (160, 300))
    browser.touch("touchMove", (100, 300), (180, 300))
    browser.touch("touchEnd")
    browser.settle()
    assert say(browser) == "turned 40°, tilted 20°, zoom 200 %"


def test_phone_shows_two_columns_without_scrolling_sideways(browser: Browser, page: Path) -> None:
    browser.open(page, 360, 900)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate(
        "[...document.querySelectorAll('figure')].every(f => [...f.querySelectorAll('h2, dt, dd')]"
        ".every(e => e.getBoundingClientRect().right <= f.getBoundingClientRect().right))"
    )
    lefts = browser.evaluate("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().left)")
    assert len(set(lefts)) == 2
    sizes = browser.evaluate(
        "[...document.querySelectorAll('h1, h2, dd, dt, p, label, button, li')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14
    assert all(drawn(picture).mean() > 0.05 for picture in pictures(browser)[:2])


def test_keyboard_reaches_every_picture_and_says_what_it_is(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 560)
    found = browser.evaluate(
        "[...document.querySelectorAll('canvas')].map(c => [c.tabIndex, c.getAttribute('aria-label'), "
        "document.getElementById(c.getAttribute('aria-describedby')).textContent.includes('arrow keys')])"
    )
    assert found == [[0, "Completed", True], [0, NASTY, True], [0, "The same again", True]]


def test_lost_graphics_come_back(browser: Browser, page: Path) -> None:
    browser.call("Page.enable")
    spy = """const make = HTMLCanvasElement.prototype.getContext;
    HTMLCanvasElement.prototype.getContext = function (kind, options) {
        const found = make.call(this, kind, options);
        if (kind === 'webgl2') window.lose = found.getExtension('WEBGL_lose_context');
        return found;
    };"""
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=spy)["identifier"]
    browser.open(page, 900, 560)
    before = pictures(browser)
    browser.evaluate("window.lose.loseContext()")
    browser.settle()
    browser.evaluate("new Promise(done => setTimeout(done, 50)).then(() => window.lose.restoreContext())")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    browser.evaluate("document.querySelectorAll('canvas')[0].focus()")
    browser.press("ArrowRight")
    assert differ(pictures(browser)[1], before[1]) > 0.01
    assert drawn(pictures(browser)[1]).mean() > 0.05
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_browser_without_webgl_is_told_so_and_still_shows_the_figures(browser: Browser, page: Path) -> None:
    spy = "HTMLCanvasElement.prototype.getContext = () => null"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=spy)["identifier"]
    browser.open(page, 900, 560)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    text = browser.evaluate("document.body.innerText")
    assert "WebGL 2 is missing" in text and "0.913" in text
    assert browser.evaluate("document.documentElement.dataset.drawn") == "no"


def test_broken_geometry_is_told_too(browser: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace('"data":"', '"data":"AAAA'), "utf-8")
    browser.open(broken, 900, 560)
    assert "could not be drawn" in browser.evaluate("document.getElementById('problem').textContent")
