// The loss curves of the run, drawn as SVG.

const WIDTH = 272;
const HEIGHT = 150;
const LEFT = 26;
const BOTTOM = 18;

/** Draws the curves `loss` and `eval_loss`, lists of [step, loss], and says in words what they show. */
export function drawLoss(run, picture, words) {
  const points = [...run.loss, ...run.eval_loss];
  if (!points.length) {
    words.textContent = "This run kept no losses.";
    return;
  }
  const steps = points.map(([step]) => step);
  const losses = points.map(([, loss]) => loss);
  const x = scale(Math.min(...steps), Math.max(...steps), LEFT, WIDTH - 2);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const y = scale(low, high, HEIGHT - BOTTOM, 6);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  for (const loss of ticks(low, high)) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(loss), y2: y(loss) }));
    svg.append(label(loss.toFixed(1), LEFT - 6, y(loss) + 3, "end"));
  }
  const last = Math.max(...steps);
  svg.append(label("0", LEFT, HEIGHT - 4, "start"), label(`step ${last}`, WIDTH, HEIGHT - 4, "end"));
  for (const name of ["loss", "eval_loss"]) {
    const line = run[name].map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`);
    svg.append(element("polyline", { class: name, points: line.join(" ") }));
  }
  const end = (curve) => curve.at(-1)?.[1].toFixed(2);
  const heldOut = run.eval_loss.length ? `, held out (dashed) ${end(run.eval_loss)}` : "";
  words.textContent = `Nats a token: training ${end(run.loss) ?? "unknown"}${heldOut}.`;
  svg.setAttribute("aria-label", `Loss over ${last} steps. ${words.textContent}`);
  picture.replaceChildren(svg);
}

function scale(from, to, start, end) {
  return (value) => start + ((value - from) / (to - from || 1)) * (end - start);
}

/** Round values from low to high, about four. */
function ticks(low, high) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10].find((size) => (high - low) / size <= 5) ?? 20;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

function label(words, x, y, anchor) {
  const text = element("text", { x, y, "text-anchor": anchor });
  text.textContent = words;
  return text;
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
