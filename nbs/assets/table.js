// A table in <div class="sortable"> gets a search field and headings that sort. Without this script it
// is a plain table in the published order.
(() => {
  "use strict";

  const number = (text) => {
    const plain = text.replace(/[,\s\u202f%]/g, "").replace("\u2212", "-");
    return plain === "" || Number.isNaN(Number(plain)) ? null : Number(plain);
  };

  const enhance = (box, index) => {
    const table = box.querySelector("table");
    const body = table.tBodies[0], rows = [...body.rows];
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase().replace(/\s+/g, " ")]));
    table.id = table.id || `table-${index}`;

    const controls = document.createElement("div");
    controls.className = "play-controls";
    const label = document.createElement("label");
    label.textContent = box.dataset.search || "Search this table";
    const field = document.createElement("input");
    field.type = "search";
    field.autocomplete = "off";
    field.placeholder = box.dataset.example || "";
    field.setAttribute("aria-controls", table.id);
    label.append(field);
    const count = document.createElement("output");
    count.setAttribute("aria-live", "polite");
    controls.append(label, count);
    box.before(controls);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", box.dataset.label || "Table");

    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => text.get(row).includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}`;
    };
    field.addEventListener("input", filter);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { field.value = ""; filter(); }
    });

    const sort = (column, direction) => {
      const key = (row) => row.cells[column].textContent.trim();
      const numeric = rows.every((row) => number(key(row)) !== null || /^(|-|\u2013)$/.test(key(row)));
      const compare = numeric
        ? (a, b) => {
            const [x, y] = [number(key(a)), number(key(b))];
            if (x === null || y === null) return (x === null) - (y === null);  // what is not known stands last
            return direction * (x - y);
          }
        : (a, b) => direction * key(a).localeCompare(key(b), "en", { numeric: true });
      body.append(...[...rows].sort(compare));
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        for (const other of heads) other.removeAttribute("aria-sort");
        if (before === "descending") { body.append(...rows); return; }  // a third press: as published
        const direction = before === "ascending" ? -1 : 1;
        head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
        sort(column, direction);
      });
    });
    filter();
  };

  document.querySelectorAll(".sortable").forEach(enhance);
})();
