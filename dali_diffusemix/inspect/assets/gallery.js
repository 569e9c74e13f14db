"use strict";
// The gallery: filters pages first, then their edits; a page is loaded when it scrolls into view.
const content = JSON.parse(document.getElementById("content").textContent);
const gallery = (() => {
  const pages = content.pages.map(() => null); // groups of a page, once loaded
  const asked = content.pages.map(() => false);
  const at = (id) => document.getElementById(id);
  const chosen = () => ["class", "prompt", "verdict"].map((id) => (at(id).value === "" ? null : at(id).value));

  function element(name, text, parent, classes) {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = text; // never as HTML
    if (classes) made.className = classes;
    if (parent) parent.append(made);
    return made;
  }

  const isRejected = (verdict) => content.rejections.includes(content.verdicts[verdict]);
  function fits(verdict, wanted) {
    if (wanted === null) return true;
    return wanted === "rejected" ? isRejected(verdict) : verdict === Number(wanted);
  }

  function thumb(group, page, number, caption, note, classes) {
    const made = element("div", null, group, "thumb " + classes);
    const picture = element("div", number === undefined ? "not made" : null, made);
    if (number !== undefined) {
      const x = -(number % content.across) * content.side, y = -Math.floor(number / content.across) * content.side;
      picture.style.background = `url("data/sheet-${String(page).padStart(4, "0")}.jpg") ${x}px ${y}px`;
    } else made.classList.add("none");
    element("span", caption, made);
    if (note) element("em", note, made);
    return made;
  }

  function draw(page) {
    const [label, prompt, verdict] = chosen();
    const place = at("page-" + page);
    place.replaceChildren();
    let shown = 0;
    for (const group of pages[page]) {
      if (label !== null && group.class !== Number(label)) continue;
      const edits = group.edits.filter((edit) =>
        (prompt === null || edit.prompt === Number(prompt)) && fits(edit.verdict, verdict));
      if (!edits.length) continue;
      const row = element("div", null, place, "group");
      const title = element("h3", null, row);
      element("b", content.classes[group.class], title);
      title.append(" · " + group.path);
      if (content.beside) thumb(row, page, group.at, "original", null, "original");
      for (const edit of edits) {
        shown++;
        const score = edit.score === null ? "" : " " + edit.score;
        const name = content.prompts[edit.prompt] + (edit.variant ? ` #${edit.variant}` : "");
        const bad = edit.verdict !== 0;
        const made = thumb(row, page, edit.at, name, bad ? content.verdicts[edit.verdict] + score : null,
          bad ? "rejected" : "accepted");
        made.title = `${name}: ${content.verdicts[edit.verdict]}${score}, seed ${edit.seed}`;
      }
    }
    place.dataset.shown = shown;
    place.style.minHeight = "0";
    count();
  }

  function count() {
    const drawn = [...document.querySelectorAll(".page")].filter((place) => place.dataset.shown !== undefined);
    const shown = drawn.reduce((sum, place) => sum + Number(place.dataset.shown), 0);
    const left = document.querySelectorAll(".page").length - drawn.length;
    at("count").textContent = `${shown} edits shown` + (left ? `, more as you scroll` : "");
  }

  function load(page) {
    if (pages[page]) return draw(page);
    if (asked[page]) return;
    asked[page] = true;
    const script = element("script");
    script.src = `data/rows-${String(page).padStart(4, "0")}.js`;
    document.body.append(script);
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      watcher.unobserve(entry.target);
      load(Number(entry.target.id.slice(5)));
    }
  }, { rootMargin: "600px" });

  function filter() {
    const [label, prompt, verdict] = chosen();
    watcher.disconnect();
    at("gallery").replaceChildren();
    content.pages.forEach((page, number) => {
      if (label !== null && !page.classes.includes(Number(label))) return;
      if (prompt !== null && !page.prompts.includes(Number(prompt))) return;
      if (!page.verdicts.some((one) => fits(one, verdict))) return;
      const place = element("div", null, at("gallery"), "page");
      place.id = "page-" + number;
      place.style.minHeight = page.groups * 140 + "px";
      watcher.observe(place);
    });
    if (!at("gallery").children.length) element("p", "No edit matches the filters.", at("gallery"));
    count();
  }

  function options(id, all, names, more) {
    const select = at(id);
    for (const [value, text] of [["", all], ...(more || []), ...names]) element("option", text, select).value = value;
    select.addEventListener("change", filter);
  }

  function overview() {
    const sum = (list) => list.flat(9).reduce((a, b) => a + b, 0);
    const total = sum(content.tally), hours = content.runs.seconds / 3600;
    const shown = content.shown < total ? ` ${content.shown} of them are shown below.` : "";
    at("facts").textContent = `${total} edits of ${content.originals} originals in ${content.classes.length} classes.`
      + shown + (content.beside ? "" : " Originals were not found; give report --root to show them.");
    const occur = content.verdicts.map((_, v) => v).filter((v) => content.tally.some((c) => c.some((p) => p[v])));
    const table = at("tally");
    const head = element("tr", null, table);
    element("th", "prompt", head);
    for (const v of occur) element("th", content.verdicts[v], head);
    const line = (name, counts) => {
      const row = element("tr", null, table);
      element("td", name, row);
      for (const v of occur) element("td", counts[v], row, counts[v] ? "" : "zero");
    };
    const of = (rows) => content.verdicts.map((_, v) => rows.reduce((a, row) => a + row[v], 0));
    content.prompts.forEach((name, p) => line(name, of(content.tally.map((c) => c[p]))));
    const classes = content.classes.map((name, c) => [name, of(content.tally[c])]);
    const worst = classes.filter(([, counts]) => occur.some((v) => v && counts[v]))
      .sort((a, b) => sum(b[1].slice(1)) - sum(a[1].slice(1))).slice(0, 10);
    for (const [name, counts] of worst) line("class " + name, counts);
    for (const [verdict, counts] of Object.entries(content.histograms)) {
      const figure = element("figure", null, at("histograms"), verdict === "accepted" ? "accepted" : "");
      const bars = element("div", null, figure, "bars"), most = Math.max(...counts);
      counts.forEach((n, bin) => {
        const bar = element("i", null, bars);
        bar.style.height = (n ? 3 + 97 * n / most : 0) + "%";
        bar.title = `${(bin / counts.length).toFixed(2)} to ${((bin + 1) / counts.length).toFixed(2)}: ${n}`;
      });
      const caption = element("figcaption", verdict, figure);
      element("span", "0 to 1", caption);
    }
    const rows = { store: content.store, ...content.settings };
    if (content.runs.count) rows["cost"] = `${hours.toFixed(2)} hours in ${content.runs.count} runs on `
      + `${content.runs.hosts.join(", ")}: ${(content.runs.edits / content.runs.seconds).toFixed(1)} edits/s`;
    rows["written by"] = "dali_diffusemix " + content.version;
    for (const [name, value] of Object.entries(rows)) {
      const row = element("tr", null, at("settings"));
      element("td", name, row);
      element("td", String(value), row);
    }
  }

  overview();
  options("class", "all", content.classes.map((name, place) => [place, name]));
  options("prompt", "all", content.prompts.map((name, place) => [place, name]));
  const occurring = content.verdicts.map((name, place) => [place, name])
    .filter(([place]) => content.pages.some((page) => page.verdicts.includes(place)));
  options("verdict", "all", occurring, [["rejected", "rejected by quality"]]);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  return { filter, loaded(page, groups) { pages[page] = groups; if (at("page-" + page)) draw(page); } };
})();
gallery.filter();
