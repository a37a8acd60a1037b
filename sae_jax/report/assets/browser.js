// The feature browser: a list that holds only the rows in view, and one feature's details.

const ROW = 28; // pixels, as in page.css
const SPARE = 8; // rows drawn above and below those in view
const PAGE = 20; // rows that Page Up and Page Down move by

const list = {
  sae: -1, columns: {}, order: [], active: 0, sort: "feature", down: false, opened: null,
};

const sae = () => about.browsers[list.sae];
const nameOf = feature => `#${encodeURIComponent(sae().name)}/feature/${feature}`;
const visible = text => text.replaceAll(" ", "·");

function tokenOf(column, feature) {
  return texts[rowOf(list.columns[column], sae().n_features, feature)[0] ?? 0];
}

// Not every page has labels.
function labelOf(feature) {
  return list.columns.label ? texts[list.columns.label[feature]] : "";
}

function keyOf(feature) {
  if (list.sort === "feature") return feature;
  if (list.sort === "label") return labelOf(feature);
  const text = list.sort === "strongest" || list.sort === "raised";
  return text ? tokenOf(list.sort, feature) : list.columns[list.sort][feature];
}

const FILTERS = { // with the bounds that browser.html names
  all: () => true,
  dead: feature => list.columns.density[feature] === 0,
  dense: feature => list.columns.density[feature] > 0.1,
  over: feature => list.columns.norm_ratio[feature] > 1,
};

// The features to list: filtered, searched, sorted; one that is named comes first.
function arrange() {
  const { n_features } = sae(), { strongest, raised, label } = list.columns;
  const query = at("search").value.trim().toLowerCase().replaceAll("·", " ");
  const named = /^\d+$/.test(query) ? Number(query) : -1;
  const hits = lowercase.map(text => text.includes(query));
  const found = feature => feature === named ||
    rowOf(strongest, n_features, feature).some(place => hits[place]) ||
    rowOf(raised, n_features, feature).some(place => hits[place]) ||
    (label !== undefined && hits[label[feature]]);
  const passes = FILTERS[at("filter").value];
  const order = [];
  for (let feature = 0; feature < n_features; feature++) {
    if (passes(feature) && (query === "" || found(feature))) order.push(feature);
  }
  const keys = new Map(order.map(feature => [feature, keyOf(feature)]));
  order.sort((a, b) => (b === named) - (a === named) ||
    compare(keys.get(a), keys.get(b), list.down) || a - b);
  list.order = order;
  at("count").textContent = `${counted(order.length)} of ${counted(n_features)} features`;
  moveTo(0);
}

// Makes a place of the list the active one, and brings it into view.
function moveTo(place) {
  list.active = Math.max(0, Math.min(list.order.length - 1, place));
  const box = at("scroller"), head = at("features").tHead.offsetHeight;
  const top = list.active * ROW, low = top + ROW + head - box.clientHeight;
  box.scrollTop = Math.max(low, Math.min(top, box.scrollTop));
  drawRows();
}

// Only the rows in view are in the page, between two that stand for the others.
function drawRows() {
  const box = at("scroller"), table = at("features"), n = list.order.length;
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
  const last = Math.min(n, first + Math.ceil(box.clientHeight / ROW) + 2 * SPARE);
  const columns = list.columns.label ? 8 : 7; // one more would be drawn, empty
  const spacer = rows => make("tr", { role: "presentation" },
    make("td", { class: "spacer", style: `height: ${rows * ROW}px`, colspan: columns }));
  const rows = list.order.slice(first, last).map((f, i) => drawRow(f, first + i));
  table.tBodies[0].replaceChildren(spacer(first), ...rows, spacer(n - last));
  table.setAttribute("aria-rowcount", n + 1);
  table.setAttribute("aria-activedescendant", `place${list.active}`);
}

function drawRow(feature, place) {
  const { density, strength, norm_ratio, highest } = list.columns;
  const numbers = [percent(density[feature]), number(strength[feature]),
    number(norm_ratio[feature]), number(highest[feature])];
  const row = make("tr", {
    id: `place${place}`, "aria-rowindex": place + 2,
    "aria-selected": feature === list.opened,
    class: place === list.active ? "active" : "",
  }, make("td", {}, String(feature)));
  for (const column of ["strongest", "raised"]) {
    row.append(make("td", { class: "token" }, visible(tokenOf(column, feature))));
  }
  row.append(make("td", { title: labelOf(feature) }, labelOf(feature)));
  row.append(...numbers.map(text => make("td", {}, text)));
  row.addEventListener("click", () => open(feature));
  return row;
}

