// The text as tokens: coloured by probability, each with its alternatives. Invariant: the text shown is that of `tokens`,
// which hold all that a request to go on from any of them needs.

const MARKS = { "\n": "↵", "\t": "⇥", "": "·" };
const END = "<|endoftext|>";

export class TokenView {
  /** onBranch(index, alternative) is called when an alternative to tokens[index] is chosen. */
  constructor(text, choices, onBranch) {
    this.tokens = [];
    this.text = text;
    this.choices = choices;
    this.onBranch = onBranch;
    this.open = -1;
    text.addEventListener("mouseover", (event) => this.#show(this.#indexOf(event.target)));
    text.addEventListener("focusin", (event) => this.#show(this.#indexOf(event.target)));
    text.addEventListener("keydown", (event) => this.#walk(event));
    choices.addEventListener("keydown", (event) => this.#choose(event));
    window.addEventListener("resize", () => this.hide()); // the text moves away from under it
    const page = text.parentElement;
    page.addEventListener("mouseleave", () => page.contains(document.activeElement) || this.hide());
    page.addEventListener("focusout", (event) => page.contains(event.relatedTarget) || this.hide());
  }

  /** Shows these tokens in place of all others. */
  reset(tokens) {
    this.hide();
    this.tokens = [];
    this.text.replaceChildren();
    tokens.forEach((token) => this.append(token));
  }

  append(token) {
    const element = document.createElement("span");
    element.tabIndex = this.tokens.length ? -1 : 0; // one stop for Tab; arrow keys go on from there
    element.setAttribute("role", "button");
    this.tokens.push(token);
    this.text.append(element);
    this.update(this.tokens.length - 1);
  }

  /** Shows tokens[index] again. */
  update(index) {
    const token = this.tokens[index];
    const element = this.text.children[index];
    const isEnd = token.spelling === END;
    const mark = isEnd ? "∎" : MARKS[token.text];
    element.className = ["token", token.kind, mark && "mark"].filter(Boolean).join(" ");
    element.textContent = token.text;
    if (mark) element.dataset.mark = mark;
    else delete element.dataset.mark;
    element.style.setProperty("--p", token.p === null ? 1 : Math.sqrt(token.p));
    element.setAttribute("aria-label", `${name(token.spelling)}, ${percent(token.p)}`);
  }

  hide() {
    this.text.children[this.open]?.classList.remove("open");
    this.open = -1;
    this.choices.hidden = true;
  }

  #indexOf(element) {
    return [...this.text.children].indexOf(element);
  }

  #show(index) {
    if (index < 0 || index === this.open) return;
    this.hide();
    if (!this.tokens[index].top.length) return;
    this.open = index;
    this.text.children[index].classList.add("open");
    this.choices.replaceChildren(...this.tokens[index].top.map((other) => this.#button(index, other)));
    this.choices.hidden = false;
    this.#place(this.text.children[index]);
  }

  #button(index, other) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(part("spelling", name(other.spelling)), part("share", ""), part("percent", percent(other.p)));
    button.style.setProperty("--p", other.p);
    if (other.id === this.tokens[index].id) button.setAttribute("aria-current", "true");
    button.setAttribute("aria-label", `Go on with ${name(other.spelling)}, ${percent(other.p)}`);
    button.addEventListener("click", () => this.onBranch(index, other));
    return button;
  }

  /** Below the token, or above it where the window ends; never beyond the page's sides. */
  #place(element) {
    const page = this.text.parentElement.getBoundingClientRect();
    const rects = element.getClientRects();
    const token = rects[0] ?? element.getBoundingClientRect();
    const { width, height } = this.choices.getBoundingClientRect();
    const left = Math.min(Math.max(token.left - page.left - 8, 8), page.width - width - 10);
    const above = token.bottom + height > window.innerHeight && token.top > height;
    this.choices.style.left = `${left}px`;
    this.choices.style.top = `${above ? token.top - page.top - height - 2 : token.bottom - page.top}px`;
  }

  #walk(event) {
    const at = this.#indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: this.tokens.length - 1 }[event.key];
    if (to !== undefined && this.text.children[to]) {
      event.target.tabIndex = -1;
      this.text.children[to].tabIndex = 0;
      this.text.children[to].focus();
    } else if (["ArrowDown", "Enter", " "].includes(event.key)) {
      this.choices.querySelector("button")?.focus();
    } else if (event.key === "Escape") {
      this.hide();
    } else {
      return;
    }
    event.preventDefault();
  }

  #choose(event) {
    const to = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (to) (event.target[to] ?? this.text.children[this.open]).focus();
    else if (event.key === "Escape") this.text.children[this.open].focus();
    else return;
    event.preventDefault();
  }
}

function part(kind, words) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = words;
  return element;
}

function name(spelling) {
  const names = { "\n": "new line", "\t": "tab", " ": "space", [END]: "end of text" };
  return names[spelling] ?? spelling.replaceAll("\n", "↵").replaceAll(" ", "␣");
}

function percent(p) {
  if (p === null) return "given";
  return p < 0.0005 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`;
}
