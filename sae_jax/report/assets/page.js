// What all parts of a page need: elements, data, passages of text, sorting.
// page.py joins this file, plots.js and browser.js to one script.
// Whatever comes from data becomes text nodes and attributes, never markup.
"use strict";

const BEFORE = 24, AFTER = 8; // tokens shown around a place
const SVG = "http://www.w3.org/2000/svg"; // a name, fetched from nowhere
const SVG_TAGS = new Set(["svg", "path", "rect", "circle", "text", "title"]);
const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array,
  float32: Float32Array,
};

const at = id => document.getElementById(id);
const about = JSON.parse(at("about").textContent);

function make(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value) {
  if (!Number.isFinite(value)) return "–";
  const text = value === 0 ? "0" : value.toPrecision(3);
  return (text.includes("e") ? String(Number(text)) : text).replace("-", "−");
}

const counted = count => count.toLocaleString("en");
const percent = share => `${number(100 * share)} %`;
const signed = value => (value > 0 ? "+" : "") + number(value);

// Data: see browser_chunks.py

const chunks = new Map();

function unpack(id) {
  if (!chunks.has(id)) chunks.set(id, inflate(at(id)));
  return chunks.get(id);
}

async function inflate(element) {
  const bytes = Uint8Array.from(atob(element.textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream()
    .pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const arrays = {};
  let start = 0;
  for (const [name, type, length] of JSON.parse(element.dataset.layout)) {
    const end = start + length * ARRAYS[type].BYTES_PER_ELEMENT;
    arrays[name] = new ARRAYS[type](buffer.slice(start, end));
    start = end;
  }
  return arrays;
}

let texts = []; // of tokens; 0 is none
let lowercase = [];

async function readTexts() {
  texts = JSON.parse(new TextDecoder().decode((await unpack("texts")).json));
  lowercase = texts.map(text => text.toLowerCase());
}

// The i-th row of a flat array that holds n of them.
function rowOf(array, n, i) {
  const width = array.length / n;
  return array.subarray(i * width, (i + 1) * width);
}

// Tokens around a place of a context: those that fired shaded, the place itself bold.
function passage(tokens, width, row, values, highest, whole) {
  const first = row - row % width, last = first + width;
  const from = whole ? first : Math.max(first, row - BEFORE);
  const to = whole ? last : Math.min(last, row + AFTER + 1);
  const parts = [from > first ? "… " : ""];
  for (let r = from; r < to; r++) {
    const value = values.get(r - first);
    if (value === undefined && r !== row) {
      parts.push(texts[tokens[r]]);
      continue;
    }
    const span = make("span", {}, texts[tokens[r]]);
    if (value !== undefined) {
      span.className = "on";
      span.title = `activation ${number(value)}`;
      span.style.setProperty("--share", (value / highest).toFixed(2));
    }
    span.classList.toggle("peak", r === row);
    parts.push(span);
  }
  return [...parts, to < last ? " …" : ""];
}

// Headings that sort, by mouse or keyboard. `sort(heading, down)` does it.
function sortable(headings, sort) {
  for (const heading of headings) {
    const button = make("button", { type: "button" }, ...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(heading, down);
    });
  }
}

// Order of two keys, numbers or texts; those that are missing come last either way.
function compare(a, b, down) {
  const lacking = key => key === "" || Number.isNaN(key);
  if (lacking(a) || lacking(b)) return lacking(a) - lacking(b);
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return down ? -order : order;
}

function sortResults(table) {
  const body = table.tBodies[0];
  sortable([...table.tHead.rows[0].cells], (heading, down) => {
    const column = heading.cellIndex;
    const key = row => {
      const text = row.cells[column].textContent;
      return column === 0 ? text : parseFloat(text.replaceAll(",", ""));
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), down)));
  });
}