// Every opening goes by the address, which is a link to the feature.
function open(feature) {
  if (location.hash === nameOf(feature)) follow();
  else location.hash = nameOf(feature);
}

async function select(which) {
  if (which === list.sae) return;
  const columns = await unpack(`columns${which}`);
  Object.assign(list, { sae: which, columns });
  at("features").classList.toggle("unlabelled", !columns.label);
  at("sae").value = which;
  closeDetail();
  arrange();
}

function closeDetail() {
  list.opened = null;
  at("detail").replaceChildren(make("p", { class: "hint" }, "Choose a feature."));
}

async function follow() {
  const [, name, given] = location.hash.match(/^#(.+)\/feature\/(\d+)$/) ?? [];
  const which = about.browsers.findIndex(b =>
    name === encodeURIComponent(b.name) || name === encodeURI(b.name)); // by hand
  if (which < 0) {
    if (location.hash !== "") return; // it names another part of the page
    closeDetail();
    drawRows();
    return;
  }
  await select(which);
  const feature = Number(given);
  if (feature >= sae().n_features) {
    at("detail").replaceChildren(`${sae().name} has features 0 to ` +
      `${sae().n_features - 1}; there is no ${feature}.`);
    return;
  }
  list.opened = feature;
  const place = list.order.indexOf(feature);
  if (place >= 0) moveTo(place);
  else drawRows();
  await showDetail(feature);
}

async function showDetail(feature) {
  const { per_chunk, n_features, contexts } = sae(), which = list.sae;
  const part = Math.floor(feature / per_chunk), i = feature % per_chunk;
  const n = Math.min(per_chunk, n_features - part * per_chunk);
  const details = await unpack(`details${which}-${part}`);
  const { tokens, width } = await unpack(`contexts${contexts}`);
  if (list.sae !== which || list.opened !== feature) return; // another was chosen
  const of = name => rowOf(details[name], n, i);
  const { density, strength, norm_ratio, highest } = list.columns;
  const figures = {
    density: percent(density[feature]), strength: number(strength[feature]),
    "norm ratio": number(norm_ratio[feature]), highest: number(highest[feature]),
  };
  const title = make("h3", { tabindex: -1 }, `Feature ${feature}`);
  const { detection, fuzzing } = list.columns;
  if (detection) Object.assign(figures, {
    "label: detection": number(detection[feature]),
    "label: fuzzing": number(fuzzing[feature]),
  });
  const pairs = Object.entries(figures).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  at("detail").replaceChildren(title, make("p", { class: "stands-for" }, labelOf(feature)),
    make("dl", { class: "figures" }, ...pairs));
  if (density[feature] > 0) {
    at("detail").append(make("h4", {}, "Activations"),
      histogram(of("histogram"), highest[feature]));
  } else {
    at("detail").append(make("p", {}, "It fired on none of the held-out rows."));
  }
  const beside = make("div", { class: "columns" });
  if (details.raised && density[feature] > 0) {
    beside.append(tokenList("Raised tokens", of("raised"), of("raised_by")),
      tokenList("Lowered tokens", of("lowered"), of("lowered_by")));
  }
  beside.append(nearestList(of("nearest"), of("nearest_cosine")));
  at("detail").append(beside,
    ...exampleGroups(details, i, highest[feature], tokens, width[0]),
    ...steeredTexts(feature));
  title.focus();
}

function listed(title, lines) {
  return make("div", {}, make("h4", {}, title),
    make("ul", {}, ...lines.map(line => make("li", {}, ...line))));
}

function tokenList(title, places, amounts) {
  return listed(title, Array.from(places, (place, k) =>
    [make("span", { class: "token" }, visible(texts[place])), signed(amounts[k])]));
}

function nearestList(features, cosines) {
  const known = [...features.keys()].filter(k => features[k] >= 0);
  return listed("Nearest features", known.map(k =>
    [make("a", { href: nameOf(features[k]) }, String(features[k])),
      make("span", { class: "token" }, visible(tokenOf("strongest", features[k]))),
      number(cosines[k])]));
}

// The samples of a feature stand in a section of their own, written by page.py.
function steeredTexts(feature) {
  const sample = [...document.querySelectorAll(".sample")].find(element =>
    element.dataset.sae === sae().name && Number(element.dataset.feature) === feature);
  if (!sample) return [];
  const copies = [...sample.querySelectorAll(".label, .steered")];
  return [make("h4", {}, "Steered generation"), ...copies.map(e => e.cloneNode(true))];
}

function exampleGroups(details, i, highest, tokens, width) {
  const { groups } = sae(), found = [];
  let example = i * groups.reduce((sum, [, n]) => sum + n, 0);
  let firing = details.counts.subarray(0, example).reduce((sum, n) => sum + n, 0);
  for (const [label, n] of groups) {
    const shown = [];
    for (const last = example + n; example < last; example++) {
      const values = new Map();
      for (const stop = firing + details.counts[example]; firing < stop; firing++) {
        values.set(details.positions[firing], details.levels[firing] / 255 * highest);
      }
      const row = details.examples[example];
      if (row >= 0) shown.push(drawExample(row, values, highest, tokens, width));
    }
    if (shown.length) found.push(make("h4", {}, label), ...shown);
  }
  return found;
}

function drawExample(row, values, highest, tokens, width) {
  const text = make("p"), place = row % width;
  const button = make("button", { type: "button", title: "the whole context" });
  const draw = whole => {
    text.replaceChildren(...passage(tokens, width, row, values, highest, whole));
    button.textContent = whole ? "less" : "more";
    button.setAttribute("aria-expanded", whole);
  };
  button.addEventListener("click", () =>
    draw(button.getAttribute("aria-expanded") === "false"));
  draw(false);
  const where = `${number(values.get(place))} at token ${place} of context ` +
    `${Math.floor(row / width)}`;
  return make("div", { class: "example" },
    make("div", { class: "place" }, make("span", {}, where), button), text);
}

const KEYS = {
  ArrowDown: () => moveTo(list.active + 1),
  ArrowUp: () => moveTo(list.active - 1),
  PageDown: () => moveTo(list.active + PAGE),
  PageUp: () => moveTo(list.active - PAGE),
  Home: () => moveTo(0),
  End: () => moveTo(list.order.length - 1),
  Enter: () => list.order.length && open(list.order[list.active]),
};

async function startBrowser() {
  about.browsers.forEach((browser, i) =>
    at("sae").append(make("option", { value: i }, browser.name)));
  sortable([...document.querySelectorAll("#features th")], (heading, down) => {
    Object.assign(list, { sort: heading.dataset.column, down });
    arrange();
  });
  at("controls").addEventListener("submit", event => event.preventDefault());
  at("search").addEventListener("input", arrange);
  at("filter").addEventListener("change", arrange);
  at("sae").addEventListener("change", async () => {
    history.replaceState(null, "", location.pathname);
    await select(Number(at("sae").value));
  });
  at("scroller").addEventListener("scroll", drawRows);
  window.addEventListener("resize", drawRows);
  window.addEventListener("hashchange", follow);
  at("features").addEventListener("keydown", event => {
    if (event.target !== at("features") || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  document.addEventListener("keydown", event => {
    const writing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (event.key === "/" && !writing) {
      event.preventDefault();
      at("search").focus();
    } else if (event.key === "Escape" && at("browser").contains(event.target)) {
      event.preventDefault();
      at("features").focus();
    }
  });
  await select(0);
  await follow();
}

async function start() {
  document.querySelectorAll(".results").forEach(sortResults);
  await readTexts();
  for (const [i, panel] of about.zf.entries()) {
    at("zf-panels").append(await drawPanel(panel, i));
  }
  if (about.browsers.length) await startBrowser();
  document.body.dataset.ready = "yes";
}

start().catch(error => {
  document.body.prepend(make("p", { role: "alert" },
    `This browser cannot show the plots and features of this page: ${error}`));
  throw error;
});
