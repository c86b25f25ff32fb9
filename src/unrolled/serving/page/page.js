// The one page. A text is read once: each model keeps a session, which is sent only what was typed since.

const at = (id) => document.getElementById(id);
const K = 10, HOTTEST_BITS = 16, LONGEST_TYPED = 300;
let models = [], readers = [], token = sessionStorage.getItem("token") || "";

// ------------------------------------------------------------------------------------------------ asking the server

class Gone extends Error {}

async function ask(method, path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    at("login").hidden = false;
    at("main").hidden = true;
    throw new Error(token ? "That is not the token." : "");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    const error = new Error(answer?.error?.message || `The server answered ${response.status}.`);
    error.status = response.status;
    throw error;
  }
  problem("");
  return response;
}

const get = async (path) => (await ask("GET", path)).json();
const post = async (path, body) => (await ask("POST", path, body)).json();

let waiting = 0;
function problem(text, gone = false) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
  clearTimeout(waiting);
  if (gone) waiting = setTimeout(() => get("healthz").then(refresh, failed), 1000);
}

function failed(error) {
  if (error.name !== "AbortError") problem(error.message, error instanceof Gone);
}

// ------------------------------------------------------------------------------------------------ small pieces of page

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.00095 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const SIGNS = new Map([["\n", "⏎"], [" ", "␣"], ["\t", "⇥"], ["<eos>", "⏎"], ["", "·"]]);
const visible = (piece) => SIGNS.get(piece) ?? piece;

// ------------------------------------------------------------------------------------------------ a model reads the text

class Reader {
  constructor(model) {
    this.model = model;
    const of = readers.length || at("other").value ? [make("p", { class: "of" }, model.name)] : [];
    const titled = (...rest) => make("div", {}, ...of.map((node) => node.cloneNode(true)), ...rest);
    this.list = make("ol", { class: "words", "aria-label": `likeliest next, by ${model.name}` });
    this.heat = make("div", { class: "heat", role: "group", tabindex: 0, "aria-label": `surprisal, by ${model.name}` });
    this.sum = make("p", { class: "sum" });
    this.out = make("div", { class: "out", tabindex: 0, "aria-label": `written by ${model.name}` });
    this.done = make("p", { class: "sum" });
    this.take = make("button", { type: "button", hidden: "", onclick: () => replace(this.continued) }, "Take as your text");
    at("words").append(titled(this.list));
    at("heat").append(titled(this.heat, this.sum));
    at("texts").append(titled(this.out, this.done, this.take));
    this.forget();
  }

  forget() {
    Object.assign(this, { session: "", text: "", tokens: [], words: [], typed: "", of: null });
  }

  // Ends the session.
  leave() {
    if (this.session) ask("DELETE", `sessions/${this.session}`).catch(() => {});
    this.forget();
  }

  // What is read, and what is still being typed.
  split(text) {
    if (this.model.tokens !== "word") return [text, ""];
    const typed = text.match(/(?:[^\s\x1c-\x1f\x85]|\ufeff)*$/)[0]; // white space is what the server takes for it
    return [text.slice(0, text.length - typed.length), typed];
  }

  async read(text, anew = false) {
    const [whole, typed] = this.split(text);
    const grows = this.session && whole.startsWith(this.text) && (this.model.tokens !== "bpe" || whole === this.text);
    if (!grows) {
      this.leave();
      this.keep(await post("sessions", { model: this.model.name, text: whole, k: typed ? 0 : K }), whole);
    }
    if (grows || typed) {
      const more = { text: whole.slice(this.text.length), k: K, typed: typed.slice(0, LONGEST_TYPED) };
      const answer = await post(`sessions/${this.session}`, more).catch((error) => {
        if (error.status !== 404 || anew) throw error;
      });
      if (!anew && answer?.tokens !== this.tokens.length + answer?.read.length) {
        this.leave(); // it has expired, or an answer of it was lost: once more from the beginning
        return this.read(text, true);
      }
      this.keep(answer, whole);
    }
    if (!readers.includes(this)) this.leave(); // another model was chosen in the meantime
    this.typed = typed;
    this.of = text; // what the suggestions are for
    this.show();
  }

