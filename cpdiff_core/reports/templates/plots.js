// Plots as SVG, drawn anew at every width so that letters keep their size. Nothing is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";
const REACH = 22; // a finger finds a mark within this many pixels: a target of 44

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const polygon = (corners) => `M${corners.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L")}Z`;
const around = (num, turn, radius) =>
  polygon([...Array(num).keys()].map((i) => {
    const angle = (2 * Math.PI * i) / num + turn;
    const r = typeof radius === "function" ? radius(i) : radius;
    return [r * Math.sin(angle), -r * Math.cos(angle)];
  }));
const SHAPES = {
  circle: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  square: (r) => around(4, Math.PI / 4, 1.2 * r),
  diamond: (r) => around(4, 0, 1.3 * r),
  triangle: (r) => around(3, 0, 1.3 * r),
  down: (r) => around(3, Math.PI, 1.3 * r),
  hexagon: (r) => around(6, 0, 1.15 * r),
  star: (r) => around(10, 0, (i) => (i % 2 ? 0.62 * r : 1.45 * r)),
  plus: (r) => `M${-r} 0H${r}M0 ${-r}V${r}`,
  cross: (r) => `M${-r} ${-r}L${r} ${r}M${-r} ${r}L${r} ${-r}`,
};

function mark(series, x, y, size = 5) {
  const open = series.shape === "plus" || series.shape === "cross";
  const path = svg("path", { d: SHAPES[series.shape](size * (series.size || 1)), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  path.setAttribute("class", `mark${series.hollow || open ? " hollow" : ""}`);
  path.style.setProperty("--c", `var(--c${series.colour})`);
  return path;
}

function niceTicks(low, high, num) {
  const rough = (high - low) / num;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

// Linear, unless values span so much that the near ones would fall together: then linear below 1 and logarithmic above.
function makeScale(values, from, to, { zero = false, log = false, num = 5 } = {}) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) { // plain logarithm, for what is never 0
    low = Math.max(low, 1e-12);
    const [a, b] = [Math.log10(low), Math.log10(Math.max(high, low * 1.01))];
    const pad = 0.05 * (b - a);
    const at = (v) => from + ((Math.log10(Math.max(v, low)) - a + pad) / (b - a + 2 * pad)) * (to - from);
    const ticks = b - a < 1 ? niceTicks(low, high, 3) : [];
    if (!ticks.length) for (let e = Math.floor(a); e <= Math.ceil(b); e++) for (const m of b - a < 2 ? [1, 2, 5] : [1]) {
      const v = m * 10 ** e;
      if (v >= low * 0.999 && v <= high * 1.001) ticks.push(v);
    }
    return { at, ticks, broken: false };
  }
  if (zero) low = Math.min(low, 0);
  if (low === high) [low, high] = [low - 1, high + 1];
  const broken = zero && low >= 0 && high > 12;
  const bend = (v) => (broken && v > 1 ? 1 + Math.log(v) : v);
  const [a, b] = [bend(low), bend(high)];
  const pad = 0.05 * (b - a);
  const at = (v) => from + ((bend(v) - a + pad) / (b - a + 2 * pad)) * (to - from);
  const decades = [0, 1, 10, 100, 1000, 10000, 100000, 3, 30, 300, 3000, 30000].filter((v) => v <= high * 1.001);
  let ticks = broken ? decades : niceTicks(low, high, num);
  if (broken) ticks = [1, ...ticks.filter((v) => v !== 1)].reduce((kept, v) => {
    const room = (a) => Math.abs(at(v) - at(a)) > 14 + 3.5 * (digits(v).length + digits(a).length);
    return kept.every(room) ? [...kept, v] : kept;
  }, []);
  return { at, ticks, broken };
}

const digits = (v, n = 3) => (v === 0 ? "0" : Math.abs(v) >= 10000 ? `${parseFloat((v / 1000).toPrecision(n))}k` : String(parseFloat(v.toPrecision(n))));

function frame(root, width, height, margin, x, y) {
  const right = width - margin.right, bottom = height - margin.bottom;
  for (const tick of y.ticks) {
    const at = y.at(tick).toFixed(1);
    root.append(svg("line", { x1: margin.left, x2: right, y1: at, y2: at, class: "gridline" }));
    root.append(svg("text", { x: margin.left - 8, y: at, class: "axis", "text-anchor": "end", dy: "0.35em" }, digits(tick)));
  }
  for (const tick of x.ticks) {
    const at = x.at(tick).toFixed(1);
    root.append(svg("line", { x1: at, x2: at, y1: bottom, y2: bottom + 4, class: "tick" }));
    root.append(svg("text", { x: at, y: bottom + 18, class: "axis", "text-anchor": "middle" }, digits(tick)));
  }
}

// A plot of marks that tells of the one under the pointer and picks the one that is clicked, or reached by arrow keys.
class Scatter {
  constructor(box, name, tell, pick) {
    this.box = box;
    this.tell = tell;
    this.pick = pick;
    this.marks = [];
    this.cursor = -1;
    this.root = svg("svg", { tabindex: 0, role: "application", "aria-roledescription": "scatter plot", "aria-label": name });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.heard = document.createElement("div");
    this.heard.className = "visually-hidden";
    this.heard.setAttribute("aria-live", "polite");
    box.replaceChildren(this.root, this.tip, this.heard);
    this.root.addEventListener("pointermove", (event) => this.show(this.nearest(event)));
    this.root.addEventListener("pointerleave", () => this.show(null));
    this.root.addEventListener("blur", () => this.show(null));
    this.root.addEventListener("click", (event) => {
      const found = this.nearest(event);
      if (found) this.show(found);
      this.pick(found && found.id);
    });
    this.root.addEventListener("keydown", (event) => this.key(event));
  }

  size(ratio, lowest, highest) {
    const width = Math.max(240, this.box.clientWidth);
    const height = Math.round(Math.min(highest, Math.max(lowest, ratio * width)));
    this.root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.root.setAttribute("height", height);
    this.root.replaceChildren();
    this.marks = [];
    return [width, height];
  }

  add(series, x, y, id, options = {}) {
    const path = mark(series, x, y);
    if (id !== null) path.dataset.vector = id;
    if (options.chosen) this.root.append(svg("circle", { cx: x, cy: y, r: 12, class: "ring chosen" }));
    this.root.append(path);
    if (options.picked) this.root.append(svg("circle", { cx: x, cy: y, r: 15, class: "ring picked-ring" }));
    if (id !== null) this.marks.push({ x, y, id });
  }

  nearest(event) {
    const area = this.root.getBoundingClientRect();
    const scale = this.root.viewBox.baseVal.width / area.width;
    const [x, y] = [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
    let best = null, least = REACH;
    for (const one of this.marks) {
      const far = Math.hypot(one.x - x, one.y - y);
      if (far <= least) [best, least] = [one, far];
    }
    return best;
  }

  show(one) {
    this.tip.hidden = !one;
    if (!one) return;
    this.tip.textContent = this.tell(one.id).join("\n");
    const room = this.box.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(room, one.x - this.tip.offsetWidth / 2))}px`;
    const above = one.y - this.tip.offsetHeight - 14;
    this.tip.style.top = `${above >= 0 ? above : one.y + 16}px`;
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const order = [...this.marks].sort((a, b) => a.x - b.x);
    if (step && order.length) {
      this.cursor = (this.cursor + step + order.length) % order.length;
      this.show(order[this.cursor]);
      this.heard.textContent = this.tell(order[this.cursor].id).join(", ");
    } else if ((event.key === "Enter" || event.key === " ") && order[this.cursor]) this.pick(order[this.cursor].id);
    else if (event.key === "Escape") this.show(null);
    else return;
    event.preventDefault();
  }
}
