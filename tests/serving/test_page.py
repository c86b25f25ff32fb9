"""The page in a real Chromium: typing, accepting, the heat map, writing, comparing, and a server that stops."""

import math
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving.conftest import server

import unrolled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
HEAT, OUT = "#heat .heat", "#texts .out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page; it may ask nobody but this server, and say nothing on its console."""
    said: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(address) else None)
    page.goto(address)
    page.wait_for_selector("#words button")
    yield page
    page.close()
    assert [text for text in said if not text.startswith("data:")] == []


def words(page: Page) -> list[str]:
    return page.locator("#words button span:first-child").all_inner_texts()


def test_what_comes_next_is_shown_as_one_types(page: Page, toy_run: unrolled.Run) -> None:
    page.locator("#text").press_sequentially("the dog ")
    expect(page.locator("#words button").first).to_contain_text(toy_run.predict("the dog", 1).words[0][0])
    assert words(page) == [word.replace("<eos>", "⏎") for word, _ in toy_run.predict("the dog").words]
    page.locator("#text").press_sequentially("s")
    expect(page.locator("#words button").first).to_contain_text(re.compile("^s"))
    assert words(page) == [word for word, _ in toy_run.predict("the dog s", complete=True).words]
    page.locator("#text").press_sequentially("qqq")
    expect(page.locator("#words")).to_contain_text("No word of this model begins with “sqqq”.")


def test_tab_and_click_take_a_word_and_escape_lets_tab_leave(page: Page) -> None:
    text = page.locator("#text")
    text.press_sequentially("the d")
    expect(page.locator("#words button").first).to_contain_text(re.compile("^d"))
    taken = words(page)[0]
    text.press("Tab")
    expect(text).to_have_value(f"the {taken} ")
    expect(text).to_be_focused()
    expect(page.locator("#said")).to_have_text(f"took {taken}")
    expect(page.locator(f"{HEAT} .token")).to_have_count(2)
    second = words(page)[1]
    page.locator("#words button").nth(1).click()
    expect(text).to_have_value(f"the {taken} {second} " if second != "⏎" else f"the {taken}\n")
    text.press("Escape")
    text.press("Tab")
    expect(text).not_to_be_focused()


def test_a_suggestion_for_another_text_is_not_taken(page: Page, toy_run: unrolled.Run) -> None:
    text = page.locator("#text")
    text.press_sequentially("the d")
    text.press("Tab")  # waits for what may become of "d"
    taken = toy_run.predict("the d", 1, complete=True).words[0][0]
    expect(text).to_have_value(f"the {taken} ")
    text.press("Control+z")
    expect(text).to_have_value("the d")
    text.press_sequentially("qqq")
    text.press("Tab")
    expect(text).to_have_value("the dqqq")
    expect(text).to_be_focused()
    text.press("Home")
    text.press("Tab")
    expect(text).not_to_be_focused()
    expect(text).to_have_value("the dqqq")


def test_the_text_is_coloured_by_surprisal(page: Page, toy_run: unrolled.Run) -> None:
    page.locator("#text").fill("the dog zebra the ")
    tokens = page.locator(f"{HEAT} .token")
    expect(tokens).to_have_count(4)
    bits = [f"{-value / math.log(2):.1f}" for _, value in toy_run.score("the dog zebra the", end=False).per_token]
    titles = [token.get_attribute("title") or "" for token in tokens.all()]
    assert [title.split(": ")[1].split(" bits")[0] for title in titles] == bits
    hot = [float(token.evaluate("element => element.style.getPropertyValue('--hot')")) for token in tokens.all()]
    assert sorted(range(4), key=lambda n: hot[n]) == sorted(range(4), key=lambda n: float(bits[n]))
    expect(page.locator("#heat .sum")).to_contain_text("4 tokens")
    expect(page.locator("#heat .sum")).to_contain_text("1 unknown")
    expect(page.locator(f"{HEAT} .unknown")).to_contain_text("zebra")
    page.locator("#numbers").check()
    expect(page.locator(f"{HEAT} sub").first).to_be_visible()
    page.locator("#text").fill("a cat ")  # not what was there, longer: read from the beginning
    expect(tokens).to_have_count(2)


