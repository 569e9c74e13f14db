"""Looking at a gallery with a real browser."""

import time
from pathlib import Path
from typing import Any

PROBE = """
const [wanted, done] = arguments;
const wait = (milliseconds) => new Promise((then) => setTimeout(then, milliseconds));
const shown = () => [...document.querySelectorAll(".thumb")].filter((one) => !one.classList.contains("original"));
async function all() {
  for (let turn = 0; turn < 600; turn++) {
    const left = [...document.querySelectorAll(".page")].find((page) => page.dataset.shown === undefined);
    if (!left) break;
    left.scrollIntoView();
    await wait(25);
  }
  return shown().length;
}
async function choose(id, text) {
  const select = document.getElementById(id);
  select.value = [...select.options].find((option) => option.text === text).value;
  select.dispatchEvent(new Event("change"));
  return all();
}
(async () => {
  const found = { scripts_at_first: document.querySelectorAll("body script[src^=data]").length, all: await all() };
  const sheets = new Set([...document.querySelectorAll(".thumb div")].map((one) => one.style.backgroundImage)
    .filter(Boolean).map((text) => text.slice(5, -2)));
  found.broken = [];
  for (const url of sheets) await new Promise((then) => {
    const image = new Image();
    image.onload = then;
    image.onerror = () => { found.broken.push(url); then(); };
    image.src = url;
  });
  found.sheets = sheets.size;
  found.filtered = {};
  for (const [id, text] of wanted) {
    found.filtered[`${id} ${text}`] = await choose(id, text);
    await choose(id, "all");
  }
  found.injected = document.querySelectorAll("h3 img, option img, td img, h1 img").length;
  found.facts = document.getElementById("facts").textContent;
  done(found);
})();
"""


def browse(browser: Any, page: Path, wanted: list[tuple[str, str]]) -> dict[str, Any]:
    """Open the page, scroll through all of it, use its filters; what there was to see."""
    browser.get(page.as_uri())
    begin = time.monotonic()
    found = dict(browser.execute_async_script(PROBE, wanted))
    return {**found, "seconds": time.monotonic() - begin, "console": browser.get_log("browser")}
