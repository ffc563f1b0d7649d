// The Proxy Norm slider: choose a channel's scale and bias; see what the activation makes of a Gaussian channel,
// and what Proxy Norm makes of that. The arithmetic is that of `proxy_statistics`, and a test compares them.
(() => {
  "use strict";

  const EPSILON = 0.03, QUANTILES = 200;

  // The inverse of the standard normal distribution (Acklam's rational approximation, good to 1e-9).
  const inverse = (p) => {
    const a = [-39.69683028665376, 220.9460984245205, -275.9285104469687, 138.357751867269, -30.66479806614716, 2.506628277459239];
    const b = [-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572];
    const c = [-0.007784894002430293, -0.3223964580411365, -2.400758277161838, -2.549732539343734, 4.374664141464968, 2.938163982698783];
    const d = [0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416];
    const of = (coefficients, x) => coefficients.reduce((sum, k) => sum * x + k, 0);
    if (p > 0.5) return -inverse(1 - p);
    if (p < 0.02425) { const q = Math.sqrt(-2 * Math.log(p)); return of(c, q) / (of(d, q) * q + 1); }
    const q = p - 0.5, r = q * q;
    return (of(a, r) * q) / (of(b, r) * r + 1);
  };
  const gaussian = (n) => Array.from({ length: n }, (_, i) => inverse((i + 0.5) / n));
  const swish = (x) => x / (1 + Math.exp(-x));
  const meanOf = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
  const moments = (values) => {
    const mean = meanOf(values);
    return { mean, std: Math.sqrt(meanOf(values.map((v) => (v - mean) ** 2))) };
  };

  // The proxy's mean and 1/std, for a scale gamma and a bias beta.
  const proxyPoints = gaussian(QUANTILES);
  const statistics = (gamma, beta) => {
    const { mean, std } = moments(proxyPoints.map((q) => swish(gamma * q + beta)));
    return { mean, inv_std: 1 / Math.sqrt(std * std + EPSILON) };
  };
  window.proxySlider = { statistics };

  const box = document.getElementById("proxy-slider");
  if (!box) return;
  const { make, draw } = window.elements;

  const slider = (name, low, high) => {
    const input = make("input", { type: "range", min: low, max: high, step: 0.05 });
    const shown = make("span");
    return { input, shown, label: make("label", {}, make("span", {}, name, " = ", shown), input) };
  };
  const gamma = slider("scale \u03b3", 0.05, 3), beta = slider("bias \u03b2", -3, 3);
  const presets = [["as training begins", 1, 0], ["a channel mostly off", 0.7, -1.5], ["nearly linear", 0.8, 3], ["almost no signal", 0.05, 0]];
  const chips = make("div", { class: "play-controls", role: "group", "aria-label": "Channels to look at" });
  const drawing = make("div"), facts = make("dl", { class: "play-facts" });
  const said = make("p", { "aria-live": "polite", class: "play-note" });
  box.append(make("div", { class: "play-controls" }, gamma.label, beta.label), chips, drawing, facts, said);
  box.hidden = false;

  const channel = gaussian(6000), LOW = -3, HIGH = 5, BIN = 0.1, ROW = 96, LEFT = 8;

  // A distribution as a filled outline on a row of the figure, with its mean and standard deviation marked.
  const row = (svg, n, title, values, color, width) => {
    const x = (v) => LEFT + ((v - LOW) / (HIGH - LOW)) * (width - 2 * LEFT), floor = n * ROW + ROW - 14;
    const counts = new Array(Math.round((HIGH - LOW) / BIN)).fill(0);
    for (const v of values) counts[Math.min(counts.length - 1, Math.max(0, Math.floor((v - LOW) / BIN)))] += 1;
    const high = (k) => Math.min(58, (46 * counts[k]) / values.length / BIN);
    let path = `M${x(LOW)},${floor}`;
    counts.forEach((_, k) => { path += `V${(floor - high(k)).toFixed(1)}H${x(LOW + (k + 1) * BIN).toFixed(1)}`; });
    svg.append(draw("path", { d: `${path}V${floor}Z`, fill: color, "fill-opacity": 0.45 }));
    svg.append(draw("line", { x1: x(LOW), x2: x(HIGH), y1: floor, y2: floor, stroke: "var(--edge)" }));
    svg.append(draw("line", { x1: x(0), x2: x(0), y1: floor - 60, y2: floor, stroke: "var(--quiet)", "stroke-dasharray": "2 3" }));
    const { mean, std } = moments(values), at = (v) => x(Math.min(HIGH, Math.max(LOW, v)));
    svg.append(draw("line", { x1: at(mean), x2: at(mean), y1: floor - 60, y2: floor + 5, stroke: color, "stroke-width": 2.5 }));
    svg.append(draw("line", { x1: at(mean - std), x2: at(mean + std), y1: floor + 5, y2: floor + 5, stroke: color, "stroke-width": 4 }));
    svg.append(draw("text", { x: LEFT, y: n * ROW + 14, "font-size": 13 }, title));
    return { mean, std };
  };

  const show = () => {
    const g = Number(gamma.input.value), b = Number(beta.input.value), width = Math.max(280, Math.min(680, box.clientWidth - 34));
    const { mean, inv_std } = statistics(g, b), number = (v) => (v < -0.004 ? "\u2212" : "") + Math.abs(v).toFixed(2);
    gamma.shown.textContent = number(g);
    beta.shown.textContent = number(b);
    const svg = draw("svg", { width, height: 3 * ROW + 6, viewBox: `0 0 ${width} ${3 * ROW + 6}`, role: "img", fill: "currentColor" });
    const activated = channel.map((q) => swish(g * q + b));
    row(svg, 0, "what the norm gives", channel, "var(--quiet)", width);
    const before = row(svg, 1, "after scale, bias and swish", activated, "var(--figure-sky)", width);
    const after = row(svg, 2, "after Proxy Norm", activated.map((v) => (v - mean) * inv_std), "var(--figure-orange)", width);
    drawing.replaceChildren(svg);
    const rows = { "mean before": before.mean, "standard deviation before": before.std, "mean after": after.mean, "standard deviation after": after.std };
    facts.replaceChildren(...Object.entries(rows).map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, number(v)))));
    const words = `The proxy subtracts ${number(mean)} and divides by ${number(1 / inv_std)}.`;
    said.textContent = words + (before.std < 0.2 ? " There is little signal here: the 0.03 under the root keeps Proxy Norm from blowing it up." : "");
    svg.setAttribute("aria-label", `A Gaussian channel, the channel after scale ${number(g)}, bias ${number(b)} and swish, and after Proxy Norm. ${words}`);
    for (const chip of chips.children) chip.setAttribute("aria-pressed", String(chip.dataset.at === `${g},${b}`));
  };
  for (const [name, g, b] of presets) {
    const chip = make("button", { type: "button", "data-at": `${g},${b}` }, name);
    chip.addEventListener("click", () => { gamma.input.value = g; beta.input.value = b; show(); });
    chips.append(chip);
  }
  gamma.input.value = 1;
  beta.input.value = 0;
  gamma.input.addEventListener("input", show);
  beta.input.addEventListener("input", show);
  window.addEventListener("resize", show);
  show();
})();
