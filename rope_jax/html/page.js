// Hides runs, by the boxes or by a link to report.html#hide=NAME&hide=OTHER, and sorts tables.
"use strict";

const boxes = [...document.querySelectorAll("nav input")];

// The address says what is hidden, so that a view can be linked to and going back undoes it.
function hidden() {
  return new URLSearchParams(location.hash.slice(1)).getAll("hide");
}

function show() {
  const names = hidden();
  for (const box of boxes) {
    box.checked = !names.includes(box.value);
    for (const element of document.querySelectorAll(`[data-run="${box.dataset.toggle}"]`)) {
      element.classList.toggle("off", !box.checked);
    }
  }
  document.querySelectorAll("tbody").forEach(markBest);
}

// The best value of each column, of the runs that are shown.
function markBest(body) {
  const rows = [...body.rows].filter((row) => !row.classList.contains("off"));
  const columns = Math.max(0, ...rows.map((row) => row.cells.length));
  for (let i = 0; i < columns; i++) {
    const cells = rows.map((row) => row.cells[i]).filter((cell) => cell?.dataset.better);
    const values = cells.map((cell) => Number(cell.dataset.value));
    const lower = cells[0]?.dataset.better === "lower";
    const best = lower ? Math.min(...values) : Math.max(...values);
    cells.forEach((cell, k) => {
      cell.classList.toggle("best", cells.length > 1 && values[k] === best);
    });
  }
}

function compare(a, b) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  if (x !== undefined && y !== undefined) return Number(x) - Number(y);
  return a.textContent.localeCompare(b.textContent);
}

// Ascending, descending, then as it was; what is missing comes last.
function sort(heading) {
  const table = heading.closest("table"), column = heading.cellIndex;
  const next = { ascending: "descending", descending: "" }[heading.ariaSort ?? ""] ?? "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  if (next) heading.setAttribute("aria-sort", next);
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
    rows.sort((a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      const missing = (x.textContent === "") - (y.textContent === "");
      if (missing || !next) return missing * !!next || a.dataset.order - b.dataset.order;
      return next === "ascending" ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  }
}

for (const body of document.querySelectorAll("tbody")) {
  [...body.rows].forEach((row, i) => { row.dataset.order = i; });
}
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
for (const box of boxes) {
  box.addEventListener("change", () => {
    const names = boxes.filter((b) => !b.checked).map((b) => b.value);
    // Never an empty fragment: that would scroll to the top.
    location.hash = names.map((name) => `hide=${encodeURIComponent(name)}`).join("&") || "all";
  });
}
addEventListener("hashchange", show);
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
});
show();
document.documentElement.dataset.ready = "";
