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
  const { make, draw } = window.elements;
  const labelled = (text, control) => make("label", {}, text, control);

  const ALL = "All three";
  const name = make("select", {}, ...[ALL, ...SCHEDULES].map((s) => make("option", {}, s)));
  const stages = make("select", {}, ...[1, 2, 3, 4, 6, 8].map((n) => make("option", {}, n)));
  const micro = make("input", { type: "number", min: 1, max: 128, inputmode: "numeric", "aria-describedby": "explorer-said" });
  const clock = make("input", { type: "range", min: 0, value: 0, step: 1 });
  const said = make("p", { id: "explorer-said", "aria-live": "polite" });
  const facts = make("dl", { class: "play-facts" });
  const grid = make("div", { class: "play-scroll", role: "region", "aria-label": "The schedule as a grid" });
  const now = make("p", { class: "play-note", "aria-live": "polite" });
  box.append(
    make("div", { class: "play-controls" }, labelled("schedule", name), labelled("stages", stages), labelled("micro-batches in a training step", micro)),
    said, facts, grid,
    make("div", { class: "play-controls" }, labelled("clock", clock)), now,
  );

  const chosen = () => (name.value === ALL ? SCHEDULES : [name.value]);
  let shown = [], unit = 0;  // one entry for each schedule in the figure: its name, table and facts
  const LEFT = 62, TOP = 6;

  const point = () => {
    const at = Number(clock.value), n = Number(stages.value), told = [];
    const mark = grid.querySelector(".now");
    if (mark) mark.setAttribute("x", LEFT + at * unit);
    for (const one of shown) {
      const work = one.table.filter((w) => w.clock === at);
      const mine = (i) => work.filter((w) => w.stage === i).map((w) => `micro-batch ${w.micro_batch} ${w.kind}`);
      if (shown.length === 1) {
        for (let i = 0; i < n; i += 1) told.push(`stage ${i}: ${mine(i).join(" and ") || "idle"}`);
      } else {
        const busy = new Set(work.map((w) => w.stage)).size;
        told.push(at < one.about.clocks ? `${one.name}: ${busy} of ${n} stages at work` : `${one.name}: done`);
      }
    }
    now.textContent = `Clock ${at}. ${told.join("; ")}.`;
    clock.setAttribute("aria-valuetext", `clock ${at}`);
    const left = LEFT + at * unit;
    if (left < grid.scrollLeft + LEFT || left + unit > grid.scrollLeft + grid.clientWidth) grid.scrollLeft = left - grid.clientWidth / 2;
  };

  const paint = () => {
    const n = Number(stages.value), alone = shown.length === 1, ROW = alone ? 40 : 26, GAP = alone ? 0 : 22;
    const clocks = Math.max(...shown.map((one) => one.about.clocks)), room = Math.max(box.clientWidth - 40, 280);
    unit = Math.min(34, Math.max((room - LEFT - (alone ? 90 : 4)) / clocks, alone ? 15 : 3));
    const width = LEFT + clocks * unit + (alone ? 84 : 2), height = TOP + shown.length * (n * ROW + GAP) + 34;
    const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "font-size": 11, fill: "currentColor" });
    const idle = shown.map((one) => `${one.name}: ${n} stages by ${one.about.clocks} clocks; ${(100 * one.about.bubble).toFixed(1)} percent of the grid is idle.`);
    svg.setAttribute("aria-label", idle.join(" "));
    svg.append(draw("rect", { class: "now", x: LEFT, y: 0, width: unit, height: height - 32, fill: "none", stroke: "var(--accent)", "stroke-width": 2, rx: 2 }));
    shown.forEach((one, k) => {
      const top = TOP + k * (n * ROW + GAP) + GAP, end = LEFT + one.about.clocks * unit;
      if (!alone) svg.append(draw("text", { x: 0, y: top - 7, "font-size": 12, "font-weight": 600, "paint-order": "stroke", stroke: "var(--wash)", "stroke-width": 5 }, `${one.name}: ${one.about.clocks} clocks, ${(100 * one.about.bubble).toFixed(0)} % idle`));
      for (let i = 0; i < n; i += 1) {
        const middle = top + i * ROW + ROW / 2;
        svg.append(draw("text", { x: 0, y: middle + 4 }, `stage ${i}`));
        if (alone) svg.append(draw("text", { x: end + 8, y: middle + 4 }, `stash ${one.about.stash[i]}`));
        svg.append(draw("line", { x1: LEFT, x2: end, y1: top + (i + 1) * ROW, y2: top + (i + 1) * ROW, stroke: "var(--rule)" }));
      }
      for (const w of one.table) {
        const forward = w.kind === "forward", high = ROW / 2 - (alone ? 3 : 1.5);
        const x = LEFT + w.clock * unit, y = top + w.stage * ROW + (forward ? 1 : ROW / 2 + 0.5), slim = Math.min(0.75, unit / 12);
        svg.append(draw("rect", { x: x + slim, y, width: unit - 2 * slim, height: high, rx: alone ? 2 : 1, fill: `var(--${w.kind})` }));
        if (unit >= 9) svg.append(draw("text", { x: x + unit / 2, y: y + high / 2 + 3.5, "text-anchor": "middle", "font-size": w.micro_batch > 99 || !alone ? 8 : 10 }, w.micro_batch));
      }
    });
    const every = [1, 2, 5, 10, 20, 50, 100, 200].find((step) => step * unit >= 28) || 500;
    for (let c = 0; c < clocks; c += every) {
      svg.append(draw("text", { x: LEFT + (c + 0.5) * unit, y: height - 19, "text-anchor": "middle" }, c));
    }
    svg.append(draw("text", { x: LEFT, y: height - 4 }, "clock"));
    grid.replaceChildren(svg);
    window.dispatchEvent(new Event("resize"));  // it may scroll now
  };

  const show = () => {
    const n = Number(stages.value), names = chosen(), count = Number(micro.value);
    const block = Math.max(...names.map((s) => overlap(s, n)));  // that of Grouped is a multiple of the others
    micro.step = 1;
    const legal = Number.isInteger(count) && count >= block && count <= 128 && count % block === 0;
    micro.setAttribute("aria-invalid", String(!legal));
    const who = names.length > 1 ? "Grouped" : names[0];
    if (!legal) {
      const down = Math.floor(Math.min(Math.max(count || 0, 0), 128) / block) * block;
      const ways = [down, down + block].filter((k) => k > 0 && k <= 128);
      said.textContent = `${who} runs micro-batches in blocks of ${block} on ${n} stage${n > 1 ? "s" : ""}: take ${ways.join(" or ")}.`;
      return;
    }
    said.textContent = `Blocks of ${block}. Blue is forward, orange backward; a number is a micro-batch, an empty place is idle.`;
    shown = names.map((s) => ({ name: s, table: schedule(s, n, count), about: describe(s, n, count) }));
    const about = shown[0].about;
    const rows = {
      clocks: about.clocks,
      "bubble, idle share": `${(100 * about.bubble).toFixed(1)} %`,
      "on their way at once": about.overlap,
      "stash by stage": about.stash.join(", "),
      "alive at most": about.alive.join(", "),
    };
    const entries = names.length > 1 ? [] : Object.entries(rows);  // of all three, the figure says it
    facts.replaceChildren(...entries.map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, String(v)))));
    facts.hidden = !entries.length;
    paint();
    clock.max = Math.max(...shown.map((one) => one.about.clocks)) - 1;
    clock.value = Math.min(Number(clock.value), Number(clock.max));
    point();
    window.dispatchEvent(new Event("resize"));  // what scrolls now may be other boxes than before
  };
  const refit = () => {
    const block = Math.max(...chosen().map((s) => overlap(s, Number(stages.value))));
    micro.value = Math.min(Math.floor(128 / block) * block, Math.max(1, Math.round(Number(micro.value) / block)) * block);
    show();
  };

  name.value = ALL;
  stages.value = "4";
  micro.value = "8";
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
    paint();
    point();
  });
})();
