"""Looking at a gallery with a real browser."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROBE = """
const [wanted, done] = arguments;
const frame = () => new Promise((then) => requestAnimationFrame(() => setTimeout(then, 0)));
const cards = () => [...document.querySelectorAll(".card")];
const found = { cards_at_most: 0, pages: new Set(), sheets: new Set(), positions: new Set() };
async function scrolled() {
  const end = document.documentElement.scrollHeight;
  for (let top = 0; top < end + innerHeight; top += innerHeight + 600) { // cards begin 400 before they are in view
    scrollTo(0, top);
    for (let turn = 0; turn < 400; turn++) {
      await frame();
      if (cards().every((card) => card.querySelectorAll(".tile, .well img, .none").length === 2)) break;
    }
    for (const card of cards()) {
      found.positions.add(card.dataset.position);
      for (const tile of card.querySelectorAll(".tile")) found.sheets.add(tile.style.backgroundImage.slice(5, -2));
    }
    found.cards_at_most = Math.max(found.cards_at_most, cards().length);
  }
  scrollTo(0, 0);
}
async function choose(id, text) {
  const select = document.getElementById(id);
  select.value = [...select.options].find((option) => option.text === text).value;
  const changed = new Promise((then) => addEventListener("hashchange", then, { once: true }));
  select.dispatchEvent(new Event("change"));
  await changed;
  await frame();
  const first = document.querySelector(".card");
  return first ? Number(first.getAttribute("aria-setsize")) : 0;
}
(async () => {
  found.scripts_at_first = document.querySelectorAll("body script[src^=data]").length;
  await scrolled();
  found.broken = [];
  for (const url of found.sheets) await new Promise((then) => {
    const image = new Image();
    image.onload = then;
    image.onerror = () => { found.broken.push(url); then(); };
    image.src = url;
  });
  found.filtered = {};
  for (const [id, text] of wanted) {
    found.filtered[`${id} ${text}`] = await choose(id, text);
    await choose(id, document.getElementById(id).options[0].text);
  }
  const injected = "main p img, header img, option img, b img, script:not([src]):not([type])";
  found.injected = document.querySelectorAll(injected).length;
  found.facts = document.getElementById("facts").textContent;
  found.text = document.body.textContent;
  found.all = found.positions.size;
  found.sheets = found.sheets.size;
  done(found);
})();
"""


def browse(browser: Any, page: Path, wanted: list[tuple[str, str]]) -> dict[str, Any]:
    """Open the page, scroll through all of it, use its filters; what there was to see."""
    browser.get(page.as_uri())
    begin = time.monotonic()
    found = dict(browser.execute_async_script(PROBE, wanted))
    return {**found, "seconds": time.monotonic() - begin, "console": browser.get_log("browser")}


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until a condition holds; its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found