  keep(answer, whole) {
    this.session = answer.session;
    this.text = whole;
    for (const one of answer.read) this.tokens.push(one); // they may be more than a call takes arguments
    this.words = answer.words;
  }

  show() {
    const rows = this.words.map(({ word, probability }) => {
      const label = `${visible(word)}, ${percent(probability)}`;
      const button = make("button", { type: "button", "aria-label": label, onclick: () => accept(this, word) });
      button.style.setProperty("--share", `${100 * probability}%`);
      button.append(make("span", {}, visible(word)), make("span", { class: "share" }, percent(probability)));
      return make("li", {}, button);
    });
    if (!rows.length) rows.push(make("li", { class: "hint" }, `No word of this model begins with “${this.typed}”.`));
    this.list.replaceChildren(...rows);
    this.colour();
  }

  colour() {
    const spaced = this.model.tokens === "word" ? " " : "";
    let bits = 0;
    const shown = this.heat.childElementCount > 0 && this.coloured <= this.tokens.length && this.session === this.shown ? this.coloured : 0;
    if (!shown) this.heat.replaceChildren();
    this.tokens.forEach(({ token, text: piece, surprisal_bits }, place) => {
      const surprisal = surprisal_bits ?? Infinity;
      bits += surprisal;
      if (place < shown) return;
      const ends = token === "<eos>" || token === "\n";
      const unknown = token === "<unk>" && piece.trim() !== token;
      const text = ends ? "⏎" : unknown ? piece.trim() : token;
      const number = Number.isFinite(surprisal) ? surprisal.toFixed(1) : "∞";
      const chance = Number.isFinite(surprisal) ? percent(2 ** -surprisal) : "0";
      const title = `${visible(text)}${unknown ? ", a word that the model does not know" : ""}: ${number} bits, probability ${chance}`;
      const kind = ends ? "token end" : unknown ? "token unknown" : "token";
      const element = make("span", { class: kind, title }, text, make("sub", {}, number));
      element.style.setProperty("--hot", (0.85 * Math.min(surprisal, HOTTEST_BITS)) / HOTTEST_BITS);
      this.heat.append(element, ends ? "\n" : spaced);
    });
    this.coloured = this.tokens.length;
    this.shown = this.session;
    const count = this.tokens.length;
    const unknown = this.tokens.filter(({ token }) => token === "<unk>").length;
    const figures = count ? [`${count} tokens`, `${bits.toFixed(1)} bits`, `perplexity ${(2 ** (bits / count)).toFixed(1)}`] : [];
    if (unknown) figures.push(`${unknown} unknown`);
    if (this.typed) figures.push(`“${this.typed}” not yet`);
    this.sum.textContent = figures.join(", ");
    const { selectionEnd, value } = at("text");
    if (selectionEnd === value.length) this.heat.scrollTop = this.heat.scrollHeight;
  }