def test_a_text_is_written_as_it_is_drawn_and_can_be_stopped(page: Page, toy_run: unrolled.Run) -> None:
    page.locator("#text").fill("the dog ")
    page.locator("#length").fill("12")
    page.locator("#seed").fill("3")
    page.locator("#go").click()
    expect(page.locator("#texts .sum")).to_have_text("12 tokens, seed 3")
    written = toy_run.generate("the dog", length=12, seed=3, temperature=0.8)
    assert page.locator(OUT).inner_text() == "the dog" + written
    page.get_by_role("button", name="Take as your text").click()
    expect(page.locator("#text")).to_have_value("the dog" + written)
    page.get_by_role("button", name="Take as your text").click()
    expect(page.locator("#text")).to_have_value("the dog" + written)
    page.locator("#length").evaluate("element => { element.max = 100000 }")  # 5,000 may be there before the click
    page.locator("#length").fill("100000")
    page.locator("#go").click()
    expect(page.locator("#stop")).to_be_enabled()
    page.locator("#stop").click()
    expect(page.locator("#texts .sum")).to_have_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()


def test_what_characters_are_written_is_shown_to_the_last_space(page: Page, character_run: unrolled.Run) -> None:
    options = {"length": 60, "temperature": 2.0}
    seed = next(n for n in range(99) if re.search(r"\s ", "the " + character_run.generate("the ", seed=n, **options)))
    page.locator("#model").select_option("characters")
    page.locator("#text").fill("the ")
    for field, value in {"seed": seed, **options}.items():
        page.locator(f"#{field}").fill(str(value))
    page.locator("#go").click()
    expect(page.locator("#texts .sum")).to_have_text(f"60 tokens, seed {seed}")
    page.get_by_role("button", name="Take as your text").click()
    expect(page.locator("#text")).to_have_value("the " + character_run.generate("the ", seed=seed, **options))


def test_two_models_are_compared(page: Page) -> None:
    page.locator("#other").select_option("characters")
    expect(page.locator("#words ol")).to_have_count(2)
    page.locator("#text").fill("the d")
    expect(page.locator(HEAT).nth(1).locator(".token")).to_have_count(5)
    expect(page.locator(HEAT).nth(0).locator(".token")).to_have_count(1)
    expect(page.locator("#words .of")).to_have_text(["toy", "characters"])
    page.locator("#words ol").nth(1).locator("button").first.click()
    expect(page.locator(HEAT).nth(1).locator(".token")).to_have_count(6)


def test_map_and_curves(page: Page) -> None:
    page.locator("#map summary").click()
    dots = page.locator("#drawing circle")
    expect(dots).to_have_count(38, timeout=30_000)
    page.locator("#word").fill("dog")
    expect(page.locator("#drawing g.found")).not_to_have_count(0)
    page.locator("#search button").click()
    expect(page.locator("#near")).to_contain_text(re.compile(r"\w+ 0\.\d\d, "))
    page.locator("#curves summary").click()
    expect(page.locator("#charts polyline")).to_have_count(2)


def test_it_fits_a_phone_and_both_lights(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#other").select_option("characters")
    page.locator("#text").fill("the dog sees the cat " * 10)
    expect(page.locator(f"{HEAT} .token").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_everything_has_a_name_for_those_who_listen(page: Page) -> None:
    nameless = """() => [...document.querySelectorAll("button, select, input, textarea, svg, [tabindex]")].filter((e) =>
        !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_server_that_stops_is_said_and_one_that_comes_back_is_found(browser: Browser, toy_run: unrolled.Run) -> None:
    page = browser.new_page()
    with server(toy_run.path) as (process, address):
        page.goto(address)
        page.wait_for_selector("#words button")
        process.kill()
        process.wait()
        page.locator("#text").fill("the dog ")
        expect(page.locator("#problem")).to_have_text("The server does not answer. Is it still running?")
    with server(toy_run.path, port=int(address.rsplit(":", 1)[1])):
        expect(page.locator("#problem")).to_be_hidden()
        expect(page.locator(f"{HEAT} .token")).to_have_count(2)
    page.close()


def test_the_token_is_asked_for(browser: Browser, toy_run: unrolled.Run) -> None:
    with server(toy_run.path, UNROLLED_TOKEN="secret") as (_, address):
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#main")).to_be_hidden()
        page.locator("#token").fill("wrong")
        page.locator("#login button").click()
        expect(page.locator("#problem")).to_have_text("That is not the token.")
        page.locator("#token").fill("secret")
        page.locator("#login button").click()
        expect(page.locator("#words button").first).to_be_visible()
        expect(page.locator("#login")).to_be_hidden()
        page.close()
