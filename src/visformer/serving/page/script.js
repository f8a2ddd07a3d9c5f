// The page of `visformer serve`: images in, labels, times and heat maps out. What it shows is kept in memory until it
// is closed or cleared; nothing is stored, and nothing is asked of any other host.

import { Problem, explain, models, predict, setKey } from "./client.js";
import { setUpCamera } from "./camera.js";
import { draw } from "./heat.js";
import { labelOf, made, percent, showAnswer, showHeat, showNoHeat, showPicture } from "./view.js";

const $ = (id) => document.getElementById(id);
const THUMBNAIL = 240; // pixels
let items = []; // of the session, oldest first
let current = null;
let method = ""; // of the heat map, as last chosen; empty: the server's best
let pumping = false;
let session = new AbortController();
let photoUrl = "";
let pasted = 0;

// ---- images come in

function add(files) {
  const images = [...files];
  if (!images.length) return;
  const first = items.length;
  for (const file of images) {
    items.push({ file, name: file.name, state: "waiting", choice: chosenModel(), index: null, heats: new Map() });
  }
  document.body.classList.remove("first");
  showItem(items[first]);
  pump();
}

async function pump() {
  if (pumping) return;
  pumping = true;
  for (let item = next(); item; item = next()) await label(item);
  pumping = false;
}

const next = () => items.find((item) => item.state === "waiting");

async function label(item) {
  const { signal } = session;
  item.state = "busy";
  refresh(item);
  thumbnail(item);
  try {
    item.answer = await predict(item.file, item.choice, signal);
    item.state = "done";
    const [best, ...others] = item.answer.predictions;
    const rest = others.map((one) => `${labelOf(one)} ${percent(one.probability)}`).join(", ");
    announce(`${item.name}: ${labelOf(best)}, ${percent(best.probability)}${rest && `; then ${rest}`}`);
  } catch (error) {
    if (signal.aborted) return;
    item.state = "failed";
    item.problem = error instanceof Problem ? error : new Problem(`The answer can't be read: ${error.message}`);
    if (item.problem.status === 401) askForKey(item.problem.message);
    if (item.problem.status === 404) showModels(); // one of them has gone
    announce(item.problem.message);
  }
  refresh(item);
}

function again(item) {
  Object.assign(item, { state: "waiting", problem: null, answer: null, index: null, choice: chosenModel() });
  item.heats.clear();
  refresh(item);
  pump();
}

function announce(words) { $("status").textContent = words; }

// ---- the result

function refresh(item) {
  if (item === current) showResult(item);
  showGallery();
}

function showItem(item) {
  current = item;
  URL.revokeObjectURL(photoUrl);
  photoUrl = URL.createObjectURL(item.file);
  $("result").hidden = false;
  showPicture(item, photoUrl);
  showResult(item);
  showGallery();
}

function showResult(item) {
  $("busy").hidden = item.state !== "busy" && item.state !== "waiting";
  $("busy-text").textContent = item.state === "busy" ? `Asking about ${item.name} …` : "Waiting for its turn …";
  $("error").hidden = item.state !== "failed";
  $("answer").hidden = $("looked").hidden = $("time").hidden = item.state !== "done";
  $("crop").hidden = true;
  if (item.state === "failed") $("error-text").textContent = item.problem.message;
  if (item.state !== "done") return;
  showAnswer(item, (index) => { item.index = index; if (method === "none") method = ""; look(item); });
  look(item);
}

// ---- where the model looked

async function look(item) {
  const index = item.index ?? item.answer.predictions[0].index;
  const asked = `${method === "none" ? "" : method}:${index}`;
  press(null);
  if (!item.heats.has(asked)) {
    showNoHeat("Looking …");
    const choice = { ...item.choice, version: item.answer.version, model: item.answer.model };
    const wanted = { ...choice, method: method === "none" ? "" : method, index };
    item.heats.set(asked, explain(item.file, wanted, session.signal));
  }
  const pending = item.heats.get(asked);
  item.looking = pending;
  try {
    const heat = await pending;
    if (item !== current || item.looking !== pending) return;
    item.heat = heat;
    showHeat(heat, method || heat.method, strength(), chooseMethod);
    $("bars-hint").hidden = heat.method === "attention" || method === "none";
    press(heat.method === "attention" || method === "none" ? null : index);
  } catch (error) {
    item.heats.delete(asked);
    if (item !== current || item.looking !== pending || error.name === "AbortError") return;
    if (error.status === 400 && method && method !== "none") {
      method = ""; // another model may not have it
      look(item);
      return;
    }
    item.heat = null;
    $("bars-hint").hidden = true;
    showNoHeat(`No heat map. ${error.message}`);
  }
}

function chooseMethod(name) {
  method = name;
  if (current?.state === "done") look(current);
}

function press(index) {
  for (const button of $("bars").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  }
}

const strength = () => Number($("opacity").value) / 100;

// ---- the session

