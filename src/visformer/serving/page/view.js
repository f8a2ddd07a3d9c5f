// Puts an item of the session on the screen: its picture, labels, times and heat map. It keeps no state of its own.

import { describe, draw, drawScale, range } from "./heat.js";
import { hasKey, query, size } from "./client.js";

const $ = (id) => document.getElementById(id);
const METHODS = { activation: "Class activation", attention: "Attention", occlusion: "Occlusion", none: "None" };
const TIMES = [["decode", "Decode"], ["queue", "Queue"], ["model", "Model"], ["rest", "Rest of server"], ["network", "Network"]];

export const labelOf = (prediction) => prediction.description || prediction.label;
export const percent = (probability) => {
  const value = 100 * probability;
  return value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};

// A new element with text, for what the page makes as it goes.
export function made(tag, { text = "", ...properties } = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  if (text) element.textContent = text;
  return element;
}

export function showPicture(item, url) {
  const photo = $("photo");
  $("crop").hidden = true;
  $("no-preview").hidden = true;
  photo.hidden = false;
  photo.alt = `The image ${item.name}`;
  photo.onload = () => {
    item.measured = true;
    photo.classList.toggle("tiny", photo.naturalWidth < 160);
    shape(photo.naturalWidth, photo.naturalHeight);
    facts(item, photo.naturalWidth, photo.naturalHeight);
  };
  photo.onerror = () => {
    photo.hidden = true;
    $("no-preview").hidden = false;
    shape(4, 3);
  };
  photo.src = url;
  $("name").textContent = item.name;
  facts(item);
}

function facts(item, width = 0, height = 0) {
  const seen = width ? `${width} × ${height} pixels, ` : "";
  const by = item.answer ? `; ${item.answer.model}, version ${item.answer.version}` : "";
  $("facts").textContent = `${seen}${size(item.file)}${by}`;
}

// The frame as large as the column or the window allows, in the picture's proportions.
function shape(width, height) {
  const view = $("view"), ratio = width / height;
  view.style.aspectRatio = `${width} / ${height}`;
  view.style.width = `min(100%, ${(62 * ratio).toFixed(3)}vh)`;
}

export function showAnswer(item, onClass) {
  const { answer } = item, [best] = answer.predictions;
  $("best").textContent = labelOf(best);
  $("bars").replaceChildren(...answer.predictions.map((prediction) => bar(prediction, onClass)));
  showTimes(answer.times);
  $("curl").textContent = curl(item);
  $("copied").textContent = "";
  facts(item, $("photo").naturalWidth, $("photo").naturalHeight);
}

function bar(prediction, onClass) {
  const row = made("li"), button = row.appendChild(made("button", { type: "button" }));
  const fill = button.appendChild(made("i"));
  fill.style.width = `${100 * prediction.probability}%`;
  const label = button.appendChild(made("span", { className: "label", text: labelOf(prediction) }));
  if (prediction.description) label.append(" ", made("small", { text: prediction.label }));
  button.append(" ", made("span", { className: "percent", text: percent(prediction.probability) }));
  button.dataset.index = prediction.index;
  button.addEventListener("click", () => onClass(prediction.index));
  return row;
}

function showTimes(times) {
  const parts = TIMES.filter(([name]) => times[name] !== undefined);
  $("time-bar").replaceChildren(...parts.map(([name]) => {
    const part = made("i", { className: `part-${name}` });
    part.style.flexGrow = times[name];
    return part;
  }));
  $("time-bar").hidden = !parts.length;
  $("times").replaceChildren(...[...parts, ["total", "In all"]].map(([name, words]) => {
    const row = made("div");
    row.append(made("dt", { className: `part-${name}`, text: words }), made("dd", { text: milliseconds(times[name]) }));
    return row;
  }));
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(value < 100 ? 1 : 0)} ms`;

function curl(item) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const header = hasKey() ? " -H 'Authorization: Bearer KEY'" : "";
  const url = new URL("predict" + query(item.choice), location.href);
  return `curl --data-binary @${quoted(item.name)}${header} ${quoted(url.href)}`;
}

// The choice of methods, the words below it, and the map over the picture.
export function showHeat(heat, chosen, strength, onMethod) {
  methods([...heat.methods, "none"], chosen, onMethod);
  const shown = chosen !== "none", { image, crop, grid } = heat;
  $("opacity").disabled = !shown;
  $("scale").hidden = $("crop").hidden = !shown;
  $("explanation").textContent = shown ? explanation(heat) : "The picture as it is.";
  if (!shown) return;
  if (!$("no-preview").hidden) shape(image.width, image.height);
  const share = (part, whole) => `${(100 * part) / whole}%`;
  Object.assign($("crop").style, {
    left: share(crop.left, image.width),
    top: share(crop.top, image.height),
    width: share(crop.width, image.width),
    height: share(crop.height, image.height),
  });
  $("heat").style.width = share(grid.width, crop.width);
  $("heat").style.height = share(grid.height, crop.height);
  draw($("heat"), heat, strength);
  drawScale($("scale-bar"), heat);
  $("heat").setAttribute("aria-label", `Heat map of ${METHODS[heat.method].toLowerCase()}: ${describe(heat)}`);
  const { low, high } = range(heat);
  $("scale-low").textContent = amount(heat, low);
  $("scale-high").textContent = amount(heat, high);
}

export function showNoHeat(words) {
  $("crop").hidden = $("scale").hidden = true;
  $("explanation").textContent = words;
}

function methods(names, chosen, onMethod) {
  if ([...$("methods").querySelectorAll("input")].map((input) => input.value).join() !== names.join()) {
    $("methods").replaceChildren(...names.map((name) => {
      const label = made("label"), input = made("input", { type: "radio", name: "method", value: name });
      input.addEventListener("change", () => onMethod(name));
      label.append(input, made("span", { text: METHODS[name] || name }));
      return label;
    }));
  }
  for (const input of $("methods").querySelectorAll("input")) input.checked = input.value === chosen;
}

function explanation(heat) {
  const name = heat.description || heat.label;
  if (heat.method === "activation") {
    const sum = heat.scale * heat.values.flat().reduce((a, b) => a + b, 0);
    return `What each place gives to the score of “${name}”: warm speaks for it, blue against. All places together ` +
      `make up the score, ${signed(sum)}.`;
  }
  if (heat.method === "attention") {
    return "How much the last stage looks at each place, whatever the class: so many times an even share.";
  }
  return `How the odds of “${name}” change when a place is covered: where it is warm they fall, so it speaks for the ` +
    "class; where it is blue they rise.";
}

function amount(heat, value) {
  const real = value * heat.scale;
  if (heat.method === "attention") return `${(real * heat.values.flat().length).toFixed(2)} ×`;
  return signed(real);
}

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toPrecision(2);
