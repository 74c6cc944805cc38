"""The page: served offline with a strict policy, and driven in a real headless Chromium if there is one."""

import importlib.util
import shutil
import time

import pytest

from duomo.serve.scripted import Scripted
from tests.serve.conftest import picture

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs Debian's chromium and chromium-driver, and selenium",
)


def test_the_page_and_its_files_come_with_a_policy_and_name_no_other_host(server):
    page = server.client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js", "experts.js", "wire.js", "icon.svg", "index.html"):
        got = server.client.get(f"/ui/{name}")
        assert got.status_code == 200
        assert "https://" not in got.text and "//" not in got.text.replace("http://www.w3.org", "").replace(
            "// ", ""
        ), name
    for name in ("..%2fapp.py", "%2e%2e/app.py", "nothing.js"):
        assert server.client.get(f"/ui/{name}").status_code == 404


def test_the_page_can_be_left_out(start):
    assert start(page=False).client.get("/").status_code == 404


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1000,800", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def until(check, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


@pytest.mark.browser
@needs_browser
def test_a_person_asks_about_a_picture_stops_and_asks_again(browser, start, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    server = start(
        Scripted(thoughts="I look at the picture. " * 6, answer="A <b>red</b> 红色 square.", delay_s=0.02)
    )
    find = lambda css: browser.find_element(By.CSS_SELECTOR, css)  # noqa: E731
    every = lambda css: browser.find_elements(By.CSS_SELECTOR, css)  # noqa: E731
    path = tmp_path / "a.png"
    path.write_bytes(picture(120, 90))
    browser.set_window_size(1000, 800)
    browser.get(server.url)
    until(lambda: "tokens of context" in find("#model").text)
    assert browser.switch_to.active_element == find("#question")  # the keyboard is where it is needed
    find("#files").send_keys(str(path))
    until(lambda: every(".chip img"))
    find("#question").send_keys("What is it?", Keys.ENTER)
    until(lambda: find("#stop").is_displayed())
    until(lambda: find("#now").is_displayed())
    assert not find(".thoughts").get_attribute("open")  # folded while it streams
    until(lambda: "tokens/s" in find(".turn.assistant .foot").text)
    assert find(".turn.assistant > .text").text == "A <b>red</b> 红色 square."  # text, never markup
    assert "Thought for" in find(".thoughts summary").text and every(".turn.user img")
    assert "(64 of pictures)" in find(".turn.assistant .foot").text
    browser.save_screenshot(str(tmp_path / "light.png"))

    server.backend.answer = "word " * 400
    find("#question").send_keys("More", Keys.ENTER)
    until(lambda: find("#now").is_displayed())
    find("#now").click()
    until(lambda: "word" in every(".turn.assistant > .text")[-1].text)
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(lambda: "stopped" in every(".turn.assistant .foot")[-1].text)
    until(lambda: server.backend.gauges()["running"] == 0)

    server.backend.answer = "Again."
    every(".turn.assistant .foot button")[-1].click()
    until(lambda: every(".turn.assistant > .text")[-1].text == "Again.")
    every(".turn.user .foot button")[-1].click()
    assert find("#question").get_attribute("value") == "More" and len(every(".turn.assistant")) == 1
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe


@pytest.mark.browser
@needs_browser
def test_a_phone_in_the_dark_has_no_sideways_scroll(browser, start, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    server = start()
    browser.set_window_size(500, 740)  # as narrow as a headless window goes; the device's width is set below
    metrics = {"width": 360, "height": 720, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.get(server.url)
    box = browser.find_element(By.ID, "question")
    box.send_keys("a" * 200, Keys.ENTER)
    until(lambda: "tokens/s" in browser.find_element(By.TAG_NAME, "main").text)
    width, shown = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown == 360
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(23, 21, 19)"
    browser.save_screenshot(str(tmp_path / "phone.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
@needs_browser
def test_the_experts_of_each_token_are_shown_and_found_by_keyboard(browser, start, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    find = lambda css: browser.find_element(By.CSS_SELECTOR, css)  # noqa: E731
    every = lambda css: browser.find_elements(By.CSS_SELECTOR, css)  # noqa: E731
    server = start(Scripted(thoughts="", answer="A red square."))
    path = tmp_path / "a.png"
    path.write_bytes(picture(120, 90))
    browser.set_window_size(1000, 800)
    browser.get(server.url)
    until(lambda: "tokens of context" in find("#model").text)
    find("#settings > summary").click()
    Select(find("#experts")).select_by_value("shown")
    find("#settings > summary").click()
    find("#files").send_keys(str(path))
    until(lambda: every(".chip img"))
    find("#question").send_keys("What is it?", Keys.ENTER)
    until(lambda: "tokens/s" in find(".turn.assistant .foot").text)

    assert find(".turn.assistant > .text").text == "A red square."
    cells = every(".strip i")
    prompt, seen = len(cells) - 2, len(every(".strip i.vision"))  # the last token is never fed back
    assert seen == 64 and prompt > seen
    ActionChains(browser).move_to_element(every(".text .token")[0]).perform()
    chosen = find(".strip i.on")
    assert int(chosen.get_attribute("data-row")) == prompt - 1  # the row that chose the answer's first token
    assert "before “A”" in find(".said").text and "text experts" in find(".said").text
    find(".strip").send_keys(Keys.HOME)
    assert "token 0, vision experts by layer — 1: 3 4 · 2: 6 7" in find(".said").text
    assert find(".strip").get_attribute("aria-valuenow") == "0"
    painted = browser.execute_script(
        "const c = document.querySelector('.maps .vision canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(new Uint32Array(d.buffer)).size"
    )
    assert painted > 4  # shades of use, not one colour
    browser.save_screenshot(str(tmp_path / "experts.png"))
    browser.execute_script("localStorage.clear()")  # the next page starts as a stranger finds it
