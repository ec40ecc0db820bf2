// The page: a prompt, its continuation as it streams, and the run behind it; or a chat, where the model has a template.

import { ChatView } from "./chat.js";
import { drawLoss } from "./loss.js";
import { complete, describeRun, setKey } from "./server.js";
import { buildSettings, limitTokens, readSettings } from "./settings.js";
import { TokenView } from "./tokens.js";

const ALTERNATIVES = 10;
const $ = (id) => document.getElementById(id);

const view = new TokenView($("text"), $("choices"), branch);
const talk = new ChatView();
const history = []; // the tokens before each branch
let run = null;
let stream = null; // the AbortController of the answer under way

buildSettings($("settings"));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  history.length = 0;
  stop();
  view.reset([]);
  go({ prompt: $("prompt").value, echo: true });
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", stop);
$("more").addEventListener("click", goOn);
$("back").addEventListener("click", () => {
  stop();
  view.reset(history.pop());
  showState();
});
$("modes").addEventListener("change", (event) => {
  stop();
  talk.stop();
  $("chat").hidden = event.target.value !== "chat";
  $("continue").hidden = event.target.value === "chat";
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  introduce();
});
introduce();

/** Goes on from tokens[index] replaced by an alternative. */
function branch(index, { id, spelling, text, p }) {
  stop();
  history.push([...view.tokens]);
  const { top } = view.tokens[index];
  view.reset([...view.tokens.slice(0, index), { id, spelling, text, p, top, kind: "chosen" }]);
  $("text").lastElementChild.focus();
  view.hide();
  goOn();
}

/** Goes on after the last token. */
function goOn() {
  go({ prompt: view.tokens.map((token) => token.id) });
}

function stop() {
  stream?.abort();
  stream = null;
}

async function go(request) {
  const mine = (stream = new AbortController());
  const settings = readSettings();
  // A text has at most as many tokens as bytes.
  const size = request.echo ? new TextEncoder().encode(request.prompt).length : request.prompt.length;
  const room = Math.max(run.capacity - size, 1);
  const asked = { ...request, ...settings, max_tokens: Math.min(settings.max_tokens, room) };
  say("…");
  showState();
  const meter = new Meter();
  try {
    const reader = new Reader();
    for await (const choice of complete({ model: run.model, logprobs: ALTERNATIVES, ...asked }, mine.signal)) {
      if (stream !== mine) return;
      meter.count(reader.take(choice));
      say(meter.words());
    }
    say(`${meter.words()}, done`);
  } catch (error) {
    if (mine.signal.aborted) {
      if (!stream) say(`${meter.words()}, stopped`);
    } else if (stream === mine) {
      say(error.message, true);
    }
  } finally {
    if (stream === mine) stream = null;
    showState();
  }
}

/** Turns the chunks of one answer into tokens of the view. */
class Reader {
  #characters = []; // offsets count characters, as the server does, not UTF-16 units
  #last = null; // {index in the view, offset} of the newest token, whose text may still grow

  /** Shows what a chunk holds; returns how many of its tokens were generated. */
  take({ text, logprobs }) {
    let generated = 0;
    this.#characters.push(...text);
    logprobs.tokens.forEach((spelling, i) => {
      const offset = logprobs.text_offset[i];
      this.#finish(offset);
      const logprob = logprobs.token_logprobs[i];
      const top = Object.entries(logprobs.top_logprobs[i] ?? {}).map(([name, value], rank) => {
        const id = logprobs.top_token_ids[i][rank];
        return { id, spelling: name, text: shown(name), p: Math.exp(value) };
      });
      const kind = offset < this.#promptEnd ? "prompt" : "";
      generated += kind ? 0 : 1;
      view.append({ id: logprobs.token_ids[i], spelling, text: "", p: logprob === null ? null : Math.exp(logprob), top, kind });
      this.#last = { index: view.tokens.length - 1, offset };
    });
    this.#finish(this.#characters.length);
    return generated;
  }

  #promptEnd = view.tokens.length ? 0 : [...$("prompt").value].length;

  #finish(end) {
    if (!this.#last) return;
    view.tokens[this.#last.index].text = this.#characters.slice(this.#last.offset, end).join("");
    view.update(this.#last.index);
  }
}

/** How many tokens came, and how fast after the first of them. */
class Meter {
  #tokens = 0;
  #began = 0;

  count(tokens) {
    if (tokens) this.#began ||= performance.now();
    this.#tokens += tokens;
  }

  words() {
    const seconds = (performance.now() - this.#began) / 1000;
    const speed = this.#tokens > 1 ? ` · ${Math.round((this.#tokens - 1) / seconds)} a second` : "";
    return `${this.#tokens} token${this.#tokens === 1 ? "" : "s"}${speed}`;
  }
}

/** The text of a token by itself; none for a part of a character and for the end of the text. */
function shown(spelling) {
  return spelling.startsWith("bytes:") || spelling === "<|endoftext|>" ? "" : spelling;
}

function say(words, isError = false) {
  $("status").textContent = words;
  $("status").classList.toggle("error", isError);
}

function showState() {
  $("go").disabled = !run;
  $("stop").disabled = !stream;
  $("more").disabled = Boolean(stream) || !view.tokens.length || view.tokens.length >= run.capacity;
  $("back").disabled = !history.length;
}

async function introduce() {
  try {
    run = await describeRun();
  } catch (error) {
    say(error.message, true);
  }
  $("unlock").hidden = Boolean(run);
  showState();
  if (!run) return;
  const size = `${(run.parameters / 1e6).toFixed(2)} M parameters`;
  $("model").textContent = `${run.model} · step ${run.step} · ${size} · ${run.tokenizer} tokens`;
  if (!$("prompt").value && run.config.run?.dataset === "tiny_shakespeare") $("prompt").value = "ROMEO:\n";
  $("modes").hidden = !run.chat;
  if (run.chat) talk.open(run);
  limitTokens(Math.min(run.max_tokens, run.capacity - 1));
  drawLoss(run, $("loss"), $("loss-words"));
  $("kept").hidden = !run.samples.length;
  $("samples").replaceChildren(...run.samples.flatMap(([prompt, text]) => [cell("dt", prompt), cell("dd", text)]));
  $("config").replaceChildren(...entries(run.config).flatMap(([name, value]) => [cell("dt", name), cell("dd", value)]));
}

/** A nested config as [name, value] pairs. */
function entries(config, prefix = "") {
  return Object.entries(config).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value)
      ? entries(value, `${prefix}${name}.`)
      : [[prefix + name, typeof value === "string" && value ? value : JSON.stringify(value)]],
  );
}

function cell(kind, words) {
  const element = document.createElement(kind);
  element.textContent = words;
  return element;
}
