// What every page of the site does besides showing text. A page reads well without it.
(() => {
  "use strict";

  // For the pages' own scripts: an element of HTML with attributes and children, and one of SVG with a text.
  const filled = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const make = (tag, attributes = {}, ...children) => {
    const element = filled(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const draw = (tag, attributes, text) => {
    const element = filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  window.elements = { make, draw };

  // Opened as a file, a page may not fetch the search index; a script may bring it.
  if (location.protocol === "file:") {
    const fetched = window.fetch;
    window.fetch = (url, ...rest) => {
      if (!/search\.json$/.test(url)) return fetched(url, ...rest);
      return new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = String(url).replace(/json$/, "js");
        script.onload = () => resolve(new Response(JSON.stringify(window.searchIndex)));
        script.onerror = () => reject(new Error("the search index is missing"));
        document.head.append(script);
      });
    };
  }

  // Search by words: each counts by how rare it is and where it stands. What no word finds is
  // left to the fuzzy search, which forgives a slip of the finger.
  const Fuzzy = window.Fuse, BETWEEN = /[\s,;:()]+/;
  class WordSearch {
    constructor(entries, options) {
      this.options = options;
      this.entries = entries.map((item) => ({
        item,
        fields: [[12, item.title], [10, item.section], [1, item.text]].map(([w, s]) => [w, (s || "").toLowerCase()]),
        words: ` ${[item.title, item.section, item.text].join(" ").toLowerCase().split(BETWEEN).join(" ")} `,
      }));
    }
    search(query, { limit }) {
      const all = query.toLowerCase().split(BETWEEN).filter(Boolean), words = all.filter((w) => w.length > 1);
      const found = new Map();
      for (const word of words) {
        const begin = new RegExp("(?<![a-z0-9])" + word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
        const hits = this.entries.filter(({ fields }) => fields.some(([, text]) => text.includes(word)));
        const rarity = Math.log(1 + this.entries.length / (1 + hits.length));
        for (const entry of hits) {
          let place = 0;
          for (const [weight, text] of entry.fields) {
            if (!text.includes(word)) continue;
            const share = weight > 1 ? word.length / text.length : 0;  // a short heading is about little else
            place += (weight + 10 * share) * (begin.test(text) ? 1 : 0.4);
          }
          found.set(entry, (found.get(entry) || 0) + rarity * (20 + place));
        }
      }
      // Two words that stand side by side, as in a message that was pasted, say more than two words.
      for (let i = 1; i < all.length; i++) {
        const pair = ` ${all[i - 1]} ${all[i]} `, hits = this.entries.filter((entry) => entry.words.includes(pair));
        const rarity = Math.log(1 + this.entries.length / (1 + hits.length));
        for (const entry of hits) found.set(entry, (found.get(entry) || 0) + 12 * rarity);
      }
      if (!found.size && Fuzzy) return new Fuzzy(this.entries.map((e) => e.item), this.options).search(query, { limit });
      return [...found].sort((a, b) => b[1] - a[1]).slice(0, limit).map(([{ item }]) => ({ item }));
    }
  }
  window.Fuse = WordSearch;

  const start = () => {
    // The theme switch says which theme it is.
    const root = document.documentElement;
    for (const button of document.querySelectorAll(".scheme-switch")) {
      const say = () => button.setAttribute("aria-pressed", root.dataset.scheme === "alternate");
      button.addEventListener("click", () => { window.smalldocsToggleScheme(); say(); });
      new MutationObserver(say).observe(root, { attributes: true, attributeFilter: ["data-scheme"] });
      say();
    }

    // In a long list of pages, this one is in sight.
    const here = document.querySelector("#quarto-sidebar a.active"), list = here && here.closest("#quarto-sidebar");
    if (here && here.offsetTop > list.clientHeight - 80) list.scrollTop = here.offsetTop - list.clientHeight / 2;

    // On a phone the list of pages opens with a button, takes the focus, and closes with Escape.
    const toggle = document.querySelector(".quarto-btn-toggle");
    const sidebar = document.getElementById("quarto-sidebar");
    if (toggle && sidebar) {
      const say = () => toggle.setAttribute("aria-expanded", sidebar.classList.contains("show"));
      new MutationObserver(say).observe(sidebar, { attributes: true, attributeFilter: ["class"] });
      say();
      toggle.addEventListener("click", () => {
        if (sidebar.classList.contains("show")) {
          (sidebar.querySelector("a.active") || sidebar.querySelector("a")).focus();
        }
      });
      document.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && sidebar.classList.contains("show")) {
          toggle.click();
          toggle.focus();
        }
      });
    }

    // A figure that was made smaller to fit can be had in full, by its button or by a tap on it.
    const full = document.createElement("dialog"), close = document.createElement("button");
    let home = null;  // what stands where the figure was
    full.className = "enlarged";
    close.textContent = "Close";
    close.addEventListener("click", () => full.close());
    full.append(close);
    full.addEventListener("close", () => {
      home.replaceWith(full.lastChild);
      home = null;
    });
    const figures = [...document.querySelectorAll("main .cell-output-display :is(svg.figure, img)")].map((figure) => {
      const button = document.createElement("button"), name = figure.getAttribute("aria-label") || figure.alt;
      button.className = "enlarge";
      button.type = "button";
      button.textContent = "\u2922";
      button.setAttribute("aria-label", `Enlarge the figure: ${name.split(/[.:]/)[0]}`);
      figure.after(button);
      const own = () => (figure.viewBox ? (figure.viewBox.baseVal.width * 4) / 3 : figure.naturalWidth || figure.width);
      const enlarge = () => {
        if (home || button.hidden) return;
        figure.replaceWith((home = document.createElement("span")));
        figure.style.width = `${1.1 * own()}px`;
        full.append(figure);
        full.setAttribute("aria-label", name);
        full.showModal();
      };
      full.addEventListener("close", () => (figure.style.width = ""));
      button.addEventListener("click", enlarge);
      figure.addEventListener("click", enlarge);
      return () => home || (button.hidden = figure.getBoundingClientRect().width > 0.85 * own());
    });
    if (figures.length) document.body.append(full);
    const fit = () => figures.forEach((one) => one());
    fit();
    window.addEventListener("load", fit);
    window.addEventListener("resize", fit);

    // A formula that is wider than its line becomes smaller, as far as it can be read.
    const formulas = () => document.querySelectorAll("main .katex-display").forEach((one) => {
      one.style.fontSize = "";
      const share = one.clientWidth / one.scrollWidth;
      if (one.clientWidth && share < 1) one.style.fontSize = `${Math.max(0.64, 0.985 * share)}em`;
    });
    formulas();
    window.addEventListener("load", formulas);
    window.addEventListener("resize", formulas);
    document.addEventListener("toggle", formulas, true);

    // What scrolls sideways can be reached and scrolled with the keys.
    const boxes = document.querySelectorAll("main pre, .cell-output-display, .sd-table, .math.display, .katex-display, .play-scroll, .sortable, .highlight pre");
    const reach = () => boxes.forEach((box) => {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) {
        if (!box.hasAttribute("tabindex")) box.tabIndex = 0;
      } else if (box.getAttribute("tabindex") === "0") box.removeAttribute("tabindex");
    });
    reach();
    window.addEventListener("load", reach);
    window.addEventListener("resize", reach);
    document.addEventListener("toggle", reach, true);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
