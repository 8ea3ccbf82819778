"""The web page in a real browser, as a person uses it: type, search, click, filter, index (make test-app)."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.helpers.app import make_gallery, running_page
from tests.helpers.galleries import draw_picture


pytestmark = pytest.mark.app
WAIT = 300  # seconds, on a busy machine
LAPTOP, PHONE = (1280, 800), (390, 844)
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --force-device-scale-factor=1"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def url(root):
    with running_page(make_gallery(root), root / "page.log", "--images", str(root / "people")) as url:
        yield url


@pytest.fixture(scope="module")
def driver(root):
    from selenium import webdriver

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and chromedriver, "Debian's chromium and chromium-driver are needed: run make test-app"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [*ARGUMENTS.split(), f"--user-data-dir={root / 'profile'}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(WAIT)
    yield driver
    driver.quit()


@pytest.fixture
def person(driver, url):
    """Somebody in front of the page as it opens."""
    return Person(driver, url)


class Person:
    """What one does with a page: looks for something, clicks it, types."""

    def __init__(self, driver, url: str, size: tuple[int, int] = LAPTOP):
        self.driver, self.url, self.width = driver, url, size[0]
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(url)
        self.see("#query textarea")

    def wait(self, condition):
        """Waits until a condition holds; gives what it found."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, WAIT, 0.2, ignored_exceptions=ignored).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return [found for found in self.driver.find_elements("css selector", selector) if found.is_displayed()]

    def see(self, selector: str, text: str = ""):
        """Waits for something with a text; gives it."""
        return self.wait(lambda: next((found for found in self.all(selector) if text in found.text), None))

    def click(self, selector: str, text: str = "") -> None:
        found = self.see(selector, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def type(self, selector: str, text: str) -> None:
        field = self.see(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.clear()
        field.send_keys(text)

    def upload(self, selector: str, path: Path) -> None:
        """Gives a file to the hidden input below an element, once it is there."""
        (field, *_) = self.wait(lambda: self.driver.find_elements("css selector", f"{selector} input[type=file]"))
        field.send_keys(str(path))

    def search(self, text: str) -> list[str]:
        """Types a sentence and searches; gives the keys of the results."""
        self.driver.execute_script("document.querySelectorAll('#results .mra-grid').forEach(old => old.remove())")
        self.type("#query textarea", text)
        self.click("button#search")
        return self.keys()

    def keys(self) -> list[str]:
        return [hit.get_attribute("data-key") for hit in self.wait(lambda: self.all(".mra-hit"))]

    def screenshot(self, name: str) -> None:
        """Saves what is seen, where MRA_SCREENSHOTS says."""
        if folder := os.environ.get("MRA_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def check_width(self) -> None:
        """Nothing sticks out of the page to the right."""
        needed = self.driver.execute_script("return document.documentElement.scrollWidth")
        assert needed <= self.width, f"the page is {needed} pixels wide in a window of {self.width}"


def test_search_click_and_see_where_words_look(person):
    assert "9 images from 3 cameras" in person.see(".mra-title").text
    keys = person.search("a woman in a red coat")
    assert len(keys) == 9 and "9 images in" in person.see("#status").text
    person.screenshot("laptop-results")
    person.check_width()
    person.click(f'.mra-hit[data-key="{keys[1]}"]')
    detail = person.see("#mra-detail", "Result 2")
    assert f"file: {keys[1]}" in detail.text
    captions = [found.text for found in person.all("#mra-detail figcaption")]
    assert captions == ["image", "all words", "a", "woman", "in", "a", "red", "coat"]
    sizes = person.driver.execute_script(
        "return [...document.querySelectorAll('#mra-detail img')].map(i => i.naturalWidth)"
    )
    assert len(sizes) == 8 and min(sizes) > 20
    person.type("#phrases input, #phrases textarea", "black backpack, red coat")
    person.click("button#score")
    person.see("#scored", "black backpack")
    assert len(person.all("#scored .mra-phrase")) == 2
    person.screenshot("laptop-detail")
    person.check_width()


def test_an_example_fills_the_description(person):
    person.click("button.gallery-item, .gallery-item, .example", "yellow handbag")
    field = person.see("#query textarea")
    person.wait(lambda: "yellow handbag" in field.get_property("value"))


def test_filters_threshold_and_reranking(person):
    person.click("#filters button", "Filters")
    person.type("#where input, #where textarea", 'camera == "cam_1" and time > "2026-01-01"')
    keys = person.search("a red coat")
    assert len(keys) == 3 and all(key.startswith("cam_1/") for key in keys)
    person.type("#where input, #where textarea", "camera = 3")
    person.click("button#search")
    assert "cannot be read" in person.see("#status .mra-error").text
    person.type("#where input, #where textarea", " ")

    person.click("#ranking button", "Ranking")
    from selenium.webdriver.common.keys import Keys

    number = person.see("#threshold input[type=number]")
    number.send_keys(Keys.CONTROL + "a")
    number.send_keys("1" + Keys.TAB)
    person.search("a red coat")
    assert "Probably not in the gallery" in person.see("#status .mra-warning").text
    assert len(person.all(".mra-mark")) == 9
    person.screenshot("laptop-unlikely")
    person.click("#rerank input")
    person.search("a red coat")
    person.see("#status", "similarity alone")
    assert all("similarity" in hit.text for hit in person.all(".mra-hit"))


def test_index_an_upload_and_find_what_is_in_it(person, root):
    draw_picture(77).save(root / "newcomer.png")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        archive.write(root / "newcomer.png", "newcomer.png")
        archive.writestr("broken.jpg", "no picture")
    person.click("button[role=tab]", "Add images")
    person.upload("#files", root / "more.zip")
    person.see("#files", ".zip")
    person.click("button#index-upload")
    report = person.see("#report .mra-status", "1 added")
    assert "broken.jpg: not an image that Pillow can read" in report.text
    person.screenshot("laptop-indexed")
    person.see(".mra-title", "10 images")

    person.click("button[role=tab]", "Search")
    person.click("#by-image button", "Search by an image")
    person.upload("#by-image", root / "newcomer.png")
    person.wait(lambda: person.all("#by-image img"))
    person.click("button#search")
    assert person.keys()[0].endswith("/newcomer.png")
    person.click('.mra-hit[data-key$="/newcomer.png"]')
    assert "Ask in words" in person.see("#mra-detail").text


def test_index_a_folder_but_no_other(person, root):
    draw_picture(78).save(root / "people" / "cam_0" / "late.png")
    person.click("button[role=tab]", "Add images")
    person.type("#folder input, #folder textarea", str(root / "people"))
    person.click("button#index-folder")
    person.see("#report .mra-status", "1 added, 9 unchanged")
    person.type("#folder input, #folder textarea", "/etc")
    person.click("button#index-folder")
    person.see("#report .mra-error", "is not in an allowed folder")


def test_on_a_phone(driver, url):
    person = Person(driver, url, PHONE)
    person.check_width()
    person.screenshot("phone-start")
    keys = person.search("a woman in a red coat")
    person.check_width()
    above = "return document.getElementById('results').getBoundingClientRect().top"
    person.wait(lambda: driver.execute_script(above) < PHONE[1] / 2)  # the page scrolls to what it found
    first, second = person.all(".mra-hit")[:2]
    assert first.rect["y"] == second.rect["y"] and first.rect["width"] > 90
    driver.execute_script("arguments[0].scrollIntoView()", first)
    person.screenshot("phone-results")
    person.click(f'.mra-hit[data-key="{keys[0]}"]')
    person.see("#mra-detail", "Result 1")
    person.wait(
        lambda: driver.execute_script("return document.getElementById('mra-detail').getBoundingClientRect().top") < 300
    )
    person.screenshot("phone-detail")
    person.check_width()
    person.click("button[role=tab]", "Add images")
    person.see("button#index-upload")
    person.screenshot("phone-add")
    person.check_width()


def test_nothing_came_from_outside_and_nothing_failed(person):
    person.search("a red coat")
    person.click(".mra-hit")
    person.see("#mra-detail")
    asked = person.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and [name for name in asked if not name.startswith((person.url, "data:", "blob:"))] == []
    severe = [entry["message"] for entry in person.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
