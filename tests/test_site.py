"""The documents as a site: built strictly, complete without a network, and readable on a desktop and on a phone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dali_diffusemix import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(file.relative_to(ROOT / "docs").with_suffix("")) for file in (ROOT / "docs").rglob("*.md"))

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


def test_every_page_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        assert (site / f"{page}.html").is_file()
        assert page == "index" or f'href="{page}.html"' in index


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(script|img|iframe|source|link)\b[^>]*?(src|href)=.?(https?:)?//|url\(.?(https?:)?//")
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = loaded.search(file.read_text(encoding="utf-8"))
        assert found is None, (file.name, found and found[0])


def test_the_help_of_every_command_is_there(site: Path) -> None:
    text = (site / "commands.html").read_text(encoding="utf-8")
    for name in cli.main.commands:
        assert f'id="{name}"' in text
        assert f"Usage: dali-diffusemix {name} " in text


def test_messages_from_a_to_z(site: Path) -> None:
    """Each links to the section that has its remedy."""
    text = (site / "troubleshooting" / "index.html").read_text(encoding="utf-8")
    listed = text[text.index('id="messages-from-a-to-z"') :]
    links = re.findall(r'<li><code>(.*?)</code><br />\s*<a href="([\w./]*)#([^"]+)">', listed)
    assert len(links) > 40 and [message for message, *_ in links if "seed must be the same" in message]
    for message, page, anchor in links:
        target = (site / "troubleshooting" / (page or "index.html")).read_text(encoding="utf-8")
        section = target[target.index(f'id="{anchor}"') :]
        assert f"<strong><code>{message}</code></strong>" in section, (message, page, anchor)


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import dali_diffusemix

    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in dali_diffusemix.__all__:
        assert re.search(rf'id="dali_diffusemix(\.\w+)?\.{name}"', text), name


def test_pages_in_a_browser(site: Path, browser: Any) -> None:
    """No error in the console, no broken picture, and nothing sticks out of the screen of a desktop or of a phone."""

    def show(width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    try:
        for page in PAGES:
            show(1280)
            browser.get((site / f"{page}.html").as_uri())
            broken = browser.execute_async_script(
                """const done = arguments[0];
                Promise.all([...document.images].map((one) => one.decode().then(() => "", () => one.src)))
                  .then((found) => done(found.filter(Boolean)));"""
            )
            assert broken == []
            for width in (1280, 390):
                show(width)
                shown, wide, screen = browser.execute_script(
                    """const page = document.documentElement;
                    return [window.innerWidth, page.scrollWidth, page.clientWidth];"""
                )
                assert shown == width
                assert wide <= screen, f"{page} is {wide} pixels wide on a screen of {screen}"
            assert [entry["message"] for entry in browser.get_log("browser")] == [], page
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_wide_tables_on_a_phone(site: Path, browser: Any) -> None:
    """A cell is as wide as the page, and begins with the name of its column."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.get((site / "dropin.html").as_uri())
        cells = browser.execute_script(
            """return [...document.querySelectorAll("table[data-stacked] td:not(:first-child):not(:empty)")].map(
                 (one) => [one.offsetWidth, getComputedStyle(one, "::before").content])"""
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(cells) > 50 and all(width > 250 and len(name) > len('" : "') for width, name in cells)


def test_search_works_in_a_folder(site: Path, browser: Any) -> None:
    browser.set_window_size(1280, 900)
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.get((site / "index.html").as_uri())
    found = browser.execute_async_script(
        """const done = arguments[0];
        const query = document.querySelector("[data-md-component=search-query]");
        query.focus();
        query.value = "quarantine";
        query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
        query.dispatchEvent(new Event("input", {bubbles: true}));
        const begin = Date.now();
        (function look() {
          const results = [...document.querySelectorAll(".md-search-result__link")].map((one) => one.href);
          if (results.length || Date.now() - begin > 20000) done(results); else setTimeout(look, 50);
        })();"""
    )
    assert any("dropin.html" in link for link in found), found
