"""The page of a map in a real browser: it draws, shows what is under the pointer, finds, and runs nothing but itself."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import photo
from serving import wait_for

from e5v_search.catalog import Item
from e5v_search.map.page import page as map_page
from e5v_search.map.page import thumbnails

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

WIDE, HIGH = 1200, 800
EVIL = "<img src=x onerror=window.hacked=1>.jpg"
TEXT = "</script><script>window.hacked=2</script> a dog"

COLOUR = """([x, y]) => {
    const map = document.getElementById("map"), ratio = map.width / map.clientWidth, box = map.getBoundingClientRect();
    return [...map.getContext("2d").getImageData((x - box.x) * ratio, (y - box.y) * ratio, 1, 1).data];
}"""
expect = playwright.expect


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos at the corners of a square, a text in its middle and a rendered one beside it."""
    base = tmp_path_factory.mktemp("page")
    facts = {"part": None, "lat": None, "lon": None, "camera": None, "format": None, "facts": {}}
    items = []
    for n, name in enumerate(["red.jpg", "green.jpg", "blue.jpg", EVIL]):
        photo(120, 90, n).save(base / name, "JPEG")
        more = {"width": 120, "height": 90, "taken_at": "2019-05-01T10:00:00"}
        items.append(Item(id=n, kind="image", path=str(base / name), text=None, content_hash=f"{n:064}", **facts, **more))
    for n, (kind, text) in enumerate((("text", TEXT), ("rendered", "a cat")), start=4):
        more = {"width": None, "height": None, "taken_at": None}
        items.append(Item(id=n, kind=kind, path=str(base / "t.txt"), text=text, content_hash=str(n), **facts, **more))
    xy = np.array([[-1, 1], [1, 1], [-1, -1], [1, -1], [0, 0], [0.4, 0]])
    gaps = [{"a": "photos", "b": "texts", "distance": 0.5, "spread": 0.75, "accuracy": 0.925}]
    said = {"title": "corners", "about": "6 items", "facts": "made by hand", "gaps": gaps}
    (base / "map.html").write_text(map_page(items, xy, thumbnails(items, base / "cache", 100), said), encoding="utf-8")
    return base / "map.html"


@pytest.fixture
def page(browser: Any, html: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": WIDE, "height": HIGH})
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("data:", "file:")) else told.append(request.url))
    page.goto(html.as_uri())
    page.wait_for_selector("#list li")
    yield page
    assert told == []
    assert page.evaluate("window.hacked") is None
    page.close()


def place(page: Any, x: float, y: float) -> tuple[float, float]:
    """Where the point x, y of the map is in the window, once all is shown."""
    box = page.locator("#map").bounding_box()
    scale = min(box["width"], box["height"]) / 2 * 0.86
    return box["x"] + box["width"] / 2 + x * scale, box["y"] + box["height"] / 2 - y * scale


def colour(page: Any, x: float, y: float) -> list[int]:
    found: list[int] = page.evaluate(COLOUR, place(page, x, y))
    return found


def listed(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#list span").all_inner_texts()]


def test_what_is_under_the_pointer_is_shown(page: Any) -> None:
    assert page.title() == "Map of corners"
    assert page.locator("#card").is_hidden()
    page.mouse.move(*place(page, -1, 1))
    expect(page.locator("#name")).to_have_text("red.jpg")
    assert page.inner_text("#note") == "photo · 120×90 · 2019-05-01"
    expect(page.locator("#thumb")).to_have_js_property("naturalWidth", 120)
    page.mouse.move(*place(page, 1, -1))
    expect(page.locator("#name")).to_have_text(EVIL)
    page.mouse.move(*place(page, 0, 0))
    expect(page.locator("#name")).to_have_text(TEXT)
    assert page.locator("#thumb").is_hidden()
    page.mouse.move(*place(page, 0.1, 0.8))
    page.wait_for_selector("#card", state="hidden")


def test_points_have_the_colours_of_their_kinds(page: Any) -> None:
    page.uncheck("#pictures")
    wait_for(lambda: (blue := colour(page, -1, 1))[2] > blue[1] > blue[0])
    wait_for(lambda: (orange := colour(page, 0, 0))[0] > orange[1] > orange[2])
    wait_for(lambda: (green := colour(page, 0.4, 0))[1] > green[2] > green[0])
    page.click("#kinds button:has-text('rendered')")
    wait_for(lambda: colour(page, 0.4, 0)[3] == 0)
    assert page.get_attribute("#kinds button:has-text('rendered')", "aria-pressed") == "false"
    expect(page.locator("#list li")).to_have_count(5)


def test_items_are_found_by_name_and_text(page: Any) -> None:
    expect(page.locator("#list li")).to_have_count(6)
    page.fill("#query", "DOG script")
    expect(page.locator("#list li")).to_have_count(1)
    assert listed(page) == [TEXT]
    assert page.inner_text("#found") == "1 found"
    page.fill("#query", "green")
    expect(page.locator("#list span")).to_have_text("green.jpg")
    page.click("#list button")
    expect(page.locator("#name")).to_have_text("green.jpg")
    expect(page.locator("#said")).to_have_text(re.compile("^photo, green.jpg"))
    page.fill("#query", "nothing of the kind")
    expect(page.locator("#list li")).to_have_count(0)


def test_it_moves_by_mouse_and_keys(page: Any) -> None:
    at = place(page, -1, 1)
    page.mouse.move(*at)
    page.mouse.wheel(0, -600)
    expect(page.locator("#list li")).to_have_count(1)
    page.mouse.move(at[0] + 1, at[1])  # what was under the pointer still is
    expect(page.locator("#name")).to_have_text("red.jpg")
    page.mouse.down()
    page.mouse.move(at[0] + 120, at[1] + 60, steps=5)
    page.mouse.up()
    page.mouse.move(at[0] + 121, at[1] + 60)
    expect(page.locator("#name")).to_have_text("red.jpg")
    page.focus("#map")
    page.keyboard.press("0")
    expect(page.locator("#list li")).to_have_count(6)
    for key in ("+", "+", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).not_to_be_empty()
    page.keyboard.press("Escape")
    page.wait_for_selector("#card", state="hidden")


def test_the_gap_is_told(page: Any) -> None:
    assert page.locator("#gaps tbody tr").all_inner_texts() == ["photos – texts\t0.50 / 0.75\t92.5 %"]


def test_dark_and_narrow(browser: Any, html: Path) -> None:
    page = browser.new_page(viewport={"width": 420, "height": 800}, color_scheme="dark")
    page.goto(html.as_uri())
    page.wait_for_selector("#list li")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert page.locator("#map").bounding_box()["height"] > 250
    page.close()
