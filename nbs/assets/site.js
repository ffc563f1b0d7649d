// What every page of the site does besides showing text. A page reads well without it.
(() => {
  "use strict";

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

  const start = () => {
    // The theme switch says which theme it is.
    const root = document.documentElement;
    for (const button of document.querySelectorAll(".scheme-switch")) {
      const say = () => button.setAttribute("aria-pressed", root.dataset.scheme === "alternate");
      button.addEventListener("click", () => { window.smalldocsToggleScheme(); say(); });
      new MutationObserver(say).observe(root, { attributes: true, attributeFilter: ["data-scheme"] });
      say();
    }

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
