"use strict";
// Texts of records reach the page through text nodes and attribute values only; nothing is parsed as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = ["acc", "asr", "ra"];
const ROWS = 250, PANELS = 6, SIDE = 60, CURVES = window.innerWidth < 640 ? 4 : 12; // drawn at once
const SVG = new Set(["svg", "path", "line", "circle", "text", "g"]);
const byId = (id) => document.getElementById(id);
const chosen = { dataset: "", model: "", recipe: "", attack: "", defense: "" };
const state = { sort: null, descending: false, heat: "asr", curve: "loss", rows: ROWS, curves: CURVES, open: new Set(), tipped: null };
const tips = new WeakMap();

DATA.cells.forEach((cell, order) => {
  const table = DATA.tables[cell.table];
  Object.assign(cell, { order, dataset: table.dataset, model: table.model, recipe: `${table.recipe}, ${table.precision}` });
});
const cellAt = new Map(DATA.cells.map((cell) => [`${cell.table}\n${cell.attack}\n${cell.defense}`, cell]));
const manyRecipes = new Set(DATA.cells.map((cell) => cell.recipe)).size > 1;
const defenses = [...new Set(DATA.cells.filter((cell) => !cell.victim).map((cell) => cell.names[1]))].sort();

function el(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const soft = (text) => el("p", { class: "soft" }, text);
const percent = (value, digits = 1) => (value === null ? "–" : (100 * value).toFixed(digits));
const signed = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(1));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const showMore = (step, left) => (left > step ? `Show ${step} more of ${left}` : `Show ${left} more`);
const seconds = (value) => (value === null ? "–" : value < 10 ? value.toFixed(1) : String(Math.round(value)));
const label = (cell, which) => (which === "attack" ? cell.attack + cell.marks[0] : cell.defense + cell.marks[1]);
const nameOf = (cell) => `${label(cell, "defense")} on ${label(cell, "attack")}`;
const measured = (cell, name) => cell.runs.filter((run) => run[name] !== null).length;
const spreadText = (cell, name) => (cell[name][1] === null ? "" : ` ± ${percent(cell[name][1])} (${measured(cell, name)})`);
const shownText = (cell, name) => percent(cell[name][0]) + spreadText(cell, name);
const difference = (cell, name) => (cell.published?.[name] == null || cell[name][0] === null ? null : cell[name][0] - cell.published[name]);
const DOUBT = { yes: "", care: "(?)", no: "(!)" };

/* ---------- tooltips: by pointer, by focus, by tap ---------- */

function tipped(node, lines) {
  tips.set(node, lines);
  node.dataset.tip = "";
  return node;
}

function seedLines(cell, name) {
  const show = name === "seconds" ? seconds : percent;
  const head = name === "seconds" ? `seconds ${seconds(cell.seconds[0])}` : `${name.toUpperCase()} ${shownText(cell, name)}`;
  return [head, ...cell.runs.map((run) => `${show(run[name])}  (${run.seeds})`)];
}

function seedTable(cell) {
  return [`${nameOf(cell)}: ACC / ASR / RA`,
    ...cell.runs.map((run) => `${METRICS.map((name) => percent(run[name])).join(" / ")}  (${run.seeds})`)];
}

function showTip(node) {
  const lines = tips.get(node)();
  const shown = lines.length > 13 ? [...lines.slice(0, 12), `and ${lines.length - 12} more`] : lines;
  byId("tip").replaceChildren(...shown.map((line) => el("div", {}, line)));
  byId("tip").hidden = false;
  state.tipped = node;
  placeTip();
}

function hideTip() {
  byId("tip").hidden = true;
  state.tipped = null;
}

