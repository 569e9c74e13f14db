"use strict";
// The gallery of `report`, which is read-only, and of `review`, which saves choices at once.
// An edit is known by its place in the columns; `list` has the places that the filters show, in order.
const gallery = (() => {
  const at = (id) => document.getElementById(id);
  const content = JSON.parse(at("content").textContent);
  const { writable, classes, prompts, verdicts } = content;
  const count = content.count;
  const number = (value) => value.toLocaleString("en-US");
  const many = (value, what) => `${number(value)} ${what}${value === 1 ? "" : "s"}`;

  function element(name, text, parent, names) {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = text; // never as HTML
    if (names) made.className = names;
    if (parent) parent.append(made);
    return made;
  }

  // The columns ------------------------------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const whole = (name) => new Int32Array(bytes(content.columns[name]).buffer);
  const shard = whole("shard"), row = whole("row"), label = whole("class"), prompt = whole("prompt");
  const verdict = bytes(content.columns.verdict), rejected = bytes(content.columns.rejected);
  const scores = new Map(Object.entries(content.columns.scores)
    .map(([name, text]) => [name, new Float32Array(bytes(text).buffer)]));
  const byQuality = (place) => content.rejections.includes(verdicts[verdict[place]]);
  const choosable = (place) => verdict[place] === 0;
  const scoreText = (value) => String(Number(value.toPrecision(3)));

  // Details of edits, by chunk ---------------------------------------------------------------------------------------

  const chunks = new Map(); // chunk to details, or null while it is loading
  const detail = (place) => chunks.get(Math.floor(place / content.chunk))?.[place % content.chunk];

  function ask(place) {
    const chunk = Math.floor(place / content.chunk);
    if (chunks.has(chunk)) return;
    chunks.set(chunk, null);
    if (writable) {
      fetch(`rows/${chunk}`).then(answered).then((found) => loaded(chunk, found), (error) => {
        chunks.delete(chunk);
        problem(`Not loaded: ${error.message}`);
      });
    } else {
      const script = element("script");
      script.src = `data/rows-${String(chunk).padStart(4, "0")}.js`;
      script.onerror = () => problem(`Not loaded: ${script.getAttribute("src")} is missing.`);
      document.body.append(script);
    }
  }

  function loaded(chunk, found) {
    chunks.set(chunk, found);
    for (const [position, card] of cards) {
      if (Math.floor(list[position] / content.chunk) === chunk) fill(card, list[position]);
    }
    if (box.open && Math.floor(list[current] / content.chunk) === chunk) showBox();
  }

  async function answered(response) {
    if (response.ok) return response.json();
    throw new Error((await response.json().catch(() => ({}))).error || `the server answers ${response.status}`);
  }

  // Pictures ---------------------------------------------------------------------------------------------------------

  // [width, height] of the picture there is of an edit or its original; null: none.
  function natural(place, which) {
    const found = detail(place);
    const tile = which === "edit" ? found.edit : found.originalAt;
    if (!writable) return tile ? tile.slice(2) : null;
    const size = which === "edit" ? found.size : found.originalSize;
    return size ? [size[1], size[0]] : null;
  }

  function picture(place, which, width, height, large) {
    const found = detail(place);
    let made;
    if (writable) {
      made = element("img");
      made.alt = "";
      made.draggable = false;
      made.decoding = "async";
      made.src = which === "edit" ? `edit/${shard[place]}/${row[place]}` : `original/${found.original}${large ? "/large" : ""}`;
      made.onerror = () => made.replaceWith(none("cannot be shown"));
    } else {
      const [left, top, across, down] = which === "edit" ? found.edit : found.originalAt;
      const x = width / across, y = height / down;
      made = element("div", null, null, "tile");
      made.style.backgroundImage = `url("data/sheet-${String(found.sheet).padStart(4, "0")}.${content.sheets.ending}")`;
      made.style.backgroundSize = `${content.sheets.width * x}px ${found.sheetHeight * y}px`;
      made.style.backgroundPosition = `${-left * x}px ${-top * y}px`;
    }
    made.style.width = width + "px";
    made.style.height = height + "px";
    return made;
  }

  const absent = (place, which) => (which === "edit" ? "not made"
    : verdicts[verdict[place]] === "unreadable original" ? "unreadable" : "no original");
  const none = (text) => element("span", text, null, "none");

  // How large a picture is drawn in a room: small ones by whole factors, so that their pixels stay pixels.
  function fitted([width, height], across, down, most) {
    let scale = Math.min(across / width, down / height);
    const pixels = scale >= 2 && Math.max(width, height) <= 128;
    if (pixels) scale = Math.floor(scale);
    else scale = Math.min(scale, most);
    return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)), scale, pixels };
  }

  function well(place, which, across, down) {
    const made = element("span", null, null, "well");
    made.style.width = across + "px";
    made.style.height = down + "px";
    const size = natural(place, which);
    if (!size) {
      made.append(none(absent(place, which)));
      return made;
    }
    const fit = fitted(size, across, down, 1);
    const shown = picture(place, which, fit.width, fit.height, false);
    shown.classList.toggle("pixels", fit.pixels);
    made.append(shown);
    if (fit.pixels) element("span", `${size[0]} × ${size[1]}, each pixel ${fit.scale} × ${fit.scale}`, made, "size");
    return made;
  }

  // Filters and order, kept in the address ---------------------------------------------------------------------------

  const FILTERS = ["class", "prompt", "verdict", "decision", "sort"];
  const DECISIONS = [["undecided", "not rejected"], ["rejected", "rejected"]];
  let list = new Int32Array(0), all = 0, seenHere = 0;
  let chosenHere = false, byPointer = false; // a menu was changed on this page; by the mouse

  function options(id, choices) {
    const select = at(id);
    for (const [value, text] of choices) element("option", text, select).value = value;
    select.addEventListener("pointerdown", () => { byPointer = true; });
    select.addEventListener("keydown", () => { byPointer = false; });
    select.addEventListener("change", () => {
      const chosen = new URLSearchParams();
      for (const name of FILTERS) if (at(name).value) chosen.set(name, at(name).value);
      chosenHere = true;
      location.hash = chosen.toString(); // a step for the back button
    });
  }

  function fromAddress() {
    if (box.open) box.close();
    const chosen = new URLSearchParams(location.hash.slice(1));
    for (const name of FILTERS) {
      const select = at(name), value = chosen.get(name) || "";
      select.value = [...select.options].some((option) => option.value === value) ? value : "";
      select.classList.toggle("set", select.value !== "");
    }
    const before = list.length ? list[current] : undefined;
    const [inClass, inPrompt] = [classes.indexOf(at("class").value), prompts.indexOf(at("prompt").value)];
    const [wanted, hand, sort] = ["verdict", "decision", "sort"].map((id) => at(id).value);
    const ofVerdict = verdicts.indexOf(wanted);
    const found = new Int32Array(count);
    let length = 0;
    for (let place = 0; place < count; place++) {
      if (inClass >= 0 && label[place] !== inClass) continue;
      if (inPrompt >= 0 && prompt[place] !== inPrompt) continue;
      if (ofVerdict >= 0 && verdict[place] !== ofVerdict) continue;
      if (wanted === "rejected" && !byQuality(place)) continue;
      if (hand && (!choosable(place) || isRejected(place) !== (hand === "rejected"))) continue;
      found[length++] = place;
    }
    list = found.subarray(0, length);
    if (sort) {
      const sign = sort.startsWith("-") ? -1 : 1, values = scores.get(sort.slice(sign < 0 ? 1 : 0));
      const key = (place) => (Number.isNaN(values[place]) ? Infinity : sign * values[place]);
      list.sort((a, b) => {
        const [first, second] = [key(a), key(b)];
        return first < second ? -1 : first > second ? 1 : a - b;
      });
    }
    all = length;
    seenHere = list.reduce((sum, place) => sum + seen[place], 0);
    // Whoever asks for the worst first wants to see the first.
    current = Math.max(0, before === undefined || chosenHere ? 0 : list.indexOf(before));
    at("nothing").hidden = length > 0;
    layout();
    if (chosenHere && byPointer) focusOn(0); // keys are for the edits again
    else if (chosenHere && scrollY > 0) scrollTo(0, 0);
    chosenHere = false;
  }

  // The grid: of a hundred thousand cards only those in view exist ---------------------------------------------------

  const grid = at("gallery"), cards = new Map(); // position in the list to its card
  const GAP = 14, PAD = 10, BETWEEN = 6, WORDS = 50, BEYOND = 400;
  let columns = 1, cardWidth = 0, side = 0, rowHeight = 1, current = 0;

  function layout() {
    const focused = grid.contains(document.activeElement);
    const width = grid.clientWidth;
    columns = Math.max(1, Math.floor((width + GAP) / (2 * 256 + BETWEEN + 2 * PAD + GAP)));
    cardWidth = Math.floor((width - GAP * (columns - 1)) / columns);
    side = Math.min(320, Math.floor((cardWidth - 2 * PAD - BETWEEN) / 2));
    rowHeight = side + 2 * PAD + WORDS + GAP;
    for (const card of cards.values()) card.remove();
    cards.clear();
    const height = Math.ceil(all / columns) * rowHeight;
    grid.style.height = height + "px";
    // Browsers end very long pages.
    const rows = grid.offsetHeight < height - 1 ? Math.floor(grid.offsetHeight / rowHeight) : Infinity;
    list = list.subarray(0, Math.min(all, rows * columns));
    current = Math.min(current, Math.max(0, list.length - 1));
    draw();
    if (focused && list.length) focusOn(current);
    progress();
  }

  function draw() {
    const top = -grid.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((top - BEYOND) / rowHeight) * columns);
    const end = Math.min(list.length, Math.ceil((top + innerHeight + BEYOND) / rowHeight) * columns);
    const needed = (position) => (position >= first && position < end) || (position === current && list.length > 0);
    for (const [position, card] of cards) {
      if (!needed(position)) {
        card.remove();
        cards.delete(position);
      }
    }
    for (let position = first; position < end; position++) if (!cards.has(position)) make(position);
    if (list.length && !cards.has(current)) make(current);
  }

  function make(position) {
    const card = element("div", null, null, "card");
    card.setAttribute("role", "listitem");
    card.setAttribute("aria-posinset", position + 1);
    card.setAttribute("aria-setsize", list.length);
    card.dataset.position = position;
    card.style.width = cardWidth + "px";
    card.style.height = rowHeight - GAP + "px";
    card.style.left = (position % columns) * (cardWidth + GAP) + "px";
    card.style.top = Math.floor(position / columns) * rowHeight + "px";
    const next = [...cards.keys()].filter((other) => other > position).reduce((a, b) => Math.min(a, b), Infinity);
    grid.insertBefore(card, cards.get(next) || null); // in order, for the Tab key and screen readers
    cards.set(position, card);
    fill(card, list[position]);
  }

  const scoresOf = (place) => [...scores].filter(([, values]) => !Number.isNaN(values[place]))
    .map(([name, values]) => `${name} ${scoreText(values[place])}`).join(", ");
  const nameOf = (place) => prompts[prompt[place]] + (detail(place)?.variant ? ` #${detail(place).variant}` : "");

  function fill(card, place) {
    const found = detail(place), focused = card.contains(document.activeElement) && document.activeElement.className;
    card.replaceChildren();
    const pair = element("button", null, card, "pair");
    pair.type = "button";
    if (found) pair.append(well(place, "original", side, side), well(place, "edit", side, side));
    else {
      for (let i = 0; i < 2; i++) {
        const empty = element("span", null, pair, "well");
        empty.style.width = empty.style.height = side + "px";
      }
      ask(place);
    }
    const words = element("div", null, card, "words");
    const lines = element("div", null, words);
    const first = element("p", null, lines);
    element("b", nameOf(place), first);
    if (scoresOf(place)) first.append(" · " + scoresOf(place));
    element("p", found ? found.path : classes[label[place]], lines);
    lines.title = found ? `${nameOf(place)}\n${found.path}\nclass ${classes[label[place]]}\nseed ${found.seed}\n`
      + `shard ${shard[place]}, row ${row[place]}` : "";
    if (writable && choosable(place)) element("button", "", words, "mark reject").type = "button";
    element("span", "", card, "badge");
    paint(card, place);
    if (focused) card.querySelector(focused.startsWith("mark") ? ".mark" : ".pair").focus({ preventScroll: true });
  }

  const isRejected = (place) => (saving.has(place) ? saving.get(place).wanted : rejected[place] === 1);

  // The words of a mark, and its class.
  function markOf(place) {
    if (saving.has(place)) return ["saving…", "saving"];
    if (rejected[place]) return ["rejected", "hand"];
    return choosable(place) ? ["", ""] : [verdicts[verdict[place]], "quality"];
  }

  function paint(card, place) {
    const position = Number(card.dataset.position), [text, kind] = markOf(place), found = detail(place);
    card.classList.toggle("rejected", rejected[place] === 1 && !saving.has(place));
    card.classList.toggle("here", position === current);
    const badge = card.querySelector(".badge"), pair = card.querySelector(".pair"), mark = card.querySelector(".mark");
    badge.className = `badge ${kind}`;
    badge.textContent = text;
    badge.hidden = !text;
    pair.tabIndex = position === current ? 0 : -1;
    pair.setAttribute("aria-label", `${nameOf(place)}, class ${classes[label[place]]}, ${found ? found.path : ""}, `
      + `${verdicts[verdict[place]]}${scoresOf(place) ? ", " + scoresOf(place) : ""}${rejected[place] ? ", rejected by hand" : ""}`);
    if (mark) {
      mark.tabIndex = pair.tabIndex;
      mark.setAttribute("aria-pressed", String(isRejected(place)));
      mark.textContent = isRejected(place) ? "Restore" : "Reject";
    }
  }

  function repaint() {
    for (const [position, card] of cards) paint(card, list[position]);
    if (box.open) paintBox();
    progress();
  }

  // The filters that are set, in words; not the order.
  const filters = () => FILTERS.slice(0, -1).filter((id) => at(id).value).map((id) =>
    `${at(id).parentElement.firstChild.textContent.trim().toLowerCase()} ${at(id).selectedOptions[0].text}`).join(", ");

  function progress() {
    const bar = at("seen");
    bar.max = Math.max(1, list.length);
    bar.value = seenHere;
    let marked = 0;
    for (const place of list) marked += rejected[place];
    const cut = list.length < all ? ` (the first ${number(list.length)} are shown; filter them to see others)` : "";
    at("count").textContent = `${number(seenHere)} of ${number(all)} seen, ${number(marked)} rejected${cut}`;
    at("filtered").textContent = filters() && `· ${filters()}`;
    at("undo").disabled = !steps.length;
  }

  function here(position) {
    const before = cards.get(current);
    current = position;
    if (before) paint(before, list[Number(before.dataset.position)]);
    const place = list[position];
    if (!seen[place]) {
      seen[place] = 1;
      seenHere++;
      keepSeen();
    }
    if (cards.has(position)) paint(cards.get(position), place);
    progress();
  }

  function focusOn(position, scroll = true) {
    if (!list.length) return;
    position = Math.max(0, Math.min(list.length - 1, position));
    if (scroll) {
      const top = grid.getBoundingClientRect().top + Math.floor(position / columns) * rowHeight;
      const above = at("bar").offsetHeight + 8;
      if (top < above) scrollBy(0, top - above);
      else if (top + rowHeight > innerHeight) scrollBy(0, Math.min(top - above, top + rowHeight - innerHeight));
    }
    here(position);
    draw();
    cards.get(position).querySelector(".pair").focus({ preventScroll: true });
  }

  // What was seen, in this browser -----------------------------------------------------------------------------------

  const seen = new Uint8Array(count), SEEN = `dali-diffusemix seen ${content.store}`;
  const PLACE = `dali-diffusemix place ${content.store}`;
  let stored = {}, waiting = 0; // shard to a bit for each row, base64

  function readSeen() {
    try {
      stored = JSON.parse(localStorage.getItem(SEEN) || "{}");
      const bits = new Map(Object.entries(stored).map(([name, text]) => [Number(name), bytes(text)]));
      for (let place = 0; place < count; place++) {
        seen[place] = ((bits.get(shard[place])?.[row[place] >> 3] || 0) >> (row[place] & 7)) & 1;
      }
    } catch {
      stored = {}; // a browser that keeps nothing, or what something else wrote
    }
  }

  function keepSeen() {
    waiting ||= setTimeout(writeSeen, 500);
  }

  function writeSeen() {
    if (!waiting) return;
    clearTimeout(waiting);
    waiting = 0;
    const bits = new Map();
    for (let place = 0; place < count; place++) if (seen[place]) {
      const rows = bits.get(shard[place]) || [...bytes(stored[shard[place]] || "")];
      while (rows.length <= row[place] >> 3) rows.push(0);
      rows[row[place] >> 3] |= 1 << (row[place] & 7);
      bits.set(shard[place], rows);
    }
    for (const [name, rows] of bits) stored[name] = btoa(rows.map((one) => String.fromCharCode(one)).join(""));
    try {
      localStorage.setItem(SEEN, JSON.stringify(stored));
    } catch {
      // It is full or forbidden; only the count of seen edits is lost.
    }
  }

  // Choices ----------------------------------------------------------------------------------------------------------

  const saving = new Map(); // place to {wanted, by}, until the server has it
  const steps = []; // for undo: {places, wanted}
  let queue = Promise.resolve(); // one after another, in the order of the keys

  function save(places, wanted, failed) {
    const by = {};
    for (const place of places) saving.set(place, { wanted, by });
    repaint();
    const settle = (done) => {
      for (const place of places) if (saving.get(place)?.by === by) saving.delete(place);
      done();
      repaint();
    };
    queue = queue.then(() => post(places, wanted)).then(
      () => settle(() => {
        for (const place of places) rejected[place] = wanted ? 1 : 0;
        at("problem").hidden = true;
      }),
      (error) => settle(() => {
        failed();
        problem(`Not saved: ${error.message}`);
      }));
  }

  async function post(places, wanted) {
    const edits = places.map((place) => [shard[place], row[place]]);
    const body = JSON.stringify({ decision: wanted ? "reject" : "undo", edits });
    let response;
    try {
      response = await fetch("decisions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body,
        keepalive: body.length < 30000, // so that it arrives even if the page is closed now
      });
    } catch {
      throw new Error("the server does not answer. Start `dali-diffusemix review` again, and open the address it prints.");
    }
    return answered(response);
  }

  function choose(places, wanted) {
    const step = { places, wanted };
    at("news").classList.remove("shown"); // it told of the choice before
    steps.push(step);
    save(places, wanted, () => {
      if (steps.includes(step)) steps.splice(steps.indexOf(step), 1);
    });
  }

  function toggle() {
    const place = list[current];
    if (!writable || place === undefined) return;
    if (choosable(place)) choose([place], !isRejected(place));
    else news(`Only accepted edits can be rejected; this one is “${verdicts[verdict[place]]}”.`);
  }

  function undo() {
    if (!writable) return;
    let step = steps.pop();
    const place = list[current];
    if (!step && place !== undefined && isRejected(place)) step = { places: [place], wanted: true };
    if (!step) return news("There is nothing to undo.");
    save(step.places, !step.wanted, () => steps.push(step));
    const what = step.places.length === 1 ? nameOf(step.places[0]) : many(step.places.length, "edit");
    news(step.wanted ? `Undone: ${what} no longer rejected.` : `Undone: ${what} rejected again.`);
    const position = step.places.length === 1 ? list.indexOf(step.places[0]) : -1;
    if (position >= 0 && position !== current) box.open ? move(position) : focusOn(position);
  }

  function rejectAll() {
    if (!writable) return;
    const places = [...list].filter((place) => choosable(place) && !isRejected(place));
    if (!places.length) return news("No edit is shown that could be rejected.");
    at("confirm-text").textContent = `Reject ${many(places.length, "edit")}?`;
    at("confirm-why").textContent = (filters() ? `All that are shown: ${filters()}.` : "All edits of the store: no filter is set.")
      + " Undo takes it back in one step.";
    at("confirm-yes").textContent = `Reject ${number(places.length)}`;
    const dialog = at("confirm");
    dialog.returnValue = "no";
    dialog.onclose = () => {
      if (dialog.returnValue === "yes") {
        choose(places, true);
        news(`${many(places.length, "edit")} rejected.`);
      }
    };
    dialog.showModal();
  }

  // Large ------------------------------------------------------------------------------------------------------------

  const box = at("box");
  let flipping = false, flipped = false; // in one place; and the original is there

  function openBox(position) {
    if (!list.length) return;
    here(position);
    flipped = false;
    box.showModal();
    box.prepend(at("problem"));
    box.append(at("news"));
    box.focus();
    showBox();
  }

  function move(position) {
    if (position < 0 || position >= list.length) return;
    here(position);
    flipped = false;
    showBox();
  }

  function showBox() {
    const place = list[current], found = detail(place), room = at("box-pictures");
    at("box-name").textContent = nameOf(place);
    at("box-facts").textContent = [found?.path, `class ${classes[label[place]]}`, scoresOf(place),
      `${number(current + 1)} of ${number(list.length)}`].filter(Boolean).join(" · ");
    at("box-previous").disabled = current === 0;
    at("box-next").disabled = current === list.length - 1;
    at("box-flip").setAttribute("aria-pressed", String(flipping));
    paintBox();
    room.replaceChildren();
    if (!found) return ask(place);
    const figures = (flipping ? ["both"] : ["original", "edit"]).map((which) => {
      const figure = element("figure", null, room);
      return [which, element("div", null, figure, "well"), element("figcaption", "", figure)];
    });
    for (const figure of figures) figure[2].textContent = "\u00a0"; // its height is part of the layout
    for (const [which, place_, caption] of figures) {
      const size = natural(place, which === "original" ? "original" : "edit");
      const shown = which === "both" ? (flipped ? "original" : "edit") : which;
      if (!natural(place, shown) || !size) {
        place_.append(none(absent(place, shown)));
        caption.textContent = shown;
        continue;
      }
      // Flipped, the original takes the shape of the edit, as it did when the edit was made.
      const fit = fitted(size, place_.clientWidth, place_.clientHeight, 3);
      const image = picture(place, shown, fit.width, fit.height, true);
      image.classList.toggle("pixels", fit.pixels);
      if (which === "both") image.style.objectFit = "fill";
      place_.append(image);
      const stored = shown === "edit" ? found.size : found.originalSize;
      const scale = fit.pixels ? `, each pixel ${fit.scale} × ${fit.scale}` : fit.scale > 1.01 ? `, enlarged ${fit.scale.toFixed(1)}×` : "";
      caption.textContent = `${shown}, ${stored[1]} × ${stored[0]}`
        + (!writable && size[0] < stored[1] && which !== "both" ? `, here ${size[0]} × ${size[1]}` : "") + scale;
    }
    if (writable && list.length > current + 1 && detail(list[current + 1])) { // the next one is ready when it is asked for
      for (const which of ["original", "edit"]) {
        if (natural(list[current + 1], which)) picture(list[current + 1], which, 1, 1, true);
      }
    }
  }

  function paintBox() {
    const place = list[current], [text, kind] = markOf(place);
    at("box-mark").textContent = text;
    at("box-mark").className = `badge ${kind}`;
    at("box-mark").hidden = !text;
    at("box-reject").disabled = !choosable(place);
    at("box-reject").setAttribute("aria-pressed", String(isRejected(place)));
    at("box-reject").textContent = isRejected(place) ? "Restore" : "Reject";
  }

  function flip() {
    if (!flipping) [flipping, flipped] = [true, true];
    else flipped = !flipped;
    showBox();
  }

  box.addEventListener("close", () => {
    flipping = false;
    document.querySelector("main").insertBefore(at("problem"), grid);
    document.body.append(at("news"));
    focusOn(current);
  });
  at("box-previous").onclick = () => move(current - 1);
  at("box-next").onclick = () => move(current + 1);
  at("box-close").onclick = () => box.close();
  at("box-reject").onclick = toggle;
  at("box-flip").onclick = () => {
    if (flipping && !flipped) flipping = false; // a third click is beside each other again
    else flip();
    showBox();
  };

  // Messages ---------------------------------------------------------------------------------------------------------

  let fading = 0;
  function news(text) {
    at("news").textContent = text;
    at("news").classList.add("shown");
    clearTimeout(fading);
    fading = setTimeout(() => at("news").classList.remove("shown"), 2500);
  }

  function problem(text) {
    at("problem").firstElementChild.textContent = text;
    at("problem").hidden = false;
  }

  // Keys and clicks --------------------------------------------------------------------------------------------------

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || at("confirm").open || at("keys").open) return;
    const target = event.target, onButton = target instanceof HTMLButtonElement;
    if (target instanceof HTMLSelectElement && (event.key === "Escape" || event.key === "Enter")) {
      focusOn(current);
      return event.preventDefault();
    }
    if (target instanceof HTMLSelectElement || target.closest?.("summary")) return;
    const inBox = box.open, onPair = target.classList?.contains("pair");
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: inBox ? -1 : -columns, ArrowDown: inBox ? 1 : columns };
    if (event.key in steps) {
      const to = current + steps[event.key];
      if (inBox) move(to);
      else if (to >= 0 && to < list.length) focusOn(grid.contains(document.activeElement) ? to : current);
    } else if (event.key === "Home" || event.key === "End") {
      const to = event.key === "Home" ? 0 : list.length - 1;
      inBox ? move(to) : focusOn(to);
    } else if (event.key === "Enter" || event.key === " ") {
      if (onButton && !onPair) return; // the button's own
      if (event.repeat) return event.preventDefault();
      if (!inBox) openBox(current);
      else if (event.key === " ") flip();
      else box.close();
    } else if (event.repeat) return;
    else if (event.key === "x" || event.key === "X") toggle();
    else if (event.key === "u" || event.key === "U") undo();
    else if (event.key === "A" && !inBox) rejectAll();
    else if ((event.key === "f" || event.key === "F") && inBox) flip();
    else if (event.key === "?" && !inBox) at("keys").showModal();
    else return;
    event.preventDefault();
  }

  function clicked(event) {
    const card = event.target.closest(".card");
    if (!card) return;
    here(Number(card.dataset.position));
    if (event.target.closest(".pair")) openBox(current);
    else if (event.target.closest(".mark")) toggle();
  }

  // The overview -----------------------------------------------------------------------------------------------------

  function overview() {
    const sum = (numbers) => numbers.flat(9).reduce((a, b) => a + b, 0);
    const total = sum(content.tally), hours = content.runs.seconds / 3600;
    const facts = [`${many(total, "edit")} of ${many(content.originals, "original")} in ${classes.length} `
      + `${classes.length === 1 ? "class" : "classes"}.`];
    if (count < total) facts.push(`${number(count)} of them are shown below.`);
    if (!content.beside) facts.push(`Originals were not found; give ${writable ? "review" : "report"} --root to show them.`);
    const byHand = sum([...rejected]);
    if (writable) facts.push(`Choices are saved at once, in ${content.decisions}.`);
    else if (byHand) facts.push(`${number(byHand)} ${byHand === 1 ? "was" : "were"} rejected by hand.`);
    at("facts").textContent = facts.join(" ");
    const occur = verdicts.map((_, v) => v).filter((v) => content.tally.some((c) => c.some((p) => p[v])));
    const table = at("tally"), head = element("tr", null, table);
    element("th", "", head);
    for (const v of occur) element("th", verdicts[v], head);
    const line = (name, counts) => {
      const made = element("tr", null, table);
      element("td", name, made);
      for (const v of occur) element("td", number(counts[v]), made, counts[v] ? "" : "zero");
    };
    const of = (rows) => verdicts.map((_, v) => rows.reduce((a, counts) => a + counts[v], 0));
    prompts.forEach((name, p) => line(name, of(content.tally.map((c) => c[p]))));
    const worst = classes.map((name, c) => [name, of(content.tally[c])]).filter(([, counts]) => sum(counts.slice(1)))
      .sort((a, b) => sum(b[1].slice(1)) - sum(a[1].slice(1))).slice(0, 10);
    for (const [name, counts] of worst) line("class " + name, counts);
    for (const [name, counts] of Object.entries(content.histograms)) {
      const figure = element("figure", null, at("histograms"), name === "accepted" ? "accepted" : "");
      const bars = element("div", null, figure, "bars"), most = Math.max(...counts);
      counts.forEach((n, bin) => {
        const bar = element("i", null, bars);
        bar.style.height = (n ? 3 + 97 * n / most : 0) + "%";
        bar.title = `${(bin / counts.length).toFixed(2)} to ${((bin + 1) / counts.length).toFixed(2)}: ${number(n)}`;
      });
      const caption = element("figcaption", name, figure);
      element("span", "0 to 1", caption);
    }
    const rows = { store: content.store, ...content.settings };
    if (content.runs.count) {
      const speed = content.runs.seconds ? `: ${(content.runs.edits / content.runs.seconds).toFixed(1)} edits/s` : "";
      rows.cost = `${hours.toFixed(2)} hours in ${many(content.runs.count, "run")} on ${content.runs.hosts.join(", ")}${speed}`;
    }
    rows["shown by"] = "dali_diffusemix " + content.version;
    for (const [name, value] of Object.entries(rows)) {
      const made = element("tr", null, at("settings"));
      element("td", name, made);
      element("td", value, made);
    }
  }

  function start() {
    document.body.classList.toggle("read-only", !writable);
    at("overview").open = !writable && innerWidth >= 700;
    readSeen();
    overview();
    options("class", [["", "all"], ...classes.map((name) => [name, name])]);
    options("prompt", [["", "all"], ...prompts.map((name) => [name, name])]);
    const occurring = verdicts.filter((_, v) => verdict.includes(v)).map((name) => [name, name]);
    const bad = occurring.some(([name]) => content.rejections.includes(name)) ? [["rejected", "rejected by quality"]] : [];
    options("verdict", [["", "all"], ...bad, ...occurring]);
    options("decision", [["", "all"], ...DECISIONS]);
    const orders = [...scores.keys()].flatMap((name) => (name === "score"
      ? [["score", "worst first, by score"], ["-score", "best first, by score"]]
      : [[name, `lowest ${name} first`], ["-" + name, `highest ${name} first`]]));
    options("sort", [["", "as stored"], ...orders]);
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    at("nothing").querySelector("button").onclick = () => { location.hash = ""; };
    at("undo").onclick = undo;
    at("reject-all").onclick = rejectAll;
    at("help").onclick = () => at("keys").showModal();
    at("problem").querySelector("button").onclick = () => { at("problem").hidden = true; };
    document.addEventListener("keydown", pressed);
    grid.addEventListener("click", clicked);
    grid.addEventListener("focusin", (event) => here(Number(event.target.closest(".card").dataset.position)));
    let drawing = false;
    addEventListener("scroll", () => {
      if (!drawing) requestAnimationFrame(() => { drawing = false; draw(); });
      drawing = true;
    }, { passive: true });
    addEventListener("resize", () => {
      draw();
      if (box.open) showBox();
    });
    addEventListener("hashchange", fromAddress);
    addEventListener("pagehide", () => {
      writeSeen();
      try {
        if (list.length) sessionStorage.setItem(PLACE, `${shard[list[current]]}/${row[list[current]]}`);
      } catch {
        // A browser that keeps nothing.
      }
    });
    addEventListener("beforeunload", (event) => { if (saving.size) event.preventDefault(); });
    history.scrollRestoration = "manual";
    fromAddress();
    let width = grid.clientWidth;
    new ResizeObserver(() => {
      if (grid.clientWidth !== width) layout(); // on a phone the height changes, too, while it scrolls
      width = grid.clientWidth;
    }).observe(grid);
    let last = null;
    try {
      last = sessionStorage.getItem(PLACE);
    } catch {
      // The same.
    }
    const position = last === null ? -1 : list.findIndex((place) => `${shard[place]}/${row[place]}` === last);
    if (position > 0) focusOn(position);
    else if (writable) focusOn(0, false);
  }

  return { start, loaded };
})();
gallery.start();