async function thumbnail(item) {
  if (item.thumbnail) return;
  try {
    const bitmap = await createImageBitmap(item.file);
    const scale = THUMBNAIL / Math.min(bitmap.width, bitmap.height);
    const side = Math.min(bitmap.width, bitmap.height), canvas = made("canvas", { width: THUMBNAIL, height: THUMBNAIL });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = scale < 2;
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, THUMBNAIL, THUMBNAIL);
    bitmap.close();
    const blob = await new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", 0.85); });
    item.thumbnail = URL.createObjectURL(blob);
    if (items.includes(item)) showGallery();
    else URL.revokeObjectURL(item.thumbnail);
  } catch {
    item.thumbnail = ""; // a format that the browser can't show
  }
}

function showGallery() {
  $("session").hidden = !items.length;
  const focused = document.activeElement?.dataset?.number;
  $("gallery").replaceChildren(...items.map((item, number) => entry(item, number)).reverse());
  if (focused) $("gallery").querySelector(`[data-number="${focused}"]`)?.focus();
}

function entry(item, number) {
  const row = made("li"), button = row.appendChild(made("button", { type: "button" }));
  button.dataset.number = number;
  button.setAttribute("aria-current", String(item === current));
  button.append(item.thumbnail ? made("img", { src: item.thumbnail, alt: "" }) : made("span", { className: "none" }));
  const words = button.appendChild(made("span", { className: "words" }));
  const best = item.state === "done" ? item.answer.predictions[0] : null;
  words.append(made("b", { text: best ? labelOf(best) : { failed: "No answer", busy: "Asking …" }[item.state] || "Waiting" }));
  if (best) words.append(" ", made("span", { className: "soft", text: percent(best.probability) }));
  words.append(made("span", { className: "offscreen", text: `, ${item.name}` }));
  button.classList.toggle("failed", item.state === "failed");
  button.addEventListener("click", () => {
    showItem(item);
    $("result").focus({ preventScroll: true });
    $("result").scrollIntoView({ block: "start" });
  });
  return row;
}

function clear() {
  session.abort();
  session = new AbortController();
  for (const item of items) if (item.thumbnail) URL.revokeObjectURL(item.thumbnail);
  URL.revokeObjectURL(photoUrl);
  items = [];
  current = null;
  $("photo").removeAttribute("src");
  $("result").hidden = true;
  showGallery();
  document.body.classList.add("first");
  announce("The session is cleared.");
  $("choose").focus();
}

// ---- which model, and the key to it

let onlyOne = true; // then requests need not name it

const chosenModel = () => (onlyOne || !$("model").value ? {} : JSON.parse($("model").value));

async function showModels() {
  let rows;
  try {
    const known = await models();
    rows = known.filter((row) => row.state === "READY");
    onlyOne = rows.length < 2 && new Set(known.map((row) => row.name)).size < 2;
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    return; // the server's own choice will do
  }
  const before = $("model").value;
  const newest = new Map(rows.map((row) => [row.name, row.version])); // the last of each name
  const options = rows.map(({ name, version }) => {
    const several = rows.filter((row) => row.name === name).length > 1;
    const text = !several ? name : `${name}, version ${version}${newest.get(name) === version ? " (newest)" : ""}`;
    const value = JSON.stringify(several && newest.get(name) !== version ? { model: name, version } : { model: name });
    return made("option", { value, text });
  });
  $("model").replaceChildren(...options);
  if (options.some((option) => option.value === before)) $("model").value = before;
  $("model-field").hidden = options.length < 2;
}

function askForKey(words) {
  $("key-form").querySelector("label").textContent = words;
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  await showModels();
  if (!$("key-form").hidden) return;
  for (const item of items) if (item.problem?.status === 401) again(item);
});

// ---- buttons, dropping, pasting, theme

$("choose").addEventListener("click", () => $("files").click());
for (const id of ["files", "capture"]) {
  $(id).addEventListener("change", () => { add($(id).files); $(id).value = ""; });
}
$("again").addEventListener("click", () => again(current));
$("clear").addEventListener("click", clear);
$("model").addEventListener("change", () => { if (current) again(current); });
$("opacity").addEventListener("input", () => { if (current?.heat) draw($("heat"), current.heat, strength()); });
$("copy").addEventListener("click", async () => {
  const text = $("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied.";
  } catch { // no https, or not allowed
    getSelection().selectAllChildren($("curl"));
    $("copied").textContent = "Selected; press Ctrl C.";
  }
});
setUpCamera((picture) => add([picture]));

const carriesFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("veil").hidden = !carriesFiles(event);
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("veil").hidden = true; });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("veil").hidden = true;
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else announce("What was dropped is not a file. Save the image first, or copy and paste it.");
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files || [])];
  if (!files.length) return;
  event.preventDefault();
  add(files.map((file) => {
    pasted += 1;
    return new File([file], `pasted ${pasted}.${file.type.split("/")[1] || "png"}`, { type: file.type });
  }));
});

const preferred = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (preferred.matches ? "dark" : "light")) === "dark";
function nameTheme() {
  const other = isDark() ? "Light" : "Dark";
  $("theme-name").textContent = other;
  $("theme").setAttribute("aria-label", `${other} theme`);
}
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
preferred.addEventListener("change", nameTheme);

document.body.classList.add("first");
nameTheme();
showModels();
