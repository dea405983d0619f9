// Every vector: score against novelty, the map, and the table of candidates, which know each other's choice.

class Explorer {
  constructor(data, section) {
    this.data = data;
    this.section = section;
    this.off = new Set(data.series.map((series, i) => (series.off ? i : -1)).filter((i) => i >= 0));
    this.picked = null;
    this.tools = section.querySelector(".tools");
    this.task = this.tools.querySelector("select.task").value;
    this.split = this.tools.querySelector("select.split");
    this.legend = section.querySelector(".legend");
    this.note = section.querySelector(".picked");
    const tell = (id) => this.lines(id);
    const pick = (id) => this.pick(id);
    this.novelty = new Scatter(section.querySelector("#novelty"), "Score against novelty", tell, pick);
    const map = section.querySelector("#map");
    this.map = map && new Scatter(map, "Map of the vectors", tell, pick);
    this.table = document.getElementById("candidates");
    makeFilters(this.tools, (task) => {
      this.task = task;
      if (this.picked !== null && data.vectors[this.picked].task !== task) this.picked = null;
      this.draw();
    });
    this.split.addEventListener("change", () => this.draw());
    for (const row of this.table.tBodies[0].rows) {
      row.addEventListener("click", () => this.pick(Number(row.dataset.vector)));
    }
    new ResizeObserver(() => this.draw()).observe(section.querySelector("#novelty"));
  }

  name(vector) {
    const series = this.data.series[vector.series].name;
    const number = this.data.series[vector.series].many ? ` ${vector.row}` : "";
    return `${series}${number}${this.data.seeds.length > 1 ? `, seed ${vector.seed}` : ""}${vector.chosen ? " (chosen)" : ""}`;
  }

  lines(id) {
    const vector = this.data.vectors[id];
    const lines = [this.name(vector)];
    for (const split of Object.keys(this.data.splits)) {
      if (vector[split] !== null) lines.push(`${this.data.columns[split]}: ${vector[split].toFixed(this.data.decimals[split])}`);
    }
    if (vector.distance !== null) lines.push(`distance: ${digits(vector.distance)}${vector.relative === null ? "" : ` (${digits(vector.relative)} x typical)`}`);
    if (vector.disagreement !== null) lines.push(`disagreement: ${(100 * vector.disagreement).toFixed(1)} %`);
    return lines;
  }

  pick(id) {
    this.picked = id === this.picked ? null : id;
    this.draw();
  }

  // The vectors of the task, in the order of drawing: candidates above the rest, the chosen one last.
  shown() {
    const all = this.data.vectors.map((vector, id) => ({ ...vector, id }));
    const rank = (v) => (v.chosen ? 3 : v.id === this.picked ? 2 : this.data.series[v.series].candidate ? 1 : 0);
    return all.filter((v) => v.task === this.task).sort((a, b) => rank(a) - rank(b));
  }

  draw() {
    const mine = this.shown();
    this.drawLegend(mine);
    this.drawNovelty(mine);
    if (this.map) this.drawMap(mine);
    this.drawPick();
  }

  drawLegend(mine) {
    const rest = this.data.map[this.task] || [];
    const here = new Set([...mine.map((v) => v.series), ...rest.map(([series]) => series)]);
    const focused = document.activeElement?.dataset?.series;
    this.legend.replaceChildren(...this.data.series.flatMap((series, i) => {
      if (!here.has(i)) return [];
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.series = i;
      button.setAttribute("aria-pressed", String(!this.off.has(i)));
      button.append(svg("svg", { width: 20, height: 20, viewBox: "-10 -10 20 20", "aria-hidden": "true" }, mark(series, 0, 0, 5.5)), series.name);
      button.addEventListener("click", () => {
        if (!this.off.delete(i)) this.off.add(i);
        this.draw();
      });
      return [button];
    }));
    if (focused !== undefined) this.legend.querySelector(`[data-series="${CSS.escape(focused)}"]`)?.focus();
  }

  drawNovelty(mine) {
    const split = this.split.value;
    const drawn = mine.filter((v) => !this.off.has(v.series) && v[split] !== null && v.relative !== null);
    const [width, height] = this.novelty.size(0.7, 250, 400);
    this.section.querySelector("#novelty-y").textContent = this.data.ylabels[this.task][split];
    const root = this.novelty.root;
    if (!drawn.length) {
      root.append(svg("text", { x: width / 2, y: height / 2, class: "axis", "text-anchor": "middle" }, "nothing to show: no such scores, or all turned off"));
      return;
    }
    const margin = { left: 46, right: 16, top: 14, bottom: 28 };
    const x = makeScale(drawn.map((v) => v.relative), margin.left, width - margin.right, { zero: true, num: Math.max(3, Math.round(width / 90)) });
    const y = makeScale(drawn.map((v) => v[split]), height - margin.bottom, margin.top, { num: 5 });
    frame(root, width, height, margin, x, y);
    if (x.at(1) < width - margin.right) root.append(svg("line", { x1: x.at(1), x2: x.at(1), y1: margin.top, y2: height - margin.bottom, class: "guide" }));
    this.section.querySelector("#novelty-x").textContent = this.data.xlabel + (x.broken ? "; linear to 1, logarithmic beyond" : "");
    for (const v of drawn) this.novelty.add(this.data.series[v.series], x.at(v.relative), y.at(v[split]), v.id, { chosen: v.chosen, picked: v.id === this.picked });
  }

  drawMap(mine) {
    const placed = mine.filter((v) => v.place && !this.off.has(v.series));
    const rest = (this.data.map[this.task] || []).filter(([series]) => !this.off.has(series));
    const [width, height] = this.map.size(0.7, 250, 400);
    const every = [...placed.map((v) => v.place), ...rest.map(([, place]) => place)];
    if (!every.length) return;
    const x = makeScale(every.map((p) => p[0]), 12, width - 12);
    const y = makeScale(every.map((p) => p[1]), height - 12, 12);
    for (const [series, place] of rest) this.map.add(this.data.series[series], x.at(place[0]), y.at(place[1]), null);
    for (const v of placed) this.map.add(this.data.series[v.series], x.at(v.place[0]), y.at(v.place[1]), v.id, { chosen: v.chosen, picked: v.id === this.picked });
  }

  drawPick() {
    for (const row of this.table.tBodies[0].rows) {
      const here = Number(row.dataset.vector) === this.picked;
      row.classList.toggle("pick", here);
      row.querySelector("button.choose").setAttribute("aria-pressed", String(here));
    }
    this.note.textContent = this.picked === null
      ? "Choose a mark or a row: it is shown in all three."
      : this.lines(this.picked).join(" · ");
  }
}
