// The pipeline explorer: choose a schedule, stages and micro-batches; see the grid, the bubble and the stash.
// The arithmetic is that of `schedule` and `describe_schedule` of effnet_repro.pipeline, and a test compares them.
(() => {
  "use strict";

  const SCHEDULES = ["Grouped", "Interleaved", "Sequential"];
  const strideOf = (name, stages) => (name === "Sequential" || stages === 1 ? 2 * stages : name === "Interleaved" ? 2 : 1);
  const overlap = (name, stages) => (2 * stages) / strideOf(name, stages);

  // What every stage does at every clock: in the order of execution, forward work first within a clock.
  const schedule = (name, stages, microBatches) => {
    const stride = strideOf(name, stages), table = [];
    for (let m = 0; m < microBatches; m += 1) {
      for (let i = 0; i < stages; i += 1) {
        table.push({ clock: stride * m + i, stage: i, kind: "forward", micro_batch: m });
        table.push({ clock: stride * m + 2 * stages - 1 - i, stage: i, kind: "backward", micro_batch: m });
      }
    }
    return table.sort((a, b) => a.clock - b.clock || (a.kind === "backward") - (b.kind === "backward") || a.stage - b.stage);
  };

  const describe = (name, stages, microBatches) => {
    const stride = strideOf(name, stages);
    const clocks = (microBatches - 1) * stride + 2 * stages, both = stride === 1 ? 1 : 0;
    const stash = Array.from({ length: stages }, (_, i) => Math.floor((2 * (stages - 1 - i)) / stride));
    return {
      clocks,
      bubble: 1 - (2 * stages * microBatches) / (clocks * stages * (1 + both)),
      overlap: overlap(name, stages),
      stash,
      alive: stash.map((kept) => kept + 1 + both),
    };
  };
  window.pipelineExplorer = { schedule, describe, overlap };

  const box = document.getElementById("pipeline-explorer");
  if (!box) return;
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const draw = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const labelled = (text, control) => make("label", {}, text, control);

  const name = make("select", {}, ...SCHEDULES.map((s) => make("option", {}, s)));
  const stages = make("select", {}, ...[1, 2, 3, 4, 6, 8].map((n) => make("option", {}, n)));
  const micro = make("input", { type: "number", min: 1, max: 128, inputmode: "numeric", "aria-describedby": "explorer-said" });
  const clock = make("input", { type: "range", min: 0, value: 0, step: 1 });
  const said = make("p", { id: "explorer-said", "aria-live": "polite" });
  const facts = make("dl", { class: "play-facts" });
  const grid = make("div", { class: "play-scroll", role: "region", "aria-label": "The schedule as a grid" });
  const now = make("p", { class: "play-note", "aria-live": "polite" });
  box.append(
    make("div", { class: "play-controls" }, labelled("schedule", name), labelled("stages", stages), labelled("micro-batches in an update", micro)),
    said, facts, grid,
    make("div", { class: "play-controls" }, labelled("clock", clock)), now,
  );

  let table = [], places = null, unit = 0;
  const ROW = 40, LEFT = 62, TOP = 6;

  const point = () => {
    const at = Number(clock.value);
    const mark = grid.querySelector(".now");
    if (mark) mark.setAttribute("x", LEFT + at * unit);
    const work = table.filter((w) => w.clock === at);
    const told = [];
    for (let i = 0; i < Number(stages.value); i += 1) {
      const mine = work.filter((w) => w.stage === i).map((w) => `micro-batch ${w.micro_batch} ${w.kind}`);
      told.push(`stage ${i}: ${mine.join(" and ") || "idle"}`);
    }
    now.textContent = `Clock ${at}. ${told.join("; ")}.`;
    clock.setAttribute("aria-valuetext", `clock ${at}`);
    const left = LEFT + at * unit;
    if (left < grid.scrollLeft + LEFT || left + unit > grid.scrollLeft + grid.clientWidth) grid.scrollLeft = left - grid.clientWidth / 2;
  };

  const paint = (n, count, about) => {
    const room = Math.max(box.clientWidth - 40, 280);
    unit = Math.min(34, Math.max((room - LEFT - 90) / about.clocks, 15));
    const width = LEFT + about.clocks * unit + 84, height = TOP + n * ROW + 34;
    const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "font-size": 11, fill: "currentColor" });
    svg.setAttribute("aria-label", `${name.value}: ${n} stages by ${about.clocks} clocks; ${(100 * about.bubble).toFixed(1)} percent of the grid is idle.`);
    svg.append(draw("rect", { class: "now", x: LEFT, y: 0, width: unit, height: TOP + n * ROW + 2, fill: "none", stroke: "var(--accent)", "stroke-width": 2, rx: 2 }));
    for (let i = 0; i < n; i += 1) {
      const middle = TOP + i * ROW + ROW / 2;
      svg.append(draw("text", { x: 0, y: middle + 4 }, `stage ${i}`));
      svg.append(draw("text", { x: LEFT + about.clocks * unit + 8, y: middle + 4 }, `stash ${about.stash[i]}`));
      svg.append(draw("line", { x1: LEFT, x2: LEFT + about.clocks * unit, y1: TOP + (i + 1) * ROW, y2: TOP + (i + 1) * ROW, stroke: "var(--rule)" }));
    }
    for (const w of table) {
      const forward = w.kind === "forward";
      const x = LEFT + w.clock * unit, y = TOP + w.stage * ROW + (forward ? 2 : ROW / 2 + 1), high = ROW / 2 - 3;
      svg.append(draw("rect", { x: x + 0.75, y, width: unit - 1.5, height: high, rx: 2, fill: `var(--${w.kind})` }));
      svg.append(draw("text", { x: x + unit / 2, y: y + high / 2 + 4, "text-anchor": "middle", "font-size": w.micro_batch > 99 ? 8 : 10 }, w.micro_batch));
    }
    const every = [1, 2, 5, 10, 20, 50].find((step) => step * unit >= 28) || 50;
    for (let c = 0; c < about.clocks; c += every) {
      svg.append(draw("text", { x: LEFT + (c + 0.5) * unit, y: TOP + n * ROW + 15, "text-anchor": "middle" }, c));
    }
    svg.append(draw("text", { x: LEFT, y: TOP + n * ROW + 30 }, "clock"));
    grid.replaceChildren(svg);
    window.dispatchEvent(new Event("resize"));  // it may scroll now
  };

  const show = () => {
    const n = Number(stages.value), block = overlap(name.value, n), count = Number(micro.value);
    micro.step = 1;
    const legal = Number.isInteger(count) && count >= block && count <= 128 && count % block === 0;
    micro.setAttribute("aria-invalid", String(!legal));
    if (!legal) {
      const down = Math.floor(Math.min(Math.max(count || 0, 0), 128) / block) * block;
      const ways = [down, down + block].filter((k) => k > 0 && k <= 128);
      said.textContent = `${name.value} runs micro-batches in blocks of ${block} on ${n} stage${n > 1 ? "s" : ""}: take ${ways.join(" or ")}.`;
      return;
    }
    said.textContent = `Blocks of ${block}. Blue is forward, orange backward; a number is a micro-batch, an empty place is idle.`;
    table = schedule(name.value, n, count);
    const about = describe(name.value, n, count);
    places = { n, count, about };
    const rows = {
      clocks: about.clocks,
      "bubble, idle share": `${(100 * about.bubble).toFixed(1)} %`,
      "on their way at once": about.overlap,
      "stash by stage": about.stash.join(", "),
      "alive at most": about.alive.join(", "),
    };
    facts.replaceChildren(...Object.entries(rows).map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, String(v)))));
    paint(n, count, about);
    clock.max = about.clocks - 1;
    clock.value = Math.min(Number(clock.value), about.clocks - 1);
    point();
    window.dispatchEvent(new Event("resize"));  // what scrolls now may be other boxes than before
  };
  const refit = () => {
    const block = overlap(name.value, Number(stages.value));
    micro.value = Math.min(128, Math.max(1, Math.round(Number(micro.value) / block)) * block);
    show();
  };

  name.value = "Grouped";
  stages.value = "4";
  micro.value = "16";
  box.hidden = false;
  name.addEventListener("change", refit);
  stages.addEventListener("change", refit);
  micro.addEventListener("input", show);
  clock.addEventListener("input", point);
  show();
  let wide = box.clientWidth;
  window.addEventListener("resize", () => {
    if (box.clientWidth === wide) return;
    wide = box.clientWidth;
    paint(places.n, places.count, places.about);
    point();
  });
})();