  async write(options, signal) {
    const prompt = at("text").value;
    this.out.replaceChildren(make("span", { class: "prompt" }, prompt));
    this.take.hidden = true;
    this.done.textContent = "";
    const written = document.createTextNode("");
    this.out.append(written);
    const [, typed] = this.split(prompt);
    if (typed && this.of === prompt && !this.words.some(({ word }) => word === typed)) {
      this.done.textContent = `“${typed}” is no word of this model, which reads it as <unk>.`;
    }
    this.continued = prompt;
    let waiting = 0;
    const show = () => {
      waiting = 0;
      written.data = this.continued.slice(prompt.length);
      this.out.scrollTop = this.out.scrollHeight;
    };
    try {
      const body = { ...options, model: this.model.name, prompt, stream: true };
      const response = await ask("POST", "generate", body, signal);
      for await (const { event, data } of events(response.body)) {
        if (event === "error") throw new Error(data.error.message);
        if (event === "done") {
          show();
          this.done.textContent = `${data.texts[0].tokens} tokens, seed ${data.seed}`;
        } else {
          const parted = this.model.tokens === "word" && /\s$/.test(this.continued); // words bring their own space
          this.continued += parted ? data.text.replace(/^ /, "") : data.text;
          waiting ||= requestAnimationFrame(show); // not at every token: laying out a long text leaves no time for Stop
        }
      }
    } catch (error) {
      if (signal.aborted) this.done.textContent = "stopped";
      else throw error instanceof TypeError ? new Gone("The server does not answer. Is it still running?") : error;
    } finally {
      cancelAnimationFrame(waiting);
      if (written.isConnected) show(); // else another text is being written there
      this.take.hidden = options.detokenize || this.continued === prompt; // what people write is not what it reads
    }
  }
}

async function* events(body) {
  let rest = "";
  const lines = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await lines.read(); !part.done; part = await lines.read()) {
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      yield { event: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

// ------------------------------------------------------------------------------------------------ typing

let reading = null, again = false, typedAt = 0, tabLeaves = false;

// Reads the text as it is now; whoever waits for it has the suggestions for it.
function refresh() {
  again = true;
  reading ??= readAll().finally(() => (reading = null));
  return reading;
}

async function readAll() {
  while (again) {
    again = false;
    const since = typedAt, results = await Promise.allSettled(readers.map((reader) => reader.read(at("text").value)));
    results.filter((result) => result.reason).forEach((result) => failed(result.reason));
    if (since) performance.measure("suggestions", { start: since, end: performance.now() });
    if (since === typedAt) typedAt = 0;
  }
}

// As if it were typed, so that it can be undone.
function replace(text) {
  const field = at("text"), old = field.value;
  let same = 0;
  while (same < Math.min(old.length, text.length) && old[same] === text[same]) same += 1;
  field.focus();
  field.setSelectionRange(same, old.length);
  if (text === old) return; // with nothing selected, "delete" takes a character
  document.execCommand(text.length > same ? "insertText" : "delete", false, text.slice(same));
}

function accept(reader, word) {
  const text = at("text").value;
  if (reader.of !== text) return; // the suggestions are for another text
  if (["byte", "bpe"].includes(reader.model.tokens) && word.includes("\ufffd")) return (at("said").textContent = "that is a part of a character");
  at("said").textContent = `took ${visible(word)}`;
  if (reader.model.tokens !== "word") return replace(text + word);
  const [whole] = reader.split(text);
  replace(word === "<eos>" ? `${whole.replace(/[^\S\n]+$/, "")}\n` : `${whole}${word} `);
}

at("text").addEventListener("input", () => {
  typedAt = performance.now();
  tabLeaves = false;
  refresh();
});

at("text").addEventListener("keydown", (event) => {
  const { value, selectionEnd } = at("text");
  if (event.key === "Escape") {
    tabLeaves = true;
    at("said").textContent = "Tab leaves the field now";
  } else if (event.key === "Tab" && !event.shiftKey && !tabLeaves && selectionEnd === value.length) {
    event.preventDefault();
    const [reader] = readers;
    refresh().then(() => at("text").value === value && reader.words.length && accept(reader, reader.words[0].word));
  }
});

at("numbers").addEventListener("change", showNumbers);

function showNumbers() {
  readers.forEach((reader) => reader.heat.classList.toggle("numbers", at("numbers").checked));
}

// ------------------------------------------------------------------------------------------------ writing on

let stopping = null;

at("writing").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopping?.abort();
  const mine = (stopping = new AbortController());
  const options = { detokenize: at("detokenize").checked };
  for (const field of ["length", "temperature", "top_p", "seed"]) {
    if (at(field).value !== "") options[field] = Number(at(field).value);
  }
  at("stop").disabled = false;
  const results = await Promise.allSettled(readers.map((reader) => reader.write(options, mine.signal)));
  results.filter((result) => result.reason).forEach((result) => failed(result.reason));
  if (stopping === mine) at("stop").disabled = true;
});

