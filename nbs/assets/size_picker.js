// Which image sizes a trained network may be fine-tuned at: the mod-32 rule, with what each size costs.
// The numbers come from the page: <script type="application/json" id="size-data">, written by the library.
(() => {
  "use strict";

  // The same as `mod32_warning` of effnet_repro.scaling: [] when the rule holds, else the sizes beside it.
  const nearest = (train, other) => {
    const away = (((other - train) % 32) + 32) % 32;
    if (away === 0) return [];
    const low = other - away;
    return [low, low + 32].filter((size) => size >= 32);
  };
  window.sizePicker = { nearest };

  const box = document.getElementById("size-picker");
  if (!box) return;
  const data = JSON.parse(document.getElementById("size-data").textContent);
  const { make } = window.elements;

  const cases = make("select");
  for (const name of Object.keys(data.cases)) cases.append(make("option", {}, name));
  const field = make("input", { type: "number", min: 32, max: 1024, step: 1, inputmode: "numeric" });
  const chips = make("div", { class: "play-controls", role: "group", "aria-label": "Sizes that keep the rule" });
  const said = make("p", { "aria-live": "polite" });
  const command = make("code");
  box.append(
    make("div", { class: "play-controls" }, make("label", {}, "trained case", cases), make("label", {}, "fine-tune at, pixels", field)),
    chips, said, make("p", {}, command),
  );
  box.hidden = false;

  const show = () => {
    const { train, network } = data.cases[cases.value];
    const size = Number(field.value), macs = data.macs[network];
    const cost = (n) => (macs[n] ? `${(macs[n] / macs[train]).toFixed(1)} times the arithmetic of training` : "");
    chips.replaceChildren(...Object.keys(macs).map(Number).filter((n) => n >= train).map((n) => {
      const chip = make("button", { type: "button", "aria-pressed": String(n === size) }, `${n}`);
      chip.addEventListener("click", () => { field.value = n; show(); chips.querySelector("[aria-pressed=true]").focus(); });
      return chip;
    }));
    if (!(size >= 32)) { said.textContent = "A size is a whole number of pixels, 32 or more."; command.textContent = ""; return; }
    const better = nearest(train, size);
    if (better.length) {
      said.textContent = `${size} leaves ${size % 32} modulo 32, the training size ${train} leaves ${train % 32}: ` +
        `the network would meet padding that it was not trained with. Take ${better.join(" or ")}.`;
      command.textContent = "";
    } else {
      said.textContent = `Trained at ${train}, fine-tuned at ${size}: the same padding at every layer` + (cost(size) ? `, ${cost(size)}.` : ".");
      command.textContent = `make finetune CASE=${cases.value} ARGS="-p image_size ${size}"`;
    }
  };
  const choose = () => { field.value = data.cases[cases.value].native; show(); };
  cases.value = data.start;
  cases.addEventListener("change", choose);
  field.addEventListener("input", show);
  choose();
})();
