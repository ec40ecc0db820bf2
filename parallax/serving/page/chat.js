// The chat: turns that answer each other. Invariant: what is shown is `messages`, and a request sends all of them.

import { chat } from "./server.js";
import { readSettings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const NAMES = { user: "You", assistant: "Model" };

export class ChatView {
  #run = null;
  #messages = []; // of the user and the assistant by turns; the system prompt stands apart
  #stream = null; // the AbortController of the answer under way
  #attempts = 0; // answers to the same turn, each with a seed of its own

  constructor() {
    $("say").addEventListener("submit", (event) => {
      event.preventDefault();
      const content = $("message").value.trim();
      if (!content || !this.#run || this.#stream) return;
      $("message").value = "";
      this.#messages.push({ role: "user", content });
      this.#answer();
    });
    $("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("say").requestSubmit();
    });
    $("chat").addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    $("halt").addEventListener("click", () => this.stop());
    $("again").addEventListener("click", () => {
      if (this.#messages.at(-1)?.role === "assistant") this.#messages.pop();
      this.#answer(this.#attempts + 1);
    });
    $("fresh").addEventListener("click", () => {
      this.stop();
      this.#messages = [];
      this.#show();
      this.#say("");
      $("message").focus();
    });
    this.#show();
  }

  /** Talks to this run, as /run describes it. */
  open(run) {
    this.#run = run;
    this.#show();
  }

  /** Ends the answer under way; what there is of it stays. */
  stop() {
    if (!this.#stream) return;
    this.#stream.abort();
    this.#breakOff("stopped");
  }

  #breakOff(words, isError = false) {
    if (!this.#messages.at(-1).content) this.#messages.pop();
    this.#end(words, isError);
  }

  #end(words, isError = false) {
    this.#stream = null;
    this.#show();
    this.#say(words, isError);
  }

  /** Asks for an answer to the turns as they stand. */
  async #answer(attempt = 0) {
    const mine = (this.#stream = new AbortController());
    this.#attempts = attempt;
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#messages];
    const { seed, ...settings } = readSettings();
    const answer = { role: "assistant", content: "" };
    this.#messages.push(answer);
    this.#show();
    this.#say("…");
    try {
      const request = { model: this.#run.model, messages, ...settings, seed: seed + attempt };
      for await (const { delta } of chat(request, mine.signal)) {
        if (this.#stream !== mine) return;
        answer.content += delta.content ?? "";
        $("turns").lastElementChild.querySelector(".said").textContent = answer.content;
      }
      this.#end("done");
    } catch (error) {
      if (this.#stream === mine) this.#breakOff(error.message, true); // else `stop` did
    }
  }

  #show() {
    $("turns").replaceChildren(...this.#messages.map((message, index) => this.#turn(message, index)));
    $("send").disabled = !this.#run || Boolean(this.#stream);
    $("halt").disabled = !this.#stream;
    $("again").disabled = Boolean(this.#stream) || !this.#messages.length;
    $("fresh").disabled = !this.#messages.length;
  }

  #turn({ role, content }, index) {
    const turn = element("li", `turn ${role}`);
    turn.append(element("p", "who", NAMES[role]), element("div", "said", content));
    if (role === "user") {
      const edit = element("button", "edit", "Edit");
      edit.type = "button";
      edit.setAttribute("aria-label", `Edit turn ${index + 1}`);
      edit.addEventListener("click", () => this.#edit(index));
      turn.firstElementChild.append(edit);
    }
    return turn;
  }

  /** Lets a turn be written again; all that came after it goes. */
  #edit(index) {
    this.stop();
    const turn = $("turns").children[index];
    const form = element("form", "editor");
    const text = element("textarea", "");
    const bar = element("div", "bar");
    const save = element("button", "primary", "Send again");
    const cancel = element("button", "cancel", "Cancel");
    text.value = this.#messages[index].content;
    text.rows = 3;
    text.setAttribute("aria-label", `Turn ${index + 1}`);
    cancel.type = "button";
    bar.append(save, cancel);
    form.append(text, bar);
    turn.replaceChildren(form);
    text.focus();
    cancel.addEventListener("click", () => this.#show());
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#show();
      else if (event.key === "Enter" && !event.shiftKey && event.target === text) form.requestSubmit();
      else return;
      event.preventDefault();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!text.value.trim()) return;
      this.#messages = [...this.#messages.slice(0, index), { role: "user", content: text.value.trim() }];
      this.#answer();
      $("message").focus();
    });
  }

  #say(words, isError = false) {
    $("chat-status").textContent = words;
    $("chat-status").classList.toggle("error", isError);
  }
}

function element(kind, className, words = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = words;
  return made;
}