at("stop").addEventListener("click", () => stopping?.abort());

// ------------------------------------------------------------------------------------------------ map and curves

const SIZE = { width: 1000, height: 640, edge: 30 };

async function showMap() {
  if (!at("map").open) return;
  const name = at("model").value, count = at("count").value;
  at("near").textContent = "…";
  const { tokens, places } = await get(`models/${encodeURIComponent(name)}/map?words=${count}`);
  if (name !== at("model").value || count !== at("count").value) return;
  at("near").textContent = readers.length > 1 ? `of ${name}` : "";
  const [xs, ys] = [0, 1].map((axis) => places.map((place) => place[axis]));
  const scaled = (values, length) => {
    const low = Math.min(...values), high = Math.max(...values);
    return values.map((value) => SIZE.edge + ((value - low) / (high - low || 1)) * (length - 2 * SIZE.edge));
  };
  const [left, top] = [scaled(xs, SIZE.width), scaled(ys, SIZE.height)];
  const taken = [];
  const groups = tokens.map((token, place) => {
    const text = visible(token), box = [left[place] + 5, top[place] - 8, left[place] + 7 + 6.3 * text.length, top[place] + 4];
    const free = taken.every(([x1, y1, x2, y2]) => box[2] < x1 || x2 < box[0] || box[3] < y1 || y2 < box[1]);
    if (free) taken.push(box);
    const group = draw("g", { class: free ? "" : "unnamed", "data-word": token });
    group.append(draw("circle", { class: "dot", cx: left[place], cy: top[place], r: 3 }), draw("text", { x: left[place] + 5, y: top[place] + 4 }, text));
    group.addEventListener("click", () => find(token));
    return group;
  });
  const svg = draw("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", "aria-label": `${tokens.length} tokens of ${name} on a map` });
  svg.append(...groups);
  at("drawing").replaceChildren(svg);
  if (at("word").value.trim()) await find(at("word").value.trim());
}

function mark(words) {
  for (const group of at("drawing").querySelectorAll("g")) group.classList.toggle("found", words.includes(group.dataset.word));
}

async function find(word) {
  at("word").value = word;
  const answer = await post("embeddings", { model: at("model").value, words: [word], k: 8 });
  const { neighbours: near, error } = answer.embeddings[0];
  if (error) at("near").textContent = error;
  else at("near").textContent = near.map((other) => `${visible(other.word)} ${other.similarity.toFixed(2)}`).join(", ");
  mark([word, ...near.map((other) => other.word)]);
}

at("map").addEventListener("toggle", () => showMap().catch(failed));
at("count").addEventListener("change", () => showMap().catch(failed));
at("search").addEventListener("submit", (event) => {
  event.preventDefault();
  find(at("word").value.trim()).catch((error) => (error.status ? (at("near").textContent = error.message) : failed(error)));
});
at("word").addEventListener("input", () => {
  const typed = at("word").value.trim();
  const found = [...at("drawing").querySelectorAll("g")].map((group) => group.dataset.word);
  mark(typed ? found.filter((word) => word.startsWith(typed)) : []);
});

async function showCurves() {
  if (!at("curves").open) return;
  const charts = await Promise.all(readers.map(({ model }) => get(`models/${encodeURIComponent(model.name)}/curves`)));
  at("charts").replaceChildren(...charts.map(chart));
}