function placeTip() {
  if (!state.tipped?.isConnected) return hideTip();
  const tip = byId("tip"), box = state.tipped.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
  const top = box.top > own.height + 12 ? box.top - own.height - 8 : Math.min(box.bottom + 8, window.innerHeight - own.height - 4);
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

function startTips() {
  const over = (event) => {
    const node = event.target.closest?.("[data-tip]"), button = node?.matches("button");
    const asked = event.type === "focusin" ? node?.matches(":focus-visible") : !button; // a button shows its seeds to the keyboard only
    if (!node || !asked) hideTip();
    else if (node !== state.tipped) showTip(node);
  };
  for (const kind of ["pointermove", "focusin", "click"]) // pointerover comes by itself when the page scrolls below a resting mouse
    document.addEventListener(kind, over);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", placeTip, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}

// One stop of the Tab key for a whole chart; the arrow keys go on inside it.
function roving(box, nodes, columns = 1) {
  nodes.forEach((node, place) => node.setAttribute("tabindex", place ? "-1" : "0"));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const next = step && nodes[nodes.indexOf(event.target) + step];
    if (!next || !nodes.includes(event.target)) return;
    event.preventDefault();
    event.target.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}

/* ---------- what is chosen ---------- */

function startFilters() {
  const titles = { dataset: "Data set", model: "Model", recipe: "Recipe", attack: "Attack", defense: "Defense" };
  const value = { attack: (cell) => cell.names[0], defense: (cell) => cell.names[1] };
  for (const [name, title] of Object.entries(titles)) {
    if (name === "recipe" && !manyRecipes) continue;
    const values = [...new Set(DATA.cells.map(value[name] ?? ((cell) => cell[name])))].sort();
    const select = el("select", { id: `filter-${name}` }, el("option", { value: "" }, "all"), ...values.map((each) => el("option", { value: each }, each)));
    select.addEventListener("change", () => { chosen[name] = select.value; Object.assign(state, { rows: ROWS, curves: CURVES }); draw(); });
    byId("filters").append(el("label", { for: `filter-${name}` }, title, select));
  }
  const reset = el("button", { type: "button", id: "reset" }, "Reset");
  reset.addEventListener("click", () => {
    for (const name of Object.keys(chosen)) {
      chosen[name] = "";
      if (byId(`filter-${name}`)) byId(`filter-${name}`).value = "";
    }
    draw();
  });
  byId("filters").append(reset);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

function wanted(facts, names = Object.keys(chosen)) {
  return names.every((name) => !chosen[name] || facts[name] === undefined || facts[name] === chosen[name]);
}

const facts = (cell) => ({ dataset: cell.dataset, model: cell.model, recipe: cell.recipe, attack: cell.names[0], defense: cell.names[1] });
const visible = () => DATA.cells.filter((cell) => wanted(facts(cell)));

/* ---------- leaderboard ---------- */

function columns() {
  const text = (id, title, show) => ({ id, title, text: show, value: show });
  const metric = (id) => ({ id, title: id.toUpperCase(), number: true, metric: true, text: (cell) => shownText(cell, id), value: (cell) => cell[id][0] });
  const published = (id) => ({
    id: `${id}-published`, title: `${id.toUpperCase()} publ.`, number: true, published: id, value: (cell) => cell.published?.[id] ?? null,
    text: (cell) => (cell.published?.[id] == null ? "–" : `${percent(cell.published[id])}${DOUBT[cell.published.usable]} (${signed(difference(cell, id))})`),
  });
  const more = ({ id, title, about, factor }) => ({
    id, title, about, number: true, value: (cell) => cell[id][0],
    text: (cell) => (cell[id][0] === null ? "–" : factor ? cell[id][0].toFixed(1) : shownText(cell, id)),
  });
  return [
    { ...text("dataset", "Data set", (cell) => cell.dataset), elsewhere: true },
    { ...text("model", "Model", (cell) => cell.model), elsewhere: true },
    ...(manyRecipes ? [{ ...text("recipe", "Recipe", (cell) => cell.recipe), elsewhere: true, name: true }] : []),
    { ...text("attack", "Attack", (cell) => label(cell, "attack")), name: true },
    { ...text("defense", "Defense", (cell) => label(cell, "defense")), name: true },
    ...METRICS.map(metric), ...(DATA.cells.some((cell) => cell.published) ? METRICS.map(published) : []),
    ...DATA.more.map(more),
    { id: "seconds", title: "Seconds", number: true, text: (cell) => seconds(cell.seconds[0]), value: (cell) => cell.seconds[0] },
    { id: "n", title: "n", number: true, text: (cell) => cell.runs.length + (cell.lacks ? ` of ${cell.lacks[1]}` : ""), value: (cell) => cell.runs.length },
  ];
}

function sorted(cells) {
  const column = columns().find((each) => each.id === state.sort);
  const way = state.descending ? -1 : 1;
  const compare = (a, b) => {
    const [one, other] = [column.value(a), column.value(b)];
    if (one === null || other === null) return (one === null) - (other === null);
    return way * (column.number ? one - other : one.localeCompare(other, "en", { numeric: true })) || a.order - b.order;
  };
  // numbers that were chosen with test data never stand among the others
  return column ? [...cells].sort((a, b) => a.oracle - b.oracle || compare(a, b)) : [...cells].sort((a, b) => a.oracle - b.oracle);
}

function drawBoard() {
  const shown = columns(), cells = sorted(visible());
  const head = el("tr", {}, ...shown.map((column) => {
    const button = el("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      const again = state.sort === column.id;
      state.descending = again ? !state.descending : false;
      state.sort = column.id;
      drawBoard();
      byId("board").querySelector(`[data-column="${column.id}"] button`).focus();
    });
    const way = state.sort === column.id ? (state.descending ? "descending" : "ascending") : "none";
    return el("th", { scope: "col", "data-column": column.id, "aria-sort": way, class: classes(column), title: column.about }, button);
  }));
  const bodies = [], drawn = cells.slice(0, state.rows);
  for (const apart of [false, true]) {
    const rows = drawn.filter((cell) => cell.oracle === apart);
    if (!rows.length) continue;
    const divider = el("tr", { class: "divider" }, el("th", { colspan: shown.length, scope: "rowgroup" }, `‡ ${DATA.footnotes["‡"]}`));
    bodies.push(el("tbody", {}, ...(apart ? [divider] : []), ...rows.flatMap((cell) => boardRow(cell, shown))));
  }
  if (!cells.length) bodies.push(el("tbody", {}, el("tr", {}, el("td", { colspan: shown.length, class: "soft" }, "No run is of this choice; Reset shows all."))));
  byId("board").replaceChildren(el("thead", {}, head), ...bodies);
  byId("board").classList.toggle("wide", shown.length > 10);
  byId("more-rows").hidden = cells.length <= state.rows;
  byId("more-rows").textContent = showMore(ROWS, cells.length - state.rows);
  byId("notes").replaceChildren(...footnotes(cells).map((note) => el("p", {}, note)));
}

const classes = (column) => [column.id, ...["number", "name", "elsewhere", "metric"].filter((kind) => column[kind])].join(" ");

function boardRow(cell, shown) {
  const row = el("tr", { class: `cell${cell.oracle ? " oracle" : ""}${cell.weak ? " weak-row" : ""}` });
  const open = state.open.has(cell.order);
  for (const column of shown) {
    const node = el("td", { class: classes(column) });
    if (column.metric) {
      node.append(percent(cell[column.id][0]), el("span", { class: "spread" }, spreadText(cell, column.id)));
      node.style.setProperty("--part", `${percent(cell[column.id][0] ?? 0)}%`);
    } else node.append(column.text(cell));
    if (column.metric || column.id === "seconds") tipped(node, () => seedLines(cell, column.id));
    if (column.published && cell.published) {
      tipped(node, () => publishedLines(cell));
      if (cell.published.usable !== "yes") node.classList.add("doubtful");
    }
    if (column.id === "n" && cell.lacks) {
      node.classList.add("few");
      tipped(node, () => [`${plural(cell.runs.length, "run")}, on ${cell.lacks[0]} of ${plural(cell.lacks[1], "victim")}`]);
    }
    if (column.id === "recipe") { // long ones are cut
      node.replaceChildren(el("div", {}, column.text(cell)));
      tipped(node, () => [column.text(cell)]);
    }
    if (column.id === "attack") {
      const button = el("button", { type: "button", class: "open", "aria-expanded": String(open), "aria-label": `Runs of ${nameOf(cell)}` }, open ? "▾" : "▸");
      const name = el("div", {}, label(cell, "attack"), el("small", { class: "where" }, `${cell.dataset}, ${cell.model}`));
      node.replaceChildren(el("div", {}, tipped(button, () => seedTable(cell)), name));
    }
    row.append(node);
  }
  row.addEventListener("click", (event) => {
    const touched = event.pointerType === "touch" && event.target.closest("td[data-tip]"); // there a tap shows the seeds
    if (!touched && !String(window.getSelection())) toggle(cell, row, shown.length);
  });
  return open ? [row, detailsRow(cell, shown.length)] : [row];
}

function toggle(cell, row, width) {
  const open = !state.open.has(cell.order), button = row.querySelector(".open");
  if (open) {
    state.open.add(cell.order);
    row.after(detailsRow(cell, width));
  } else {
    state.open.delete(cell.order);
    row.nextSibling.remove();
  }
  button.setAttribute("aria-expanded", String(open));
  button.textContent = open ? "▾" : "▸";
}

const publishedLines = (cell) => [
  `published: ${METRICS.map((name) => percent(cell.published[name])).join(" / ")}`,
  cell.published.source,
  { yes: "no fault known", care: "read with care", no: "do not compare" }[cell.published.usable] + (cell.published.note && `: ${cell.published.note}`),
  "one seed; its recipe may differ",
];

function detailsRow(cell, width) {
  const box = el("div", {}, el("h3", {}, nameOf(cell)),
    el("p", { class: "soft" }, `${cell.dataset}, ${cell.model}; recipe ${cell.recipe}`),
    cell.published && el("p", { class: "soft" }, publishedLines(cell).join("; ")));
  if (cell.runs.some((run) => run.curve)) {
    const kinds = ["loss", ...(cell.runs.some((run) => run.curve?.measured.length) ? ["measured"] : [])];
    box.append(el("div", { class: "panels small" }, ...kinds.map((kind) => curveChart(cell, kind, el("span", { class: "key" }, ...curveKey(kind))))));
  }
  box.append(el("div", { class: "runs" }, ...cell.runs.map((run) => {
    const copy = run.command && el("button", { type: "button" }, "Copy");
    copy?.addEventListener("click", () => copyText(run.command, copy));
    const command = copy ? [el("code", {}, run.command), copy] : [soft("No command: there is no script of this name.")];
    const list = Object.entries({ folder: run.path, ...run.facts, seconds: seconds(run.seconds) });
    const head = METRICS.map((name) => `${name.toUpperCase()} ${percent(run[name])}`).join("  ");
    return el("article", {}, el("div", {}, `${head}  `, el("span", { class: "soft" }, `seeds: ${run.seeds}`)),
      el("div", { class: "command" }, ...command),
      el("dl", {}, ...list.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      ...DATA.added.filter((image) => image.path === run.path).map(figure));
  })));
  return el("tr", { class: "details" }, el("td", { class: "details", colspan: width }, box));
}

function footnotes(cells) {
  const marks = cells.map((cell) => cell.marks.join("")).join("");
  const notes = Object.entries(DATA.footnotes).filter(([mark]) => marks.includes(mark)).map(([mark, text]) => `${mark} ${text}`);
  for (const { id, title, about } of DATA.more) if (cells.some((cell) => cell[id][0] !== null)) notes.push(`${title}: ${about}`);
  const found = cells.map((cell) => cell.published).filter(Boolean);
  for (const source of new Set(found.map((figure) => figure.source)))
    notes.push(`publ. (and what ours has more): ${source}; one seed, and the recipe may differ: point at a number for what is known of it`);
  const doubts = new Set(found.map((figure) => DOUBT[figure.usable]));
  for (const [mark, text] of Object.entries(DATA.published ?? {})) if (doubts.has(mark)) notes.push(`${mark} ${text}`);
  return notes;
}

/* ---------- copying ---------- */

function asMarkdown(shown, cells) {
  const escape = (text) => text.replace(/[\\`*|<]/g, "\\$&").replace(/!\[/g, "\\!\\[").replace(/\](?=[([:])/g, "\\]\\");
  const lines = [shown.map((column) => column.title), shown.map((column) => (column.number ? "---:" : "---")),
    ...cells.map((cell) => shown.map((column) => escape(column.text(cell))))];
  return [lines.map((line) => `| ${line.join(" | ")} |`).join("\n"), ...footnotes(cells).map(escape)].join("\n\n") + "\n";
}

function asLatex(shown, cells) {
  const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "±": "$\\pm$",
    "–": "--", "−": "$-$", "§": "$^\\S$", "†": "$^\\dagger$", "‡": "$^\\ddagger$" };
  const escape = (text) => text.replace(/[\\~^<>±–−§†‡&%$#_{}]/g, (sign) => signs[sign] ?? `\\${sign}`);
  const line = (words) => `${words.map(escape).join(" & ").replace(/^[[*]/, "{}$&")} \\\\`; // else an option of the line before
  return ["\\begin{table}", "\\centering", `\\begin{tabular}{${shown.map((column) => (column.number ? "r" : "l")).join("")}}`, "\\toprule",
    line(shown.map((column) => column.title)), "\\midrule", ...cells.map((cell) => line(shown.map((column) => column.text(cell)))), "\\bottomrule",
    "\\end{tabular}", ...footnotes(cells).map((note) => `\\par\\footnotesize ${escape(note)}`), "\\end{table}"].join("\n") + "\n";
}

async function copyText(text, button) {
  const old = button.dataset.label ?? button.textContent;
  button.dataset.label = old;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    byId("copy").value = text; // where the browser keeps the clipboard to itself
    byId("copy").hidden = false;
    byId("copy").select();
    button.textContent = "Marked: copy it";
  }
  byId("copied").textContent = button.textContent;
  setTimeout(() => { button.textContent = old; byId("copied").textContent = ""; }, 1500);
}

function startCopying() {
  for (const button of document.querySelectorAll("[data-copy]"))
    button.addEventListener("click", () => copyText({ latex: asLatex, markdown: asMarkdown }[button.dataset.copy](columns(), sorted(visible())), button));
}

/* ---------- heat maps ---------- */

function switcher(box, titles, key, redraw) {
  for (const [value, title] of Object.entries(titles)) {
    const button = el("button", { type: "button", "data-value": value, "aria-pressed": String(state[key] === value) }, title);
    button.addEventListener("click", () => {
      state[key] = value;
      for (const each of box.children) each.setAttribute("aria-pressed", String(each === button));
      redraw();
    });
    box.append(button);
  }
}

function groups(cells) {
  const found = new Map();
  for (const cell of cells) found.set(cell.table, [...(found.get(cell.table) ?? []), cell]);
  return [...found];
}

function titleOf(number) {
  const table = DATA.tables[number];
  return `${table.dataset}, ${table.model}` + (manyRecipes ? `, ${table.recipe}, ${table.precision}` : "");
}

function further(count, what) {
  return count > 0 ? [el("p", { class: "hint" }, `${plural(count, `more ${what}`)}: choose a data set or a model above.`)] : [];
}

function floorOf(cells) {
  const low = Math.min(1, ...cells.flatMap((cell) => [cell.acc[0], cell.before?.acc ?? null]).filter((value) => value !== null));
  return Math.max(0, Math.floor(low * 10 - 1e-9) / 10);
}

function drawHeat() {
  const all = groups(visible()), cells = all.slice(0, PANELS).flatMap(([, some]) => some);
  const low = state.heat === "acc" ? Math.min(floorOf(cells), 0.9) : 0;
  const ends = state.heat === "asr" ? ["100", "0"] : [percent(low, 0), "100"];
  byId("heat-scale").replaceChildren(`${state.heat.toUpperCase()} ${ends[0]}`, el("i", { "aria-hidden": "true" }), `${ends[1]} %, the better end`);
  byId("heat-maps").replaceChildren(...all.slice(0, PANELS).map(([number, some]) => heatMap(number, some, low)), ...further(all.length - PANELS, "table"));
}

function heatMap(number, cells, low) {
  const table = DATA.tables[number];
  const firsts = { attack: new Map(), defense: new Map() };
  for (const key of ["attack", "defense"]) for (const cell of [...cells].reverse()) firsts[key].set(cell[key], cell);
  const oracle = (name) => firsts.defense.get(name).oracle;
  const attacks = table.attacks.filter((name) => firsts.attack.has(name)), rows = table.defenses.filter((name) => firsts.defense.has(name));
  const cut = attacks.splice(SIDE).length + rows.sort((a, b) => oracle(a) - oracle(b)).splice(SIDE).length;
  const nodes = [];
  const body = rows.map((defense, place) => el("tr", { class: oracle(defense) && place && !oracle(rows[place - 1]) ? "apart" : "" },
    el("th", { scope: "row" }, label(firsts.defense.get(defense), "defense")),
    ...attacks.map((attack) => {
      const cell = cellAt.get(`${number}\n${attack}\n${defense}`);
      nodes.push(cell ? heatCell(cell, low) : tipped(el("td", { class: "empty" }, "–"), () => [`${defense} on ${attack}`, "no run"]));
      return nodes.at(-1);
    })));
  const head = el("tr", {}, el("td", { class: "soft" }), ...attacks.map((attack) => el("th", { scope: "col" }, label(firsts.attack.get(attack), "attack"))));
  head.firstChild.style.background = "none";
  const grid = el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
  roving(grid, nodes, attacks.length);
  return el("div", { class: "map" }, el("h3", {}, titleOf(number)), el("div", { class: "scroll" }, grid),
    cut ? el("p", { class: "hint" }, `${cut} more rows and columns: choose an attack or a defense above.`) : null);
}

function heatCell(cell, low) {
  const value = cell[state.heat][0];
  const node = tipped(el("td", {}, percent(value)), () => [nameOf(cell), ...seedLines(cell, state.heat)]);
  if (value === null) node.className = "empty";
  else if (cell.oracle) node.className = "oracle";
  else {
    const good = state.heat === "asr" ? 1 - value : (value - low) / (1 - low);
    node.className = `${good < 0.5 ? "low" : ""}${cell.weak ? " weak" : ""}`;
    node.style.setProperty("--high", `${Math.round(200 * Math.abs(good - 0.5))}%`);
  }
  return node;
}

/* ---------- ACC against ASR ---------- */

// A node in the colour of a method, which utils/report/palette.py decides for the light and the dark page.
function coloured(node, defense) {
  const [light, dark] = DATA.colours[DATA.looks[defense][0]];
  node.style.setProperty("--light", light);
  node.style.setProperty("--dark", dark);
  node.classList.add("look");
  return node;
}

const markerOf = (defense) => DATA.markers[DATA.looks[defense][1]];

function drawTrade() {
  const cells = visible().filter((cell) => cell.acc[0] !== null && cell.asr[0] !== null);
  const all = groups(cells.filter((cell) => !cell.victim));
  const shown = all.slice(0, PANELS), used = defenses.filter((name) => shown.some(([, some]) => some.some((cell) => cell.names[1] === name)));
  byId("trade-charts").replaceChildren(...shown.map(([number, some]) => tradeChart(number, some)), ...further(all.length - PANELS, "chart"));
  if (!all.length) byId("trade-charts").append(soft("No defense with an ASR is among these runs."));
  byId("trade-key").replaceChildren(...used.map((name) => {
    const mark = coloured(el("path", { d: markerOf(name) }), name);
    const item = el("span", {}, el("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, mark), name);
    item.addEventListener("pointerenter", () => dim((node) => node.dataset.defense !== name));
    item.addEventListener("pointerleave", () => dim(() => false));
    return item;
  }));
}

function dim(hidden) {
  for (const node of byId("trade-charts").querySelectorAll("g[data-defense]")) node.classList.toggle("dim", hidden(node));
}

const point = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;

function tradeChart(number, cells) {
  const width = 420, height = 300, left = 38, right = width - 12, top = 20, bottom = height - 34, low = Math.min(floorOf(cells), 0.9);
  const x = (asr) => left + asr * (right - left), y = (acc) => bottom - ((acc - low) / (1 - low)) * (bottom - top);
  const chart = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `ACC against ASR, ${titleOf(number)}` });
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const across = x(part), up = y(low + part * (1 - low));
    chart.append(
      el("line", { x1: across, x2: across, y1: top, y2: bottom, class: "grid" }),
      el("text", { x: across, y: bottom + 15, "text-anchor": "middle" }, percent(part, 0)),
      el("line", { x1: left, x2: right, y1: up, y2: up, class: "grid" }),
      el("text", { x: left - 6, y: up + 4, "text-anchor": "end" }, String(Math.round(1000 * (low + part * (1 - low))) / 10)),
    );
  }
  chart.append(el("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, "ASR, %"), el("text", { x: left, y: top - 4 }, "ACC, %"));
  const nodes = cells.map((cell) => tradeMark(cell, x, y));
  chart.append(...nodes);
  roving(chart, nodes);
  return el("figure", {}, el("figcaption", {}, titleOf(number)), chart);
}

function tradeMark(cell, x, y) {
  const defense = cell.names[1], at = [x(cell.asr[0]), y(cell.acc[0])], { before } = cell;
  const node = el("g", { "data-defense": defense, role: "img", "aria-label": nameOf(cell), opacity: cell.weak ? 0.5 : 1 });
  if (before.acc !== null && before.asr !== null) {
    const from = [x(before.asr), y(before.acc)];
    const path = el("path", { d: arrow(from, at), class: cell.oracle ? "arrow hollow" : "arrow" });
    node.append(cell.oracle ? path : coloured(path, defense), el("circle", { cx: from[0], cy: from[1], r: 3.5, class: "hollow" }));
  }
  const mark = el("path", { d: markerOf(defense), transform: `translate(${point(...at)})`, class: cell.oracle ? "mark oracle-mark" : "mark" });
  node.append(coloured(mark, defense));
  return tipped(node, () => [
    nameOf(cell),
    `before: ACC ${percent(before.acc)}, ASR ${percent(before.asr)}`,
    ...METRICS.map((name) => `${name.toUpperCase()} ${shownText(cell, name)}`),
  ]);
}

function arrow([fromX, fromY], [toX, toY]) {
  const length = Math.hypot(toX - fromX, toY - fromY);
  if (length < 14) return "";
  const unitX = (toX - fromX) / length, unitY = (toY - fromY) / length, endX = toX - 8 * unitX, endY = toY - 8 * unitY;
  const side = (sign) => point(endX - 6 * unitX + sign * 3.5 * unitY, endY - 6 * unitY - sign * 3.5 * unitX);
  return `M${point(fromX + 4 * unitX, fromY + 4 * unitY)}L${point(endX, endY)}M${side(1)}L${point(endX, endY)}L${side(-1)}`;
}

/* ---------- curves ---------- */

function drawCurves() {
  const kind = state.curve;
  const has = ({ curve }) => curve && (kind === "measured" ? curve.measured.length : curve.loss.some((value) => value !== null));
  const cells = visible().filter((cell) => cell.runs.some(has));
  const none = kind === "measured" ? "No run of this choice was measured between its epochs (--eval_every does it)." : "No run of this choice has a log of its epochs.";
  const chart = (cell) => curveChart(cell, kind, `${nameOf(cell)} `, el("small", {}, `${cell.dataset}, ${cell.model}`));
  byId("curve-charts").replaceChildren(...(cells.length ? cells.slice(0, state.curves).map(chart) : [soft(none)]));
  byId("more-curves").hidden = cells.length <= state.curves;
  byId("more-curves").textContent = showMore(CURVES, cells.length - state.curves);
  byId("curve-key").replaceChildren(...curveKey(kind), el("span", { class: "soft" }, "a line per seed; dashes part the stages"));
}

function curveKey(kind) {
  const names = kind === "measured" ? METRICS : ["loss"];
  const stroke = (name) => el("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, el("line", { x1: 0, x2: 16, y1: 8, y2: 8, class: `line ${name}` }));
  return names.map((name) => el("span", {}, stroke(name), name === "loss" ? "training loss" : `${name.toUpperCase()}, %`));
}

function seriesOf(curve, kind) {
  if (kind === "loss") return [["loss", curve.loss.map((value, place) => [place, value])]];
  return METRICS.map((name, which) => [name, curve.measured.map((row) => [row[0], row[1 + which]])]);
}

function curveChart(cell, kind, ...title) {
  const width = 280, height = 150, left = 46, right = 8, top = 10, bottom = 22;
  const curves = cell.runs.map((run) => run.curve).filter(Boolean);
  const series = curves.flatMap((curve) => seriesOf(curve, kind)).map(([name, points]) => [name, points.filter(([, value]) => value !== null)]);
  const last = Math.max(1, ...curves.map((curve) => curve.epoch.length - 1));
  const highest = kind === "loss" ? Math.max(1e-9, ...series.flatMap(([, points]) => points.map(([, value]) => value))) : 1;
  const x = (place) => left + (place / last) * (width - left - right), y = (value) => height - bottom - (value / highest) * (height - top - bottom);
  const tick = (value) => (kind === "loss" ? String(Number(value.toPrecision(2))) : percent(value, 0));
  const what = kind === "loss" ? "training loss" : "ACC, ASR and RA";
  const chart = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${what} by epoch: ${nameOf(cell)}` });
  for (const part of [0, 0.5, 1]) {
    chart.append(el("line", { x1: left, x2: width - right, y1: y(part * highest), y2: y(part * highest), class: "grid" }),
      el("text", { x: left - 5, y: y(part * highest) + 4, "text-anchor": "end" }, tick(part * highest)));
  }
  let at = 0;
  for (const [name, count] of curves.find((curve) => curve.epoch.length - 1 === last)?.stages ?? []) {
    if (at) chart.append(el("line", { x1: x(at - 0.5), x2: x(at - 0.5), y1: top, y2: height - bottom, class: "border" }));
    chart.append(el("text", { x: x(at) + 2, y: height - bottom + 14 }, name.slice(0, 14)));
    at += count;
  }
  for (const [name, points] of series) {
    const way = points.map(([place, value]) => point(x(place), y(value))).join("L");
    chart.append(el("path", { class: `line ${name}`, d: way && `M${way}` }));
    if (points.length < 12) chart.append(...points.map(([place, value]) => el("circle", { cx: x(place), cy: y(value), r: 2.2, class: name })));
  }
  const epochs = Math.max(...curves.map((curve) => curve.epoch.at(-1)));
  chart.append(el("text", { x: width - right, y: height - bottom + 14, "text-anchor": "end" }, `epoch ${epochs}`));
  return el("figure", {}, el("figcaption", {}, ...title), chart);
}

/* ---------- images, failures, the rest ---------- */

function figure(image) {
  const caption = el("figcaption", {}, image.caption, " ", el("small", {}, image.path));
  return el("figure", {}, caption, el("img", { src: image.source, width: image.size[0], height: image.size[1], alt: image.caption, decoding: "async" }));
}

function drawImages(box, images) {
  const shown = images.filter((image) => wanted(image, ["dataset", "model", "attack", "defense"]));
  byId(box).replaceChildren(...shown.map(figure));
  if (!shown.length) byId(box).append(soft("None of this choice."));
}

function drawDetections() {
  const shown = DATA.detections.filter((table) => wanted(table, ["dataset", "model"]));
  byId("detection-tables").replaceChildren(...shown.flatMap((table) => {
    const row = (cells, tag) => el("tr", {}, ...cells.map((text, place) => el(place ? tag : "th", place ? { class: "number" } : {}, text)));
    const body = el("tbody", {}, ...table.rows.map((cells) => row(cells, "td")));
    const grid = el("table", {}, el("thead", {}, row(table.header, "th")), body);
    return [el("h3", {}, table.title), soft(table.about), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title }, grid)];
  }));
  if (!shown.length) byId("detection-tables").append(soft("None of this choice."));
  drawImages("detection-images", DATA.judged);
  if (DATA.found.length) drawImages("found-images", DATA.found);
}

function list(title, lines) {
  const shown = lines.slice(0, 300);
  if (lines.length > shown.length) shown.push(`and ${lines.length - shown.length} more`);
  return lines.length ? [el("h3", {}, title), el("ul", {}, ...shown.map((line) => el("li", {}, line)))] : [];
}

function drawFailures() {
  const gaps = DATA.missing.filter(([number, attack, defense]) => {
    const table = DATA.tables[number];
    return wanted({ dataset: table.dataset, model: table.model, recipe: `${table.recipe}, ${table.precision}`, attack, defense });
  });
  const found = (have, want) => (have ? `${have} of ${plural(want, "victim")}` : "no run");
  const lines = gaps.map(([number, , , attack, defense, ...counts]) => `${titleOf(number)}: ${defense} on ${attack}, ${found(...counts)}`);
  const more = DATA.summary.missing - DATA.missing.length;
  byId("left-out").replaceChildren(...list(`Left out: ${DATA.left_out.length}`, DATA.left_out.map(([path, why]) => `${path}: ${why}`)),
    ...list(`Missing cells: ${gaps.length}`, lines), ...(more ? [soft(`${more} more missing cells are not named here.`)] : []));
  if (DATA.unshown) byId("left-out").append(soft(`Images that are not shown, for lack of space or because the file is unusable: ${DATA.unshown}`));
  if (!byId("left-out").childElementCount) byId("left-out").append(soft("Nothing: every run found is above, and no combination is missing."));
}

function startTheme() {
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => (byId("theme").textContent = dark() ? "Light" : "Dark");
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  name();
}

function startStory() {
  const { note, story } = DATA;
  byId("note").textContent = note;
  byId("note").hidden = !note;
  byId("story").hidden = !story.length;
  const few = DATA.triggers.length === 1 && DATA.found.length <= 2; // a page of one victim: its trigger, and what was found
  byId("story-images").hidden = !story.length || !few;
  if (few) byId("story-images").append(...DATA.triggers.map(figure), ...DATA.found.map(figure));
  byId("story").append(...story.map(({ kind, name, verdict, text }) => el("li", { class: kind }, el("b", {}, name), el("span", { class: "verdict" }, verdict), el("span", {}, text))));
}

function startPage() {
  const { runs, victims, repairs, seeds, missing, left_out: leftOut } = DATA.summary;
  const which = seeds.length <= 6 ? ` (${seeds.join(", ")})` : "";
  byId("summary").textContent = [
    `${plural(runs, "run")}: ${plural(victims, "victim")}, ${plural(repairs, "repair")}`,
    `${plural(seeds.length, "seed")}${which}`, plural(missing, "missing cell"), `${leftOut} left out`,
  ].join("; ");
  if (!DATA.scores.length) byId("scores").remove();
  if (!DATA.triggers.length) byId("triggers").remove();
  if (!DATA.detections.length) byId("detection").remove();
  else byId("detection-images").parentNode.hidden = !DATA.judged.length;
  for (const section of document.querySelectorAll("main section"))
    byId("sections").append(el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
  switcher(byId("heat-metric"), { acc: "ACC", asr: "ASR", ra: "RA" }, "heat", drawHeat);
  switcher(byId("curve-kind"), { loss: "Loss", measured: "ACC, ASR, RA" }, "curve", () => { state.curves = CURVES; drawCurves(); });
  byId("more-rows").addEventListener("click", () => { state.rows += ROWS; drawBoard(); });
  byId("more-curves").addEventListener("click", () => { state.curves += CURVES; drawCurves(); });
}

function draw() {
  drawBoard();
  drawHeat();
  drawTrade();
  drawCurves();
  if (byId("triggers")) drawImages("trigger-images", DATA.triggers);
  if (byId("scores")) drawImages("score-images", DATA.scores);
  if (byId("detection")) drawDetections();
  drawFailures();
}

startTheme();
startTips();
startFilters();
startStory();
startCopying();
startPage();
draw();
