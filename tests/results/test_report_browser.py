"""The site in a real browser: what is clicked, what is seen, and what is asked for."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from results.report.content import slug
from tests.results.report_world import EVIL, make_site

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)
MANY = 10_000


class Browser:
    """One headless Chromium that reads pages from files and notes all that it asks for."""

    def __init__(self) -> None:
        from selenium.webdriver import Chrome
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = str(BROWSER)
        # The sandbox of Chromium needs a user of its own, which a container's root is not; the
        # pages are ours.
        for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
            options.add_argument(f"--{switch}")
        options.add_argument("--window-size=1280,900")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_script_timeout(10)

    def open(self, path: Path, fragment: str = "") -> None:
        self.driver.get(path.resolve().as_uri() + fragment)

    def js(self, script: str, *values: object) -> object:
        return self.driver.execute_script(f"return {script}", *values)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        [found] = self.all(selector)
        return found

    def texts(self, selector: str) -> list[str]:
        found = self.js(
            "[...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector
        )
        assert isinstance(found, list)
        return found

    def wait(self, script: str, seconds: float = 15) -> None:
        until = time.monotonic() + seconds
        while not self.js(script):
            assert time.monotonic() < until, f"waited in vain for {script}"
            time.sleep(0.05)

    def size(self, width: int, height: int) -> None:
        values = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def requests(self) -> set[str]:
        """Return what was asked for since the last call."""
        entries = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        return {
            entry["message"]["params"]["request"]["url"]
            for entry in entries
            if entry["message"]["method"] == "Network.requestWillBeSent"
        }

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("browsed"))


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(opened: Browser, site: Path) -> Iterator[Browser]:
    """Return the browser; afterwards nothing may have left the site, and nothing may be wrong."""
    opened.requests()
    opened.complaints()
    yield opened
    assert opened.complaints() == []
    asked = opened.requests()
    assert asked, "the browser's log is empty, so this would prove nothing"
    # pytest's own folder, in which all sites of this file lie.
    allowed = (site.resolve().parent.parent.as_uri(), "data:", "about:blank")
    assert [url for url in asked if not url.startswith(allowed)] == []
    opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    opened.scheme("light")


def values(browser: Browser, column: int) -> list[str]:
    return browser.texts(f"table.results tbody tr > :nth-child({column}) a")


def test_columns_sort_both_ways_by_mouse_and_by_keyboard(browser: Browser, site: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(site / "tasks" / "toy.html")
    heading = browser.one("th[data-key=speedup]")
    assert heading.get_attribute("aria-sort") == "descending"
    column = 1 + browser.js(
        "[...document.querySelector('table.results thead tr').cells].indexOf(arguments[0])", heading
    )
    before = values(browser, column)
    assert [float(value) for value in before] == sorted(map(float, before), reverse=True)
    heading.find_element("css selector", "button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert list(map(float, values(browser, column))) == sorted(map(float, before))
    heading.find_element("css selector", "button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert list(map(float, values(browser, column))) == list(map(float, before))
    # Rows without a number stay last.
    assert "failed" in browser.texts("table.results tbody tr")[-1]
    method = browser.one("th[data-key=method] button")
    method.send_keys(Keys.ENTER)
    assert browser.one("th[data-key=method]").get_attribute("aria-sort") == "ascending"
    assert heading.get_attribute("aria-sort") is None
    shown = values(browser, 1)
    # Punctuation comes before letters.
    assert shown[1:] == ["broken", "fast", "fast", "plain", "plain", "slow"]


def test_filters_narrow_down_and_are_cleared(browser: Browser, site: Path) -> None:
    from selenium.webdriver.support.select import Select

    browser.open(site / "tasks" / "toy.html")
    assert browser.one(".status").text == "7 results"
    for name, value, expected in (
        ("family", "drafting", 2),
        ("hardware", "gpu-test", 2),
        ("scale", "paper", 2),
        ("verdict", "FASTER", 3),
    ):
        Select(browser.one(f"select[name={name}]")).select_by_visible_text(value)
        assert browser.one(".status").text == f"{expected} of 7 results", name
        assert len(browser.all("table.results tbody tr")) == expected
        browser.one("button[type=reset]").click()
        browser.wait("document.querySelector('.status').textContent === '7 results'")
    browser.one("input[name=method]").send_keys("size 8")
    assert values(browser, 1) == ["fast"]


def test_a_number_leads_to_its_sql_and_its_rows(browser: Browser, site: Path) -> None:
    browser.open(site / "tasks" / "toy.html")
    link = browser.one("td.number a[href$='#c-cell-fast-speedup']")
    shown = link.text
    link.click()
    assert browser.driver.current_url.endswith("experiment-1.html#c-cell-fast-speedup")
    row = browser.one("tr:target")
    assert row.find_element("css selector", "td.number").text.startswith(shown)
    assert "SELECT speedup, speedup_low" in row.text
    target = browser.all("main > p a[href$='samples.csv']")[0].get_attribute("href")
    assert Path(target.removeprefix("file://")).read_text().startswith("cell_id,")
    browser.one("a.brand").click()
    assert browser.driver.title == "Results · tokenmark"


def test_charts_are_drawn_when_they_come_near_and_follow_the_choice(
    browser: Browser, site: Path
) -> None:
    from selenium.webdriver.support.select import Select

    browser.size(1280, 300)
    browser.open(site / "tasks" / "toy.html")
    assert browser.js("window.Plotly === undefined")
    Select(browser.one("select[name=chart]")).select_by_index(1)
    browser.js("document.querySelector('.chart').scrollIntoView()")
    browser.wait("document.querySelector('.chart').dataset.drawn === 'speed'")
    assert len(browser.all(".chart .scatterlayer .point")) == 4
    legend = browser.texts(".chart .legendtext")
    assert legend[0] == "on the front"
    assert "undecided: intervals overlap" in legend
    assert len(browser.all(".chart .errorbar")) == 4
    browser.one("details.points > summary").click()
    chips = browser.texts("details.points .chip")
    assert sorted(chips) == ["dominated", "front", "undecided", "undecided"]
    buttons = browser.all(".axes button")
    buttons[1].click()
    browser.wait("document.querySelector('.chart').dataset.drawn === 'memory'")
    pressed = [each.get_attribute("aria-pressed") for each in browser.all(".axes button")]
    assert pressed == ["false", "true"]
    assert browser.js("document.activeElement.textContent") == "Memory"
    assert "Left and up is better" in browser.one(".charts .explained").text
    # `muted`, in the scheme that holds.
    words = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    assert browser.js(words) == "rgb(90, 93, 99)"
    browser.scheme("dark")
    browser.wait(f"{words} === 'rgb(167, 171, 178)'")


def test_hostile_text_runs_nowhere(browser: Browser, site: Path) -> None:
    for path in (f"tasks/{slug(EVIL)}.html", f"methods/{slug(EVIL)}.html", "methods/fast.html"):
        browser.open(site / path)
        browser.js("document.querySelector('.chart').scrollIntoView()")
        browser.wait("document.querySelector('.chart').dataset.drawn")
        assert browser.js("window.owned === undefined")
        assert browser.js("document.querySelectorAll('main img').length") == 0
        assert "<script>" in browser.one("h1").text or path == "methods/fast.html"
        if slug(EVIL) in path and path.startswith("methods"):
            [name] = browser.texts(".chart .annotation-text")
            assert name.startswith('"><img src=x')
    # Sorting and filtering make rows anew from the data.
    browser.open(site / "tasks" / "toy.html")
    browser.one("th[data-key=method] button").click()
    assert any("<script>" in text for text in browser.texts("table.results tbody th"))
    assert browser.js("document.querySelectorAll('main img, tbody script').length") == 0


def test_both_schemes_are_drawn_and_one_can_be_chosen(browser: Browser, site: Path) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    browser.open(site / "index.html")
    assert browser.js(ground) == "rgb(255, 255, 255)"
    browser.scheme("dark")
    dark = browser.js(ground)
    assert dark == "rgb(21, 23, 26)"
    switch = browser.one(".theme")
    switch.click()
    assert switch.text == "Theme: light"
    assert browser.js(ground) == "rgb(255, 255, 255)"
    browser.scheme("light")
    switch.click()
    assert browser.js(ground) == dark
    switch.click()
    assert browser.js(ground) == "rgb(255, 255, 255)"


def test_a_phone_sees_every_page_without_scrolling_sideways(browser: Browser, site: Path) -> None:
    browser.size(360, 740)
    for path in sorted(site.rglob("*.html")):
        browser.open(path)
        # Once it has settled: right after loading the widths may still be other ones.
        browser.wait("document.documentElement.scrollWidth === 360 && innerWidth === 360")
    browser.open(site / "tasks" / "toy.html")
    # The table scrolls inside its frame, and the method stays in sight.
    frame = browser.one(".grid .scroll")
    assert browser.js("arguments[0].scrollWidth > arguments[0].clientWidth", frame)
    browser.js("arguments[0].scrollLeft = 300", frame)
    left = browser.js("document.querySelector('.results tbody th').getBoundingClientRect().left")
    assert 0 <= left < 40
    assert not browser.one("form.filters").is_displayed()
    browser.one(".filtering > summary").click()
    assert browser.one("form.filters").is_displayed()


def test_the_keyboard_reaches_everything_in_order(browser: Browser, site: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(site / "tasks" / "toy.html")
    reached = []
    for _ in range(40):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.append(
            browser.js("document.activeElement.name || document.activeElement.textContent")
        )
    assert reached[:5] == ["Skip to the content", "tokenmark", "Tasks", "Methods", "Runs"]
    for expected in ("method", "family", "speed-up", "SQL, rows"):
        assert any(expected in str(each) for each in reached), expected
    # What has the focus can be seen.
    outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.open(site / "tasks" / "toy.html")
    ActionChains(browser.driver).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert browser.driver.current_url.endswith("#main")
    assert browser.js("document.activeElement.id") == "main"


def test_ten_thousand_rows_are_fast(browser: Browser, site: Path) -> None:
    page = (site / "tasks" / "toy.html").read_text(encoding="utf-8")
    tag = '<script type="application/json" class="data">'
    begin = page.index(tag) + len(tag)
    end = page.index("</script>", begin)
    content = json.loads(page[begin:end])
    measured = content["rows"][0]
    content["rows"] = [{**measured, "method": f"method-{place}"} for place in range(MANY)]
    path = site / "tasks" / "many.html"
    many = json.dumps(content).replace("<", "\\u003c")
    path.write_text(page[:begin] + many + page[end:], encoding="utf-8")
    browser.open(path)
    assert browser.one(".status").text == f"{MANY} results"
    assert len(browser.all("table.results tbody tr")) == 50
    took = browser.js(
        """(() => {
            const [heading] = document.querySelectorAll('th[data-key=method] button');
            const field = document.querySelector('input[name=method]');
            const begin = performance.now();
            heading.click();
            const sorted = performance.now();
            field.value = 'method-777';
            field.dispatchEvent(new Event('input', {bubbles: true}));
            return [sorted - begin, performance.now() - sorted];
        })()"""
    )
    assert browser.one(".status").text == f"11 of {MANY} results"
    # A tenth of that on an idle machine; what must not be is a page that hangs.
    assert max(took) < 2000, took
    browser.one("button[type=reset]").click()
    browser.wait(f"document.querySelector('.status').textContent === '{MANY} results'")
    browser.one("[data-page=next]").click()
    assert browser.one(".pages span").text == "Page 2 of 200"
    path.unlink()