function chart({ model, epochs }) {
  const width = 560, height = 300, edge = 48;
  const kinds = ["train", "valid"], value = (epoch, kind) => epoch[`${kind}_perplexity`];
  const known = epochs.flatMap((epoch) => kinds.map((kind) => value(epoch, kind))).filter((number) => number > 0);
  const box = make("div", {}, make("p", { class: "of" }, `${model}: perplexity by epoch`));
  if (!known.length) {
    box.append(make("p", {}, "No epoch was recorded."));
    return box;
  }
  const [low, high] = [Math.log(Math.min(...known)), Math.log(Math.max(...known))];
  const x = (place) => edge + (place / Math.max(epochs.length - 1, 1)) * (width - 2 * edge);
  const y = (number) => height - 30 - ((Math.log(number) - low) / (high - low || 1)) * (height - 60);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `perplexity by epoch of ${model}` });
  const ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].filter((tick) => Math.log(tick) >= low - 0.01 && Math.log(tick) <= high + 0.01);
  for (const tick of ticks) {
    svg.append(draw("line", { class: "axis", x1: edge, x2: width - edge, y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { x: edge - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const place of new Set([0, Math.floor((epochs.length - 1) / 2), epochs.length - 1])) {
    svg.append(draw("text", { x: x(place), y: height - 8, "text-anchor": "middle" }, String(epochs[place].epoch)));
  }
  for (const kind of kinds) {
    const points = epochs.map((epoch, place) => [x(place), value(epoch, kind)]).filter(([, number]) => number > 0);
    svg.append(draw("polyline", { class: kind, points: points.map(([left, number]) => `${left},${y(number)}`).join(" ") }));
    const last = points.at(-1);
    if (last) svg.append(draw("text", { class: kind, x: last[0] + 4, y: y(last[1]) + 4 }, kind));
  }
  const figure = (number) => (number === null ? "–" : number.toFixed(2));
  const said = (epoch) => `${epoch.epoch}: train ${figure(epoch.train_perplexity)}, valid ${figure(epoch.valid_perplexity)}`;
  const best = epochs.reduce((one, other) => ((other.valid_perplexity ?? Infinity) < (one.valid_perplexity ?? Infinity) ? other : one));
  const last = best === epochs.at(-1) ? "" : `; last epoch ${said(epochs.at(-1))}`;
  box.append(svg, make("p", { class: "sum" }, `best epoch, which answers here, ${said(best)}${last}`));
  return box;
}

at("curves").addEventListener("toggle", () => showCurves().catch(failed));

// ------------------------------------------------------------------------------------------------ choosing models

function choose() {
  for (const place of ["words", "heat", "texts", "drawing"]) at(place).replaceChildren();
  for (const option of at("other").options) option.disabled = option.value === at("model").value && option.value !== "";
  if (at("other").selectedOptions[0]?.disabled) at("other").value = "";
  const names = [at("model").value, at("other").value].filter((name, place, all) => name && all.indexOf(name) === place);
  readers.forEach((reader) => reader.leave());
  readers = [];
  for (const name of names) readers.push(new Reader(models.find((model) => model.name === name)));
  showNumbers();
  refresh();
  showMap().catch(failed);
  showCurves().catch(failed);
}

async function begin() {
  ({ models } = await get("models"));
  at("login").hidden = true;
  at("main").hidden = false;
  const options = () => models.map(({ name, test_perplexity }) => {
    const figure = test_perplexity ? `, perplexity ${test_perplexity.toFixed(1)}` : "";
    return make("option", { value: name }, name + figure);
  });
  at("model").replaceChildren(...options());
  at("other").replaceChildren(make("option", { value: "" }, "none"), ...options());
  choose();
}

at("model").addEventListener("change", choose);
at("other").addEventListener("change", choose);
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value;
  sessionStorage.setItem("token", token);
  begin().catch(failed);
});
addEventListener("pagehide", () => readers.forEach((reader) => reader.session && fetch(`sessions/${reader.session}`, { method: "DELETE", keepalive: true, headers: token ? { Authorization: `Bearer ${token}` } : {} })));
begin().catch(failed);
