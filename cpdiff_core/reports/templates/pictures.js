// Between two styles, and on the way to the weights, step by step.

function lineChart(root, width, height, lines, at, { xs, log, from, reference }) {
  const margin = { left: 56, right: 12, top: 10, bottom: 28 };
  const x = makeScale(xs, margin.left, width - margin.right, { num: Math.max(3, Math.round(width / 90)) });
  const ascending = from !== "right";
  const place = (v) => (ascending ? x.at(v) : margin.left + (width - margin.right) - x.at(v));
  const every = [...Object.values(lines).flat(), ...(reference ? [reference] : [])];
  const y = makeScale(every, height - margin.bottom, margin.top, { log, num: 4 });
  frame(root, width, height, margin, { at: place, ticks: x.ticks }, y);
  if (reference) root.append(svg("line", { x1: margin.left, x2: width - margin.right, y1: y.at(reference), y2: y.at(reference), class: "guide" }));
  Object.values(lines).forEach((values, i) => {
    const path = (num) => `M${values.slice(0, num).map((v, j) => `${place(xs[j]).toFixed(1)} ${y.at(v).toFixed(1)}`).join("L")}`;
    for (const [part, kind] of [[values.length, "line faint"], [at + 1, "line"]]) {
      const line = svg("path", { d: path(part), class: kind });
      line.style.setProperty("--c", `var(--c${LINES[i % LINES.length].colour})`);
      root.append(line);
    }
    root.append(mark(LINES[i % LINES.length], place(xs[at]), y.at(values[at]), 4.5));
  });
}

const LINES = [
  { colour: 0, shape: "circle" }, { colour: 3, shape: "square" }, { colour: 4, shape: "triangle" }, { colour: 5, shape: "diamond" },
  { colour: 6, shape: "down" }, { colour: 8, shape: "hexagon" },
];

function legendOf(names) {
  return names.map((name, i) => {
    const item = document.createElement("span");
    item.style.cssText = "display:inline-flex;align-items:center;gap:.3rem;margin-right:1rem";
    item.append(svg("svg", { width: 18, height: 18, viewBox: "-9 -9 18 18", "aria-hidden": "true" }, mark(LINES[i % LINES.length], 0, 0, 5)), name);
    return item;
  });
}

function canvas(box, ratio, highest) {
  const width = Math.max(240, box.clientWidth);
  const height = Math.round(Math.min(highest, ratio * width));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  box.replaceChildren(root);
  return [root, width, height];
}

class Interpolation {
  constructor(data, section) {
    Object.assign(this, { data, section });
    this.kind = section.querySelector("select");
    this.slider = section.querySelector("input[type=range]");
    this.out = section.querySelector("output");
    this.slider.max = data.lambdas.length - 1;
    section.querySelector(".tools").hidden = false;
    for (const figure of section.querySelectorAll("[data-kind]")) figure.querySelector("div").className = "crop";
    for (const control of [this.kind, this.slider]) control.addEventListener("input", () => this.draw());
    section.querySelector(".lines-legend").replaceChildren(...legendOf(data.styles.map((style) => `distance to ${style}`)));
    new ResizeObserver(() => this.draw()).observe(section.querySelector(".plot"));
    for (const image of section.querySelectorAll("img")) image.addEventListener("load", () => this.draw());
  }

  draw() {
    const { data } = this, at = Number(this.slider.value), kind = this.kind.value, rows = data.lambdas.length;
    for (const figure of this.section.querySelectorAll("[data-kind]")) {
      figure.hidden = figure.dataset.kind !== kind;
      const image = figure.querySelector("img"), crop = figure.querySelector("div");
      if (figure.hidden || !image.naturalHeight) continue;
      const scale = image.clientWidth / image.naturalWidth;
      const row = ((image.naturalHeight + data.gap) / rows) * scale;
      crop.style.height = `${row - data.gap * scale}px`;
      image.style.translate = `0 ${-at * row}px`;
    }
    const far = data.styles.map((style) => `${digits(data.distance[kind][style][at])} to ${style}`).join(", ");
    this.out.textContent = `lambda ${data.lambdas[at]}: ${far}`;
    this.slider.setAttribute("aria-valuetext", this.out.textContent);
    const [root, width, height] = canvas(this.section.querySelector(".plot"), 0.45, 260);
    // In the order of the legend; an object puts a style called 2024 first.
    lineChart(root, width, height, data.styles.map((style) => data.distance[kind][style]), at, { xs: data.lambdas });
  }
}

class Trajectory {
  constructor(data, section) {
    Object.assign(this, { data, section });
    this.task = section.querySelector("select");
    this.slider = section.querySelector("input[type=range]");
    this.play = section.querySelector("button.play");
    this.out = section.querySelector("output");
    section.querySelector(".tools").hidden = false;
    section.querySelector(".stepper").hidden = false;
    this.play.hidden = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.task.addEventListener("change", () => this.draw());
    this.slider.addEventListener("input", () => { this.stop(); this.draw(); });
    this.play.addEventListener("click", () => (this.timer ? this.stop() : this.start()));
    this.slider.max = data[this.task.value].steps.length - 1;
    this.slider.value = this.slider.max;
    new ResizeObserver(() => this.draw()).observe(section.querySelector(".far"));
  }

  start() {
    if (this.slider.value === this.slider.max) this.slider.value = 0;
    this.play.textContent = "Stop";
    this.timer = setInterval(() => {
      this.slider.value = Number(this.slider.value) + 1;
      this.draw();
      if (this.slider.value === this.slider.max) this.stop();
    }, 160);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  draw() {
    const one = this.data[this.task.value];
    this.slider.max = one.steps.length - 1;
    const at = Math.min(Number(this.slider.value), one.steps.length - 1);
    const names = Object.keys(one.lines);
    const far = names.map((name) => `${name}: ${digits(one.lines[name][at])}`).join(", ");
    this.out.textContent = `step ${at} of ${one.steps.length - 1}, t = ${one.steps[at]}: ${far}`;
    this.slider.setAttribute("aria-valuetext", this.out.textContent);
    this.section.querySelector(".lines-legend").replaceChildren(...legendOf(names));
    const [root, width, height] = canvas(this.section.querySelector(".far"), 0.6, 320);
    lineChart(root, width, height, one.lines, at, { xs: one.steps, log: true, from: "right", reference: one.reference });
    const plane = this.section.querySelector(".plane");
    if (plane && one.paths) this.drawPlane(plane, one, at);
  }

  drawPlane(box, one, at) {
    const [root, width, height] = canvas(box, 0.6, 320);
    const every = [...one.originals, ...one.soup, ...one.paths.flat()];
    const x = makeScale(every.map((p) => p[0]), 12, width - 12);
    const y = makeScale(every.map((p) => p[1]), height - 12, 12);
    for (const [px, py] of one.originals) root.append(mark({ colour: 1, shape: "circle", hollow: true }, x.at(px), y.at(py), 3.5));
    for (const [px, py] of one.soup) root.append(mark({ colour: 2, shape: "cross" }, x.at(px), y.at(py), 6));
    one.paths.forEach((path, i) => {
      const style = LINES[i % LINES.length];
      for (const [part, kind] of [[path.length, "line faint"], [at + 1, "line"]]) {
        const line = svg("path", { d: `M${path.slice(0, part).map((p) => `${x.at(p[0]).toFixed(1)} ${y.at(p[1]).toFixed(1)}`).join("L")}`, class: kind });
        line.style.setProperty("--c", `var(--c${style.colour})`);
        root.append(line);
      }
      root.append(mark(style, x.at(path[at][0]), y.at(path[at][1]), 5));
    });
  }
}
