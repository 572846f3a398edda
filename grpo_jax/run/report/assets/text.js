"use strict";

// Elements, numbers and text. What a run wrote only ever becomes a text node: no file of this page sets innerHTML.

/** Makes an element: h("div.card", {onclick: f}, "text", child). Children that are null are left out. */
function h(kind, attributes, ...children) {
  const [tag, ...classes] = kind.split(".");
  return fill(document.createElement(tag), classes, attributes, children);
}

/** The same for SVG. */
function svg(kind, attributes, ...children) {
  const [tag, ...classes] = kind.split(".");
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const replace = (element, ...children) => element.replaceChildren(...children.flat().filter((child) => child !== null));

// Control codes, half surrogate pairs, marks that change the direction of reading, and characters that nobody sees: they are
// spelled out, so that a text can neither hide something nor look like another one.
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cs}\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]/gu;

const code = (character) => {
  const number = character.codePointAt(0);
  if (number < 0x100) return `\\x${number.toString(16).padStart(2, "0")}`;
  return number < 0x10000 ? `\\u${number.toString(16).padStart(4, "0")}` : `\\U${number.toString(16).padStart(8, "0")}`;
};

/** A text as nodes, with unseen characters spelled out. */
function visible(text) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(UNSEEN)) {
    if (found.index > done) nodes.push(text.slice(done, found.index));
    nodes.push(h("span.unseen", { title: "a character that is not shown" }, code(found[0])));
    done = found.index + found[0].length;
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

/** A text as nodes, with every occurrence of `word` (lower case) marked. */
function marked(text, word) {
  if (!word) return visible(text);
  const nodes = [], low = text.toLowerCase();
  if (low.length !== text.length) return visible(text);
  let done = 0;
  for (let at = low.indexOf(word); at >= 0; at = low.indexOf(word, done)) {
    nodes.push(...visible(text.slice(done, at)), h("mark", {}, ...visible(text.slice(at, at + word.length))));
    done = at + word.length;
  }
  return [...nodes, ...visible(text.slice(done))];
}

const thin = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");
const minus = (text) => text.replace("-", "\u2212");

/** A number with about `digits` digits; "–" where there is none. */
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return minus(size < 1e4 ? String(value) : thin(String(value)));
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return minus(value.toExponential(digits - 1 < 2 ? digits - 1 : 2).replace(/\.?0*e/, "e").replace("e-", "e\u2212").replace("e+", "e"));
  const text = value.toPrecision(digits);
  return minus(size >= 1e4 ? thin(String(Math.round(value))) : text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);
}

/** A share as a percentage, with `digits` digits where they are given and one after the point otherwise. */
const share = (value, digits) => (value === null || value === undefined ? "–" : `${digits ? number(100 * value, digits) : (100 * value).toFixed(1)}\u202f%`);

/** Seconds as people say them. */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${number(1000 * seconds, 3)} ms`;
  if (seconds < 60) return `${number(seconds, 3)} s`;
  const minutes = Math.floor(seconds / 60), left = String(Math.round(seconds % 60)).padStart(2, "0");
  return minutes < 60 ? `${minutes} min ${left} s` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

/** A value of a setting on one line. */
const spelled = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** A button that copies a text. */
function copyButton(text) {
  const button = h("button.quiet", { type: "button", onclick: copy }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select the text and copy it";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
  return button;
}

/** Unpacks the data of this page: JSON, compressed and in base64. */
async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Shows an error in place of the page. */
function failed(error) {
  document.getElementById("page").replaceChildren(h("p.failed", {}, `This page could not be shown: ${error}`));
  throw error;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
