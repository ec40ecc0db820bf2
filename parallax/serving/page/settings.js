// The sampling settings: a slider and a number for each, which always agree.

const SETTINGS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8 },
  { name: "top_k", label: "Top-k (0 is off)", min: 0, max: 100, step: 1, value: 0 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, value: 1 },
  { name: "min_p", label: "Min-p", min: 0, max: 0.99, step: 0.01, value: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 500, step: 1, value: 200 },
  { name: "seed", label: "Seed", min: 0, max: 1000, step: 1, value: 1 },
];

/** Builds the controls inside `parent`. */
export function buildSettings(parent) {
  parent.replaceChildren(...SETTINGS.map(buildOne));
}

/** The settings as they stand, as a request names them. */
export function readSettings() {
  return Object.fromEntries(SETTINGS.map(({ name }) => [name, document.getElementById(name).valueAsNumber]));
}

/** Keeps max tokens within what the server takes. */
export function limitTokens(most) {
  for (const id of ["max_tokens", "max_tokens-number"]) {
    const input = document.getElementById(id);
    input.max = Math.min(most, 500);
    input.value = Math.min(input.valueAsNumber, input.max);
  }
}

function buildOne({ name, label, ...range }) {
  const row = document.createElement("div");
  row.className = "setting";
  const words = document.createElement("label");
  words.htmlFor = name;
  words.textContent = label;
  const slider = input("range", name, range);
  const number = input("number", `${name}-number`, range);
  number.setAttribute("aria-label", `${label}, exactly`);
  slider.addEventListener("input", () => (number.value = slider.value));
  number.addEventListener("change", () => {
    if (!Number.isNaN(number.valueAsNumber)) slider.value = number.value;
    number.value = slider.value; // what the slider cannot show is not sent either
  });
  row.append(words, number, slider);
  return row;
}

function input(type, id, range) {
  const made = document.createElement("input");
  Object.assign(made, { type, id, autocomplete: "off" }, range);
  return made;
}
