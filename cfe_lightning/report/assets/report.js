
"use strict";
// Names and reasons come from users' files: they are only ever set as text, never parsed as HTML.
(() => {
  const PER_PAGE = 24, FAILURES_PER_PAGE = 200;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const page = read("page"), rows = read("rows");
  const done = rows.filter((row) => row.status === "ok"), failed = rows.filter((row) => row.status !== "ok");
  const pairOf = (row) => row.predicted + " → " + row.target;
  const FILTERS = {
    all: ["All", () => true],
    flipped: ["Flipped", (row) => row.flipped === true],
    kept: ["Not flipped", (row) => row.flipped === false],
    lost: ["Lost when saved", (row) => row.flipped === true && row.flipped_saved === false],
    same: ["Already the target", (row) => row.predicted === row.target],
  };
  const gain = (row) => (row.p_target_after === null ? null : row.p_target_after - row.p_target_before);
  const SORTS = {
    name: ["name", null],
    gain: ["gain of the target", gain],
    before: ["predicted, before", (row) => row.p_predicted_before],
    after: ["target, after", (row) => row.p_target_after],
    l1: ["change L1", (row) => row.l1],
  };
  const SIZES = { s: 96, m: 132, l: 224 };

  // State lives in the address, so a view can be bookmarked, reloaded and sent.
  const defaults = { filter: "all", pair: "", sort: "name", order: "up", q: "", card: 1, step: "", size: "m" };
  const state = { ...defaults };
  const steps = new Map();
  let timer = 0;

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(defaults)) state[key] = given.has(key) ? given.get(key) : defaults[key];
    state.card = Math.max(1, Math.floor(Number(state.card)) || 1);
    if (!Object.hasOwn(FILTERS, state.filter) && state.filter !== "failed") state.filter = "all";
    if (!Object.hasOwn(SORTS, state.sort)) state.sort = "name";
    if (!Object.hasOwn(SIZES, state.size)) state.size = "m";
    if (!done.length && failed.length) state.filter = "failed";
  }

  function writeAddress() {
    const shown = new URLSearchParams();
    for (const key of Object.keys(defaults)) {
      if (String(state[key]) !== String(defaults[key])) shown.set(key, state[key]);
    }
    const text = shown.toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  }

  // Small builders
  function el(tag, properties, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties || {})) {
      if (key in node && key !== "list") node[key] = value; else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  const percent = (p) => (p === null ? "–" : p > 0.9995 && p < 1 ? ">99.9%" : p > 0 && p < 0.0005 ? "<0.1%" : (100 * p).toFixed(1) + "%");
  const count = (n) => n.toLocaleString("en");
  const significant = (x) => (x === 0 ? "0" : Number(x.toPrecision(3)).toString());

  // Choosing and ordering
  const matches = (row) => !state.q || row.name.toLowerCase().includes(state.q.toLowerCase());
  function chosen() {
    const [, passes] = FILTERS[state.filter] || FILTERS.all;
    const list = done.filter((row) => passes(row) && (!state.pair || pairOf(row) === state.pair) && matches(row));
    const [, key] = SORTS[state.sort];
    const sign = state.order === "down" ? -1 : 1;
    if (key) {
      // Rows without the number stay last in either order.
      list.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
    } else if (sign < 0) list.reverse();
    return list;
  }
  let list = [];

  // One card
  const address = (row, file) => [...row.folder.split("/"), file].map(encodeURIComponent).join("/");
  const filesOf = (row) => row.files || page.files;
  function source(row, key) {
    const thumb = row.thumbs && row.thumbs[key], full = address(row, filesOf(row)[key]);
    return state.size === "l" || !thumb ? [full, thumb] : [thumb, full];
  }
  function picture(row, key, title, detail, bars) {
    const file = filesOf(row)[key];
    if (!file) return null;
    const [first, second] = source(row, key);
    const image = el("img", { alt: title + " of " + row.name, loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => {
      if (second && image.dataset.second !== "used") { image.dataset.second = "used"; image.src = second; }
    });
    image.src = first;
    const link = el("a", { href: address(row, file), target: "_blank", rel: "noopener", title: "Open " + file }, image);
    const caption = el("figcaption", {}, title);
    if (detail) caption.append(" ", el("small", {}, detail));
    if (bars) caption.append(bars);
    return el("figure", {}, link, caption);
  }
  function bar(kind, name, p) {
    const fill = el("i", {});
    fill.style.width = (100 * (p || 0)).toFixed(2) + "%";
    return el("div", { className: "bar " + kind, title: name + " " + percent(p) }, fill, el("span", {}, name), el("span", {}, percent(p)));
  }
  const bars = (row, when) => el("div", { className: "bars" },
    bar("predicted", row.predicted, row["p_predicted_" + when]),
    row.predicted === row.target ? null : bar("target", row.target, row["p_target_" + when]));

  function badge(row) {
    if (row.predicted === row.target) return el("span", { className: "badge" }, "already the target");
    if (row.flipped === null) return null;
    if (row.flipped !== row.flipped_saved) {
      return el("span", { className: "badge warn" }, row.flipped ? "lost when saved" : "flipped only when saved");
    }
    return el("span", { className: "badge " + (row.flipped ? "good" : "warn") }, row.flipped ? "✓ flipped" : "✗ not flipped");
  }

  function player(row) {
    const file = filesOf(row).steps;
    if (!file || !row.curve) return null;
    const { strength, predicted, target } = row.curve, last = strength.length - 1;
    // What the method meant the steps to be; its distance from the solid lines is the method's own error.
    const meant = [row.curve.intended_predicted, row.curve.intended_target];
    const dashed = (values, kind) => values ? [svg("polyline", { class: kind + " intended", points: points(values) })] : [];
    // Backgrounds stack: the file where it is found, else the embedded thumbnail.
    const layers = [address(row, file), row.thumbs && row.thumbs.steps].filter(Boolean);
    const frame = el("div", { className: "frame", role: "img" });
    frame.style.backgroundImage = layers.map((from) => `url("${from}")`).join(", ");
    frame.style.backgroundSize = `${100 * (last + 1)}% 100%`;
    const x = (index) => (last ? (100 * index) / last : 50);
    const points = (values) => values.map((p, index) => `${x(index)},${100 - 100 * p}`).join(" ");
    const cursor = svg("line", { class: "cursor", y1: -4, y2: 104 });
    const grid = (p, kind) => svg("line", { class: "grid " + kind, x1: 0, x2: 100, y1: 100 - 100 * p, y2: 100 - 100 * p });
    const curve = svg("svg", { class: "curve", viewBox: "0 -4 100 108", preserveAspectRatio: "none", "aria-hidden": "true" },
      grid(0, ""), grid(0.5, "half"), grid(1, ""),
      ...dashed(meant[0], "predicted"), ...(row.predicted === row.target ? [] : dashed(meant[1], "target")),
      svg("polyline", { class: "predicted", points: points(predicted) }),
      ...(row.predicted === row.target ? [] : [svg("polyline", { class: "target", points: points(target) })]), cursor);
    const ticks = [1, 0.5, 0].map((p) => {
      const tick = el("span", { "aria-hidden": "true" }, 100 * p + "%");
      tick.style.top = (100 * (104 - 100 * p)) / 108 + "%";
      return tick;
    });
    const slider = el("input", { type: "range", min: 0, max: last, step: 1 });
    slider.setAttribute("aria-label", "Step along the path of " + row.name);
    const play = el("button", { type: "button", title: "Play (space)" }, "▶");
    play.setAttribute("aria-label", "Play the path");
    const readout = el("div", { className: "readout" });
    const asMeant = (values, index) => values ? [el("small", { title: "dashed: what the method intended" }, ` (meant ${percent(values[index])})`)] : [];
    function show(index) {
      index = Math.min(last, Math.max(0, index));
      steps.set(row.name, index);
      slider.value = index;
      const p = [percent(predicted[index]), percent(target[index])];
      slider.setAttribute("aria-valuetext", `strength ${significant(strength[index])}, ${row.predicted} ${p[0]}, ${row.target} ${p[1]}`);
      frame.setAttribute("aria-label", `Step ${index + 1} of ${last + 1} of ${row.name}`);
      frame.style.backgroundPosition = `${last ? (100 * index) / last : 0}% 0`;
      cursor.setAttribute("x1", x(index));
      cursor.setAttribute("x2", x(index));
      readout.replaceChildren(
        el("span", { className: "line" }, `step ${index + 1} of ${last + 1}, strength `, el("b", {}, significant(strength[index])),
          ...Object.entries(row.curve.scores || {}).map(([name, values]) => el("small", {}, ` · ${name.replaceAll("_", " ")} ${significant(values[index])}`))),
        el("span", { className: "key-predicted" }, row.predicted + " ", el("b", {}, p[0]), ...asMeant(meant[0], index)),
        ...(row.predicted === row.target ? [] : [el("span", { className: "key-target" }, row.target + " ", el("b", {}, p[1]), ...asMeant(meant[1], index))]));
    }
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    const follow = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = curve.getBoundingClientRect();
      stop();
      show(Math.round(((event.clientX - box.left) / box.width) * last));
    };
    curve.addEventListener("pointerdown", (event) => { curve.setPointerCapture(event.pointerId); follow(event); });
    curve.addEventListener("pointermove", follow);
    const node = el("div", { className: "path" },
      el("figure", {}, frame, el("figcaption", {}, "Path ", el("small", {}, `${last + 1} steps`))),
      el("div", { className: "path-side" }, el("div", { className: "plot" }, ...ticks, curve), el("div", { className: "controls" }, play, slider), readout));
    node.player = { show, last, play };
    play.addEventListener("click", () => toggle(node.player, row));
    show(steps.has(row.name) ? steps.get(row.name) : last);
    return node;
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    document.querySelectorAll(".controls button").forEach((button) => { button.textContent = "▶"; });
  }
  function toggle(control, row) {
    const running = timer;
    stop();
    if (running) return;
    if (steps.get(row.name) === control.last) control.show(0);
    control.play.textContent = "❚❚";
    timer = setInterval(() => {
      control.show(steps.get(row.name) + 1);
      if (steps.get(row.name) === control.last) stop();
    }, Math.max(60, 1400 / (control.last + 1)));
  }

  function card(row, number) {
    const cut = row.name.lastIndexOf("/") + 1, id = "card-" + number;
    const heading = el("h2", { className: "name", id: id + "-name" },
      el("span", { className: "folder" }, row.name.slice(0, cut)), row.name.slice(cut));
    const measures = [row.l1 === null ? null : "L1 " + significant(row.l1)];
    for (const [name, value] of Object.entries(row.scores || {})) measures.push(name.replaceAll("_", " ") + " " + significant(value));
    const pair = el("span", { className: "pair" }, el("span", { className: "key-predicted" }, row.predicted),
      ...(row.predicted === row.target ? [] : [" → ", el("span", { className: "key-target" }, row.target)]));
    const pictures = el("div", { className: "pictures" },
      picture(row, "image", "Before", "", bars(row, "before")),
      row.p_target_after === null ? null : picture(row, "counterfactual", "After", "", bars(row, "after")),
      picture(row, "difference", "Change", row.difference_scale === null ? "" : "±" + significant(row.difference_scale)),
      picture(row, "attribution", "Attribution", ""));
    for (const key of Object.keys(filesOf(row))) {
      if (!key.startsWith("part_")) continue;
      const name = key.slice(5), times = (row.gains || {})[name];
      const title = name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
      pictures.append(picture(row, key, title, times === undefined ? "" : "×" + significant(times)));
    }
    if (row.motion_scale !== undefined && row.motion_scale !== null) pictures.append(picture(row, "motion", "Motion", significant(row.motion_scale) + " px"));
    const path = player(row);
    if (path) path.classList.toggle("tall", pictures.childElementCount > 4);
    const body = el("div", { className: "card-body" }, pictures, path);
    const sentence = row.sentence ? el("p", { className: "sentence" }, row.sentence) : null;
    const node = el("article", { className: "card", id, tabIndex: -1 },
      el("div", { className: "card-head" }, heading, pair, badge(row), row.note ? el("span", { className: "caveat" }, row.note) : null, el("span", { className: "measures" }, measures.filter(Boolean).join(" · "))), ...(sentence ? [sentence] : []), body);
    node.setAttribute("aria-labelledby", id + "-name");
    node.addEventListener("focusin", () => activate(number, false));
    node.addEventListener("pointerdown", () => activate(number, false));
    node.player = path && path.player;
    node.row = row;
    return node;
  }

  // The page
  const main = document.getElementById("main");
  const shownPage = () => Math.floor((state.card - 1) / (state.filter === "failed" ? FAILURES_PER_PAGE : PER_PAGE));
  function pager(total, size) {
    const pages = Math.ceil(total / size), current = shownPage();
    if (pages < 2) return null;
    const go = (to) => { state.card = to * size + 1; render(); window.scrollTo(0, main.offsetTop - 70); };
    const first = current * size + 1, end = Math.min(total, first + size - 1);
    return el("div", { className: "pager" },
      el("button", { type: "button", disabled: current === 0, onclick: () => go(current - 1) }, "‹ Previous"),
      el("span", {}, `${count(first)} to ${count(end)} of ${count(total)}`),
      el("button", { type: "button", disabled: current >= pages - 1, onclick: () => go(current + 1) }, "Next ›"));
  }
  function render() {
    stop();
    document.documentElement.style.setProperty("--base", SIZES[state.size] + "px");
    main.classList.toggle("pixelated", page.size <= 64);
    if (state.filter === "failed") renderFailures(); else renderCards();
    updateToolbar();
    writeAddress();
  }
  function renderCards() {
    list = chosen();
    state.card = Math.min(state.card, Math.max(1, list.length));
    const first = shownPage() * PER_PAGE;
    const cards = list.slice(first, first + PER_PAGE).map((row, index) => card(row, first + index + 1));
    const nothing = el("p", { className: "empty" }, done.length ? "No image fits these filters." : "No image was explained.");
    main.replaceChildren(...(cards.length ? cards : [nothing]), pager(list.length, PER_PAGE) || "");
    activate(state.card, false);
  }
  function renderFailures() {
    const found = failed.filter(matches), first = shownPage() * FAILURES_PER_PAGE;
    const body = el("tbody", {}, ...found.slice(first, first + FAILURES_PER_PAGE).map((row) =>
      el("tr", {}, el("td", { className: "name" }, row.name), el("td", {}, row.error))));
    const table = el("table", { className: "failures" },
      el("thead", {}, el("tr", {}, el("th", {}, "File"), el("th", {}, "Why it was not explained"))), body);
    main.replaceChildren(found.length ? table : el("p", { className: "empty" }, "No failures fit this search."),
      pager(found.length, FAILURES_PER_PAGE) || "");
  }
  function activate(number, scroll) {
    state.card = number;
    document.querySelectorAll(".card.active").forEach((node) => node.classList.remove("active"));
    const node = document.getElementById("card-" + number);
    if (node) {
      node.classList.add("active");
      if (scroll) { node.focus({ preventScroll: true }); node.scrollIntoView({ block: "nearest" }); }
    }
    writeAddress();
  }
  function move(by) {
    const to = Math.min(list.length, Math.max(1, state.card + by)), turn = Math.floor((to - 1) / PER_PAGE) !== shownPage();
    state.card = to;
    if (turn) render();
    activate(to, true);
  }

  // Toolbar
  const bar_ = document.getElementById("toolbar");
  let updateToolbar = () => {};
  function buildToolbar() {
    const set = (key, value) => { state[key] = value; state.card = 1; render(); };
    const segments = el("div", { className: "segments", role: "group" });
    segments.setAttribute("aria-label", "Outcome");
    const number = Object.fromEntries(Object.entries(FILTERS).map(([key, [, passes]]) => [key, done.filter(passes).length]));
    const buttons = {};
    for (const [key, [title]] of Object.entries(FILTERS)) {
      if ((key === "lost" || key === "same") && !number[key]) continue;
      buttons[key] = el("button", { type: "button", onclick: () => set("filter", key) }, title, el("span", { className: "count" }, count(number[key])));
    }
    segments.append(...Object.values(buttons));
    const failures = el("button", { type: "button", onclick: () => set("filter", "failed") }, "Failures", el("span", { className: "count" }, count(failed.length)));
    const failureTab = el("div", { className: "segments" }, failures);
    const pairs = [...new Set(done.map(pairOf))].sort();
    const pair = el("select", { onchange: () => set("pair", pair.value) }, el("option", { value: "" }, "All class pairs"),
      ...pairs.map((name) => el("option", { value: name }, name)));
    const sort = el("select", { onchange: () => set("sort", sort.value) },
      ...Object.entries(SORTS).map(([key, [title]]) => el("option", { value: key }, "Sort: " + title)));
    pair.setAttribute("aria-label", "Pair of classes, predicted → target");
    sort.setAttribute("aria-label", "Order of the cards");
    const order = el("button", { type: "button", onclick: () => set("order", state.order === "up" ? "down" : "up") });
    const search = el("input", { type: "search", placeholder: "Search names", id: "search", oninput: () => set("q", search.value) });
    search.setAttribute("aria-label", "Search names");
    const size = el("div", { className: "segments", role: "group" });
    size.setAttribute("aria-label", "Size of the pictures");
    const sizes = {};
    for (const key of Object.keys(SIZES)) {
      sizes[key] = el("button", { type: "button", title: SIZES[key] + " pixels", onclick: () => { state.size = key; render(); } }, key.toUpperCase());
    }
    size.append(...Object.values(sizes));
    const onlyCards = [pair, el("span", { className: "field" }, sort, order), size];
    bar_.replaceChildren(segments, failureTab, el("span", { className: "spring" }), search, ...onlyCards);
    updateToolbar = () => {
      for (const [key, node] of Object.entries(buttons)) node.setAttribute("aria-pressed", state.filter === key);
      for (const [key, node] of Object.entries(sizes)) node.setAttribute("aria-pressed", state.size === key);
      failures.setAttribute("aria-pressed", state.filter === "failed");
      pair.value = state.pair;
      sort.value = state.sort;
      order.textContent = state.order === "up" ? "↑" : "↓";
      order.setAttribute("aria-label", state.order === "up" ? "Ascending" : "Descending");
      if (document.activeElement !== search) search.value = state.q;
      for (const node of onlyCards) node.classList.toggle("hidden", state.filter === "failed");
    };
  }

  // The table of class pairs
  function buildPairs() {
    const groups = new Map();
    for (const row of done) {
      if (row.flipped === null) continue;
      if (!groups.has(pairOf(row))) groups.set(pairOf(row), []);
      groups.get(pairOf(row)).push(row);
    }
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const lines = [...groups].map(([name, members]) => ({
      name, n: members.length, flips: mean(members.map((row) => Number(row.flipped))), gain: mean(members.map(gain)), l1: mean(members.map((row) => row.l1)),
    })).sort((a, b) => b.n - a.n);
    const cell = (text) => el("td", { className: "number" }, text);
    const head = (text) => el("th", { className: "number" }, text);
    const choose = (name) => { Object.assign(state, { pair: name, filter: "all", card: 1 }); render(); };
    document.getElementById("pairs").append(lines.length ? el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, "Predicted → target"), head("Images"), head("Flip rate"), head("Gain of the target"), head("Change L1"))),
      el("tbody", {}, ...lines.map((line) => el("tr", {},
        el("td", {}, el("button", { type: "button", className: "link", onclick: () => choose(line.name) }, line.name)),
        cell(count(line.n)), cell(percent(line.flips)), cell((line.gain >= 0 ? "+" : "−") + Math.abs(line.gain).toFixed(3)), cell(significant(line.l1)))))) : "No image has a class to flip to.");
  }

  // Keyboard
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const tag = event.target.tagName, typing = tag === "SELECT" || (tag === "INPUT" && event.target.type === "search");
    if (typing) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); return; }
    // The atlas' own buttons answer to these keys.
    if (tag === "INPUT" && event.target.closest(".atlas") && (event.key === " " || event.key.startsWith("Arrow"))) return;
    if (state.filter === "failed") return;
    const node = document.getElementById("card-" + state.card), control = node && node.player;
    const onControl = tag === "BUTTON" || tag === "SUMMARY" || tag === "A";
    const actions = {
      j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
      n: () => move(PER_PAGE), p: () => move(-PER_PAGE),
      ArrowRight: () => { if (control) { stop(); control.show(steps.get(node.row.name) + 1); } },
      ArrowLeft: () => { if (control) { stop(); control.show(steps.get(node.row.name) - 1); } },
      " ": () => { if (control) toggle(control, node.row); },
    };
    if (!Object.hasOwn(actions, event.key) || (event.key === " " && onControl)) return;
    event.preventDefault();
    actions[event.key]();
  });

  // Links to cards count all of them, in the manifest's order.
  for (const link of document.querySelectorAll("a.to-card")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      const number = Number(new URLSearchParams(link.hash.slice(1)).get("card"));
      Object.assign(state, defaults, { card: number, size: state.size });
      render();
      activate(number, true);
    });
  }

  window.addEventListener("hashchange", () => { readAddress(); render(); });
  readAddress();
  const [startCard, startStep] = [state.card, state.step];
  state.step = "";
  buildToolbar();
  buildPairs();
  render();
  if (location.hash || startCard > 1) activate(state.card, startCard > 1);
  if (startStep !== "") {
    const node = document.getElementById("card-" + state.card);
    if (node && node.player) node.player.show(Number(startStep) || 0);
  }
  document.documentElement.dataset.ready = "true";
})();
