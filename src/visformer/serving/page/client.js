// Talks to the server, and says in words what went wrong. Every path is relative, so that the page may live anywhere.

export class Problem extends Error {
  constructor(words, { status = 0, retryAfter = 0 } = {}) {
    super(words);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let key = "";

export const setKey = (value) => { key = value; };
export const hasKey = () => key !== "";

// [{name, version, state}] of every model, loaded or not, a model's versions from the oldest to the newest.
export async function models() {
  const response = await request("v2/repository/index", { method: "POST", body: "{}" });
  return response.json();
}

// {model, version, predictions, times}; times are milliseconds.
export async function predict(file, choice, signal) {
  const began = performance.now();
  const response = await request("predict" + query(choice), { method: "POST", body: file, signal }, file);
  const answer = await response.json();
  const times = split(performance.now() - began, response.headers.get("Server-Timing") || "");
  return { model: answer.model, version: answer.version, predictions: answer.images[0].predictions, times };
}

// Where the model looked: see `visformer/serving/explain.py`. Without a method the server takes its best.
export async function explain(file, choice, signal) {
  const response = await request("explain" + query(choice), { method: "POST", body: file, signal }, file);
  return response.json();
}

export function query(choice) {
  const given = Object.entries(choice).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return given.length ? "?" + new URLSearchParams(given) : "";
}

async function request(path, options, file = null) {
  const headers = { "Content-Type": file ? file.type || "application/octet-stream" : "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(unreachable(file));
  }
  if (response.ok) return response;
  const reason = await response.json().then((body) => String(body.error || ""), () => "");
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  throw new Problem(words(response.status, reason, file, retryAfter), { status: response.status, retryAfter });
}

function unreachable(file) {
  const large = file && file.size > 2 ** 23 ? `, or it did not want to take the ${size(file)} of ${file.name}` : "";
  return `The server can't be reached${large}. Is it still running?`;
}

function words(status, reason, file, retryAfter) {
  const because = reason ? `: ${reason}.` : ".";
  const name = file ? file.name : "the request";
  if (status === 401) return key ? "The server does not know this API key." : "The server asks for an API key.";
  if (status === 403) return `The server refuses this page${because}`;
  if (status === 408) return `Sending ${name} took too long${because}`;
  if (status === 413) return `${name}${file ? ` (${size(file)})` : ""} is larger than the server takes${because}`;
  if (status === 503 || status === 429) {
    const wait = retryAfter ? ` It asks to wait ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}.` : "";
    return `The server can't do it now${because}${wait}`;
  }
  if (status >= 500) return `The server failed (${status})${because}`;
  return `The server could not use ${name} (${status})${because}`;
}

// Server-Timing has read, decode, queue, compute and total; reading is the upload, and so the network's.
function split(total, header) {
  const server = {};
  for (const [, name, duration] of header.matchAll(/([a-z]+);dur=([0-9.]+)/g)) server[name] = Number(duration);
  if (server.total === undefined) return { total };
  const { read = 0, decode = 0, queue = 0, compute = 0 } = server;
  const rest = Math.max(0, server.total - read - decode - queue - compute);
  return { decode, queue, model: compute, rest, network: Math.max(0, total - server.total + read), total };
}

export function size(file) {
  if (file.size < 1000) return `${file.size} bytes`;
  return file.size < 1e6 ? `${Math.round(file.size / 1000)} kB` : `${(file.size / 1e6).toFixed(1)} MB`;
}
