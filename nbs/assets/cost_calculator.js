// How long a case takes on a device: hours = epochs x images / (images a second).
// The rates come from the page: <script type="application/json" id="cost-data">, written from `results/`.
(() => {
  "use strict";

  const hours = (rate, epochs, images) => (epochs * images) / rate / 3600;
  const inWords = (h) => {
    const say = (n, unit) => `${n.toLocaleString("en-US", { maximumSignificantDigits: n < 1000 ? 3 : 12, maximumFractionDigits: 0 })} ${unit}`;
    if (h < 1) return `${Math.max(1, Math.round(60 * h))} minutes`;
    return h < 72 ? say(h, "hours") : h < 2 * 24 * 365 ? say(h / 24, "days") : say(h / 24 / 365, "years");
  };
  window.costCalculator = { hours, inWords };

  const box = document.getElementById("cost-calculator");
  if (!box) return;
  const data = JSON.parse(document.getElementById("cost-data").textContent);
  const { make } = window.elements;

  const choice = (names) => make("select", {}, ...names.map((name) => make("option", {}, name)));
  const number = (value) => make("input", { type: "number", min: 1, step: 1, value, inputmode: "numeric" });
  const cases = choice(Object.keys(data.cases)), device = choice(data.devices);
  const epochs = number(data.epochs), images = number(data.images);
  const facts = make("dl", { class: "play-facts" }), said = make("p", { "aria-live": "polite" }), command = make("code");
  const field = (text, control) => make("label", {}, text, control);
  box.append(
    make("div", { class: "play-controls" }, field("case", cases), field("device", device), field("epochs", epochs), field("training images", images)),
    facts, said, make("p", {}, command),
  );
  box.hidden = false;

  const show = () => {
    const { rate, how } = data.cases[cases.value][device.value], e = Number(epochs.value), n = Number(images.value);
    command.textContent = device.value.includes("H100")
      ? `effnet-plan ${cases.value} --device gpu --gpus ${parseInt(device.value, 10)}`
      : device.value.startsWith("POD16") ? `effnet-plan ${cases.value}` : "";
    facts.replaceChildren();
    if (!(e >= 1 && n >= 1)) { said.textContent = "Epochs and images are numbers from 1 on."; return; }
    const h = hours(rate, e, n), fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
    facts.append(fact("time", inWords(h)), fact("images a second", Math.round(rate).toLocaleString("en-US")), fact("the rate is", how));
    said.textContent = `${e} epochs of ${n.toLocaleString("en-US")} images on ${device.value}: ${inWords(h)}.`;
  };
  cases.value = data.start;
  for (const control of [cases, device, epochs, images]) control.addEventListener("input", show);
  show();
})();
