"""The page in a real browser, over a real service with real photos: every action once."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, write_photos
from serving import EVIL, SLOW, TEXT, Served, serving, wait_for

from e5v_search.catalog import Put
from e5v_search.collection import Collection

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

DROP = """([name, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)), data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: "image/jpeg" }));
    for (const kind of ["dragenter", "dragover", "drop"]) document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""  # noqa: E501
PASTE = DROP.partition("for (const")[0] + "dispatchEvent(new ClipboardEvent('paste', { clipboardData: data })); }"
RATIOS = """() => {
    const parsed = (colour) => {
        const found = colour.match(/[\\d.e-]+/g).map(Number), scale = colour.startsWith("color(") ? 255 : 1;
        return [...found.slice(0, 3).map((v) => v * scale), found[3] ?? 1];
    };
    const light = (colour) => {
        const [r, g, b] = colour.map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
    const behind = (element, worst) => {
        if (!element) return worst;
        const colour = parsed(getComputedStyle(element).backgroundColor);
        const photo = worst && element.querySelector(":scope > .tile img") ? worst : null;
        return colour[3] === 1 && !photo ? colour.slice(0, 3) : over(colour, photo ?? behind(element.parentElement, worst));
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, noscript")) continue;
        // what stands on a photo is to be read on a white one too
        const under = behind(element, element.matches(".score") ? [255, 255, 255] : null);
        const ink = over(parsed(getComputedStyle(element).color), under);
        const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
        found.push([(a + .05) / (b + .05), walker.currentNode.data.trim().slice(0, 40)]);
    }
    for (const each of document.querySelectorAll("input[placeholder]")) {
        if (!each.checkVisibility()) continue;
        const under = behind(each, null), ink = over(parsed(getComputedStyle(each, "::placeholder").color), under);
        const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
        found.push([(a + .05) / (b + .05), each.placeholder]);
    }
    return found;
}"""
ROWS_ARE_FULL = """() => {
    const rows = new Map(), list = document.getElementById("results"), { right } = list.getBoundingClientRect();
    for (const each of list.children) {
        const box = each.getBoundingClientRect();
        rows.set(box.top, [...(rows.get(box.top) ?? []), box]);
    }
    const wide = (row) => Math.abs(Math.max(...row.map((box) => box.right)) - right) < 1.5;
    const full = (row) => wide(row) && row.every((box) => box.height === row[0].height);
    return rows.size > 1 && list.clientWidth < innerWidth && [...rows.values()].slice(0, -1).every(full);
}"""
SEEN = """(state) => {
    Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
INKED = """() => {
    const map = document.getElementById("map");
    return map.getContext("2d").getImageData(0, 0, map.width, map.height).data.some((value) => value);
}"""
NAMELESS = """() => [...document.querySelectorAll("button, a, input, canvas, dialog[open]")]
    .filter((e) => e.checkVisibility() && !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim() || e.title
        || document.getElementById(e.getAttribute("aria-labelledby"))))
    .map((e) => e.outerHTML)"""


@contextmanager
def opened(browser: Any, address: str, path: str = "/", but: str = "nothing", **options: Any) -> Iterator[Any]:
    """A page of the service; in the end nothing was complained of `but` this, fetched from elsewhere, or run out of a name."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    context.set_default_timeout(SLOW)
    page = context.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "blob:")) else told.append(asked.url))
    page.goto(address + path)
    page.wait_for_selector("#results li, #nothing:not([hidden]), #map-view:not([hidden])")
    yield page
    assert [each for each in told if but not in each] == []
    assert page.evaluate("window.hacked") is None
    context.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    with opened(browser, served.address) as page:
        yield page


def names(page: Any) -> list[str]:
    return [
        label.split(", score")[0] for label in page.locator("#results .tile").evaluate_all("all => all.map((e) => e.ariaLabel)")
    ]


def until(page: Any, condition: str, arg: Any = None) -> None:
    """`wait_for_function` would have the page evaluate a string, which its content policy forbids."""
    end = time.monotonic() + SLOW / 1000
    while not page.evaluate(condition, arg):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def settled(page: Any) -> None:
    until(page, "!document.body.matches('.busy')")


def searched(page: Any, text: str) -> None:
    page.fill("#query", text)
    found(page, text)


def found(page: Any, text: str) -> None:
    """Until the results of this text, and of no other, are there."""
    asked = "text => new URLSearchParams(location.search).get('q') === text && !document.body.matches('.busy')"
    until(page, asked, text)
    page.wait_for_selector("#results .score")


def test_the_collection_then_results_as_one_types_then_back(page: Any) -> None:
    expect(page.locator("#count")).to_have_text("14 items, newest first")
    assert names(page)[0].startswith("raccoon.jpg")
    page.type("#query", "two dogs play in the snow", delay=5)
    expect(page.locator("#count")).to_contain_text("14 results")
    expect(page.locator("#results .score")).to_have_count(14)
    expect(page).to_have_url(re.compile(r"q=two\+dogs\+play\+in\+the\+snow"))
    scores = [float(text) for text in page.locator("#results .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert TEXT in page.locator("#results q").all_inner_texts()
    best = names(page)
    page.reload()
    expect(page.locator("#query")).to_have_value("two dogs play in the snow")
    expect(page.locator("#results .score")).to_have_count(14)
    assert names(page) == best
    page.go_back()  # all that was typed is one step
    expect(page.locator("#count")).to_have_text("14 items, newest first")
    expect(page.locator("#query")).to_have_value("")
    page.go_forward()
    expect(page.locator("#results .score")).to_have_count(14)


def test_rows_fill_the_width(page: Any) -> None:
    for width in (1200, 900, 640, 390):
        page.set_viewport_size({"width": width, "height": 800})
        until(page, ROWS_ARE_FULL)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_more_like_this_change_this_less_like_this(page: Any) -> None:
    tile = page.locator("#results li", has=page.get_by_role("button", name=re.compile("^cat.jpg")))
    tile.hover()
    tile.get_by_role("button", name="More like this").click()
    page.wait_for_selector("#results .score")
    assert {name.split(",")[0] for name in names(page)[:2]} == {"cat.jpg", EVIL}
    expect(page.locator("#reference img")).to_be_visible()
    page.fill("#query", "make it a dog")
    expect(page).to_have_url(re.compile("modify=make"))
    expect(page.locator("#results .score")).to_have_count(12)  # not the cat itself, and not its copy
    assert not {"cat.jpg", EVIL} & {name.split(",")[0] for name in names(page)}
    page.get_by_role("button", name="Search without the picture").click()
    expect(page).to_have_url(re.compile(r"\?q=make"))
    expect(page.locator("#results .score")).to_have_count(14)
    page.locator("#results li").first.hover()
    page.locator("#results li").first.get_by_role("button", name="Less like this").click()
    expect(page.locator(".chip.minus")).to_have_count(1)
    expect(page).to_have_url(re.compile("minus=image"))
    tile = page.locator("#results li", has=page.get_by_role("button", name=re.compile("^coffee.jpg")))
    tile.hover()
    tile.get_by_role("button", name="Change this").click()
    expect(page.locator("#query")).to_be_focused()
    expect(page.locator("#query")).to_have_attribute("placeholder", re.compile("change it"))


def test_terms_and_their_weights(page: Any) -> None:
    searched(page, "a photo")
    before = page.locator("#results .score").all_inner_texts()
    page.get_by_role("textbox", name="More of").fill("a cat")
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Less of").fill("grass")
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_count(2)
    page.get_by_label("Weight of a cat").fill("1.6")
    until(page, "location.search.includes('plus=a+cat%3A1.6')")
    settled(page)
    assert page.locator("#results .score").all_inner_texts() != before
    page.get_by_role("button", name="Remove grass").click()
    expect(page.locator(".chip")).to_have_count(1)
    expect(page).not_to_have_url(re.compile("minus"))


@pytest.mark.parametrize("way", ["pick", "drop", "paste"])
def test_a_picture_of_ones_own(page: Any, served: Served, way: str) -> None:
    import base64

    path = served.folder.parent / "Pictures/2021/coffee.jpg"
    if way == "pick":
        with page.expect_file_chooser() as chooser:
            page.click("#pick")
        chooser.value.set_files(path)
    else:
        encoded = base64.b64encode(path.read_bytes()).decode()
        page.evaluate(DROP if way == "drop" else PASTE, ["coffee.jpg", encoded])
    page.wait_for_selector("#results .score")
    assert names(page)[0].startswith("coffee.jpg")
    expect(page.locator("#reference img")).to_have_js_property("naturalWidth", 600)
    page.fill("#query", "at night")
    expect(page.locator("#results .score")).to_have_count(13)
    page.go_back()
    expect(page.locator("#results .score")).to_have_count(14)
    page.reload()  # it was kept nowhere
    expect(page.locator("#nothing")).to_contain_text("was not kept")


def test_filters_narrow_and_count(page: Any) -> None:
    page.keyboard.press("f")
    panel = page.locator("#filters")
    expect(panel.get_by_role("status")).to_have_text("14 items")
    panel.get_by_role("button", name="photos 10").click()
    expect(page.locator("#count")).to_have_text("10 items, newest first")
    panel.get_by_role("button", name="2019 4").click()
    expect(page.locator("#count")).to_have_text("4 items, newest first")
    expect(page.locator("#filter-count")).to_have_text("2")
    panel.get_by_role("button", name="August 1").click()  # instead of the whole year
    expect(page.locator("#count")).to_have_text("1 item, newest first")
    expect(panel.get_by_role("button", name="texts 0", exact=True)).to_be_visible()  # so many there would be
    panel.get_by_role("button", name="2021 5").click()  # or
    expect(page.locator("#count")).to_have_text("6 items, newest first")
    panel.get_by_role("button", name="2019 4").click()  # instead of the month
    expect(page.locator("#count")).to_have_text("9 items, newest first")
    expect(panel.get_by_role("button", name="photos 9")).to_be_visible()
    panel.get_by_role("button", name="Clear all").click()
    expect(page.locator("#count")).to_have_text("14 items, newest first")
    panel.get_by_text("Folder").click()
    panel.get_by_role("button", name="2019 4").last.click()
    panel.get_by_role("button", name="Paris (spring) 4").click()
    expect(panel.get_by_role("button", name="2019 4").last).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#count")).to_have_text("4 items, newest first")
    panel.get_by_role("button", name="Clear all").click()
    panel.get_by_text("Camera").click()
    panel.get_by_role("button", name="Canon EOS 80D 4").click()
    searched(page, "a photo")
    expect(page.locator("#results .score")).to_have_count(4)
    panel.get_by_label("from").fill("2019-05-01")
    expect(page.locator("#results .score")).to_have_count(2)
    page.go_back()
    expect(page.locator("#results .score")).to_have_count(4)
    panel.get_by_role("button", name="Clear all").click()
    panel.get_by_text("Place").click()
    world = panel.locator("canvas.world")
    box = world.bounding_box()
    at = {"x": box["width"] * (151.2 + 180) / 360, "y": box["height"] * (90 + 33.87) / 180}
    world.click(position=at)
    expect(page.locator("#results .score")).to_have_count(5)
    expect(page).to_have_url(re.compile("near"))
    panel.get_by_role("button", name="33.9° S, 151.2° E").click()
    expect(page.locator("#results .score")).to_have_count(14)


def test_scores_are_cut(page: Any) -> None:
    searched(page, "two dogs play in the snow")
    scores = [float(text) for text in page.locator("#results .score").all_inner_texts()]
    cut = round((scores[2] + scores[3]) / 2, 2)
    page.locator("#threshold").fill(str(cut))
    expect(page.locator("#results li")).to_have_count(sum(score >= cut for score in scores))
    expect(page).to_have_url(re.compile(f"t={cut}"))
    page.locator("#threshold").fill("1")
    expect(page.locator("#nothing")).to_contain_text("Nothing scores as high")
    page.get_by_role("button", name="Any score").click()
    expect(page.locator("#results li")).to_have_count(14)


def test_a_photo_large(page: Any) -> None:
    page.locator("#results").get_by_role("button", name=re.compile("^cat.jpg")).click()
    look = page.locator("#look")
    expect(look.get_by_role("heading", name="cat.jpg")).to_be_visible()
    expect(look).to_contain_text("Apple iPhone 12")
    expect(look).to_contain_text("January 11, 2021")
    expect(look).to_contain_text("-33.8667, 151.2000")
    expect(look.locator("#words span")).to_have_count(8)
    expect(look.locator("#copies li")).to_have_count(2)
    expect(look.locator("#copies")).to_contain_text("same bytes")
    expect(look.locator(".seen img")).to_have_js_property("naturalWidth", 451)
    expect(page).to_have_url(re.compile("item="))
    link = look.get_by_role("link", name="Open the file itself")
    assert page.request.get(page.evaluate("e => e.href", link.element_handle())).headers["content-type"] == "image/jpeg"
    order = [name.split(",")[0] for name in names(page)]
    page.keyboard.press("ArrowRight")
    following = order[order.index("cat.jpg") + 1]
    expect(look.locator("h2")).to_have_text(following if following.endswith(".jpg") else re.compile("ext"))
    page.keyboard.press("ArrowLeft")
    expect(look.locator("h2")).to_have_text("cat.jpg")
    page.keyboard.press("Escape")
    expect(look).to_be_hidden()
    expect(page).not_to_have_url(re.compile("item="))
    page.locator("#results").get_by_role("button", name=re.compile("^" + re.escape(EVIL))).click()
    expect(look.locator("h2")).to_have_text(EVIL)
    look.get_by_role("button", name="Change this").click()
    expect(look).to_be_hidden()
    expect(page.locator("#query")).to_be_focused()
    page.go_back()
    expect(look.locator("h2")).to_have_text(EVIL)


def test_everything_by_keys(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    found(page, "a cat")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.ariaLabel"
    first = page.evaluate(focused)
    assert first == page.locator("#results .tile").first.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == page.locator("#results .tile").nth(1).get_attribute("aria-label")
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().top")
    assert below > page.locator("#results li").first.bounding_box()["y"]
    page.keyboard.press("Home")
    assert page.evaluate(focused) == first
    page.keyboard.press("Enter")
    expect(page.locator("#look")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("l")
    expect(page.locator(".chip.minus")).to_have_count(1)
    expect(page.locator("#results .tile").first).to_be_focused()
    page.keyboard.press("m")
    expect(page).to_have_url(re.compile(r"\?image="))
    settled(page)
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    expect(page.locator("#status")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    expect(page.locator("#map-view")).to_be_visible()
    page.keyboard.press("g")
    expect(page.locator("#map-view")).to_be_hidden()


def test_the_map(browser: Any, served: Served) -> None:
    with opened(browser, served.address, "/?view=map") as page:
        canvas = page.locator("#map")
        expect(canvas).to_have_attribute("aria-label", "Map of 14 items")
        until(page, INKED)
        box = canvas.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.keyboard.down("Shift")
        page.mouse.move(box["x"] + 5, box["y"] + 5)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5, steps=4)
        page.mouse.up()
        page.keyboard.up("Shift")
        expect(page.locator("#selection [role=status]")).to_contain_text("14 items")
        expect(page.locator("#selection li")).to_have_count(14)
        page.get_by_role("button", name="Close the selection").click()
        canvas.focus()
        page.keyboard.press("+")
        page.keyboard.press("0")
        page.keyboard.press("Enter")
        expect(page.locator("#look")).to_be_visible()
        page.keyboard.press("Escape")
        page.mouse.move(*middle)
        page.mouse.wheel(0, -300)
        page.locator("#show-filters").click()
        page.locator("#filters").get_by_role("button", name="texts 2", exact=True).click()
        expect(canvas).to_have_attribute("aria-label", "Map of 14 items; 2 pass the filters")
        page.get_by_role("button", name="All", exact=True).click()
        page.get_by_role("button", name="Select", exact=True).click()
        assert selected(page) == 2


def test_the_collection_its_failures_and_a_run(browser: Any, gallery: Path, tmp_path: Path) -> None:
    shutil.copytree(gallery, tmp_path / "c", ignore=shutil.ignore_patterns("*.sock*"))
    write_photos(tmp_path / "more", 1)
    run("index", tmp_path / "more", "-c", tmp_path / "c", "--quiet")
    with serving(tmp_path / "c", allow_index=True) as served, opened(browser, served.address) as page:
        expect(page.locator("#count")).to_have_text("15 items, newest first")
        page.click("#show-status")
        status = page.locator("#status")
        expect(status).to_contain_text("e5v-tiny")
        expect(status.locator("#failed li")).to_have_count(1)
        expect(status.locator("#failed")).to_contain_text("truncated")
        write_photos(tmp_path / "more", 4)
        runs, seen = served.server.service.runs, threading.Event()
        told = runs._told

        def held(report: Any, total: int) -> None:
            told(report, total)
            assert total == 0 or seen.wait(SLOW / 1000)

        runs._told = held  # type: ignore[method-assign]
        status.get_by_role("button", name="Look for new photos").press("Enter")
        expect(status.locator("#run [role=status]")).to_have_text(re.compile(r"^\d+ of \d+"))
        assert status.get_by_role("progressbar").evaluate("e => e.max === Number(e.nextSibling.innerText.split(' of ')[1])")
        expect(page.locator("#busy")).to_be_visible()
        expect(status.get_by_role("button", name="Close")).to_be_focused()  # where there was a button to start
        seen.set()
        expect(status.locator("#run")).to_contain_text("3 added")
        page.keyboard.press("Escape")
        expect(page.locator("#count")).to_have_text("18 items, newest first")  # without a reload
        page.evaluate(SEEN, "hidden")  # it takes no connection from other windows then
        wait_for(lambda: len(served.server.service.listeners) == 0)
        write_photos(tmp_path / "more", 5)
        run("index", tmp_path / "more", "-c", tmp_path / "c", "--quiet")
        page.evaluate(SEEN, "visible")
        expect(page.locator("#count")).to_have_text("19 items, newest first")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_read(browser: Any, served: Served, scheme: str) -> None:
    with opened(browser, served.address, "/?q=a+cat&minus=grass:0.5", color_scheme=scheme) as page:
        page.click("#show-filters")
        page.wait_for_selector("#filters details")
        page.locator("#filters summary").evaluate_all("all => all.forEach((e) => { e.parentElement.open = true; })")
        page.locator("#filters").get_by_role("button", name="photos 10").click()
        page.wait_for_selector("#filters [aria-pressed=true]")
        for place in ("", "look", "status", "help"):
            if place == "look":
                page.locator("#results .tile").first.click()
                page.wait_for_selector("#words span")
            elif place:
                page.click(f"#show-{place}")
                page.wait_for_selector(f"#{place} dl")
            found = page.evaluate(RATIOS)
            assert len(found) > 20
            assert [each for each in found if each[0] < 4.5] == [], place
            assert page.evaluate(NAMELESS) == []
            page.keyboard.press("Escape")


def test_on_a_phone(browser: Any, served: Served) -> None:
    size = {"width": 390, "height": 844}
    with opened(browser, served.address, "/?q=a+cat", viewport=size, has_touch=True, is_mobile=True) as page:
        page.wait_for_selector("#results .score")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator("#results .tile").first.tap()
        expect(page.locator("#look").get_by_role("button", name="More like this")).to_be_in_viewport()
        seen = page.locator("#look .seen").bounding_box()
        assert seen["height"] > 300
        page.locator("#look [data-key=close]").tap()
        page.tap("#show-filters")
        page.wait_for_selector("#filters details")
        panel = page.locator("#filters").bounding_box()
        assert panel["y"] > 100
        assert panel["y"] + panel["height"] <= 845
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_token_is_asked_for_once(browser: Any, gallery: Path) -> None:
    token = "a-token-that-nobody-guesses"
    with serving(gallery, token=token) as served, opened(browser, served.address, f"/?token={token}") as page:
        expect(page.locator("#count")).to_have_text("14 items, newest first")
        assert "token" not in page.url
        assert page.evaluate("document.cookie") == ""
        page.reload()
        expect(page.locator("#results .tile img").first).to_have_js_property("complete", True)


def test_a_long_collection_comes_as_one_scrolls(browser: Any, tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "photos", 230)
    x = np.random.default_rng(0).normal(size=(len(paths), 256)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shape = {"width": 60, "height": 40, "format": "JPEG"}
    puts = [
        Put(kind="image", content_hash=f"{n:064x}", path=str(path), item_id=n + 1, vectors={"retrieval": x[n]}, **shape)
        for n, path in enumerate(paths)
    ]
    with Collection.open(tmp_path / "c") as source:
        embedder = source.embedder()
        model = {"name": embedder.name, "quantize": None}
        source.load(puts, embedder.fingerprint, 256, model, ["retrieval"], [])
    with serving(tmp_path / "c") as served, opened(browser, served.address) as page:
        assert 60 <= page.locator("#results li").count() <= 200
        scrolled(page, 230)
        page.evaluate("scrollTo(0, 0)")
        searched(page, "a photo")
        assert page.locator("#results li").count() < 230
        expect(page.locator("#count")).to_contain_text("the best")
        scrolled(page, 230)
        assert len(set(names(page))) == 230


def scrolled(page: Any, count: int) -> None:
    """To the end, and further, until there are so many."""
    until(
        page,
        """(count) => {
            scrollTo(0, document.body.scrollHeight);
            return document.querySelectorAll("#results li").length === count;
        }""",
        count,
    )


def test_the_focus_is_never_lost(page: Any) -> None:
    focused = page.locator(":focus")
    searched(page, "a photo")
    for text in ("a cat", "a dog"):
        more = page.get_by_role("textbox", name="More of")
        more.fill(text)
        more.press("Enter")
        expect(page.get_by_label(f"Weight of {text}")).to_be_visible()
        expect(more).to_be_focused()
    weight = page.get_by_label("Weight of a dog")
    for step in ("1.1", "1.2"):
        weight.press("ArrowRight")
        expect(page).to_have_url(re.compile(f"plus=a\\+dog%3A{step}"))
        expect(weight).to_be_focused()
    page.get_by_role("button", name="Remove a cat").press("Enter")
    expect(page.get_by_role("button", name="Remove a dog")).to_be_focused()
    focused.press("Enter")
    expect(more).to_be_focused()
    page.locator("#home").press("Enter")
    settled(page)
    # filters
    page.locator("#show-filters").press("Enter")
    panel = page.locator("#filters")
    panel.get_by_role("button", name="photos 10").press("Enter")
    expect(panel.get_by_role("status")).to_have_text("10 items")
    expect(focused).to_have_text("photos10")
    panel.get_by_role("button", name="Clear all").press("Enter")
    expect(panel.get_by_role("button", name="Clear all")).to_have_count(0)
    expect(panel.get_by_role("button", name="Close the filters")).to_be_focused()
    start = panel.get_by_label("from")
    start.focus()
    page.keyboard.type("05012019")  # month, day, year: no date is looked for before the year is whole
    expect(page).to_have_url(re.compile("from=2019-05-01"))
    expect(page.locator("#count")).to_have_text("7 items, newest first")
    expect(start).to_be_focused()
    panel.get_by_role("button", name="texts 0", exact=True).press("Enter")
    expect(page.locator("#nothing")).to_be_visible()
    page.get_by_role("button", name="Without filters").press("Enter")
    expect(page.locator("#count")).to_have_text("14 items, newest first")
    expect(page.locator("#results .tile").first).to_be_focused()
    panel.get_by_role("button", name="Close the filters").press("Enter")
    expect(page.locator("#show-filters")).to_be_focused()
    # a photo: back in the grid at the one that was looked at last
    page.locator("#results .tile").nth(2).press("Enter")
    expect(page.locator("#look h2")).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page).to_have_url(re.compile("item="))
    page.keyboard.press("Escape")
    expect(page.locator("#results .tile").nth(4)).to_be_focused()
    # the map
    page.keyboard.press("g")
    expect(page.locator("#map")).to_be_focused()
    page.keyboard.press("g")
    expect(page.locator("#results .tile").nth(4)).to_be_focused()
    page.keyboard.press("m")
    expect(page.locator("#reference")).to_be_visible()
    page.get_by_role("button", name="Search without the picture").press("Enter")
    expect(page.locator("#query")).to_be_focused()


def test_tab_goes_through_all_in_its_order(browser: Any, served: Served) -> None:
    with opened(browser, served.address, "/?q=a+cat&minus=grass:0.5") as page:
        page.wait_for_selector("#results .score")
        order = []
        for _ in range(14):
            page.keyboard.press("Tab")
            order.append(
                page.evaluate("(({ id, ariaLabel, innerText }) => id || ariaLabel || innerText)(document.activeElement)")
            )
        bar = ["To the results", "home", "query", "pick", "show-filters", "show-map", "show-status", "show-help"]
        assert order[:-1] == [*bar, "Weight of grass", "Remove grass", "More of", "Less of", "threshold"]
        assert order[-1] == page.locator("#results .tile").first.get_attribute("aria-label")
        page.locator(".skip").press("Enter")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#results .tile").first).to_be_focused()


def test_where_a_photo_lies_on_the_map(page: Any) -> None:
    page.locator("#results").get_by_role("button", name=re.compile("^coffee.jpg")).click()
    page.locator("#look").get_by_role("button", name="On the map").click()
    expect(page.locator("#map-view")).to_be_visible()
    expect(page.locator("#map")).to_be_focused()
    page.mouse.move(2, 2)  # nothing else is pointed at
    expect(page.locator("#map-card")).to_contain_text("coffee.jpg")
    page.keyboard.press("Enter")
    expect(page.locator("#look h2")).to_have_text("coffee.jpg")
    page.keyboard.press("Escape")
    expect(page.locator("#map")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#look")).to_be_visible()
    page.keyboard.press("g")
    expect(page.locator("#look")).to_be_hidden()
    expect(page.locator("#map-card")).to_be_visible()


def test_the_map_zooms(browser: Any, served: Served) -> None:
    with opened(browser, served.address, "/?view=map") as page:
        until(page, INKED)
        box = page.locator("#map").bounding_box()
        page.get_by_role("button", name="Select", exact=True).click()
        assert selected(page) == 14
        for _ in range(8):
            page.get_by_role("button", name="Zoom in").click()
        assert selected(page) < 14
        page.get_by_role("button", name="All", exact=True).click()
        assert selected(page) == 14
        page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3)
        page.mouse.wheel(0, -3000)
        end = time.monotonic() + SLOW / 1000
        while selected(page) == 14:
            assert time.monotonic() < end, "the wheel does nothing"
        for _ in range(20):
            page.get_by_role("button", name="Zoom out").click()
        assert selected(page) == 14


def selected(page: Any) -> int:
    """How many items are selected by dragging over all of the map."""
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5, steps=4)
    page.mouse.up()
    return int(page.locator("#selection li").count()) if page.locator("#selection").is_visible() else 0


def test_who_is_told_to_wait_asks_again(browser: Any, served: Served) -> None:
    refused: list[str] = []

    def busy(route: Any) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=429, json={"error": "9 requests are waiting already", "kind": "ServiceBusy"})

    with opened(browser, served.address, but="429 (Too Many Requests)") as page:
        page.route("**/api/search*", busy)
        searched(page, "a photo of a busy street")
        assert len(refused) == 1
