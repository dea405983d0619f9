// Tables: headers that sort, boxes that filter. Without this script they are plain tables.

function sortTable(table, column, direction) {
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => ({ row, value: value(row), number: parseFloat(value(row)) }));
  const numeric = table.tHead.rows[0].cells[column].dataset.sort === "number";
  rows.sort((a, b) => {
    const emptyA = numeric ? Number.isNaN(a.number) : a.value === "";
    const emptyB = numeric ? Number.isNaN(b.number) : b.value === "";
    if (emptyA || emptyB) return emptyA - emptyB; // what has no value stands last, either way
    return sign * (numeric ? a.number - b.number : a.value.localeCompare(b.value, "en", { numeric: true }));
  });
  body.append(...rows.map((item) => item.row));
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = head.dataset.sort === "number" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const next = head.getAttribute("aria-sort") === first ? other : first;
      for (const one of heads) if (one.hasAttribute("aria-sort")) one.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      sortTable(table, column, next);
    });
  });
}

function filterTable(table, words, task) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const columns = table.dataset.tasks === "columns";
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    const here = wanted.every((word) => text.includes(word)) && (columns || !task || row.dataset.task === task);
    row.hidden = !here;
    shown += here;
  }
  if (columns) {
    for (const cell of table.querySelectorAll("[data-task]")) cell.hidden = Boolean(task) && cell.dataset.task !== task;
  }
  return shown;
}

function makeFilters(tools, onTask) {
  const table = document.getElementById(tools.dataset.table);
  const find = tools.querySelector("input");
  const choice = tools.querySelector("select.task");
  const count = tools.querySelector("output");
  const apply = () => {
    const shown = filterTable(table, find ? find.value : "", choice ? choice.value : "");
    const all = table.tBodies[0].rows.length;
    count.textContent = shown === all ? `${all} rows` : `${shown} of ${all} rows`;
  };
  tools.hidden = false;
  find?.addEventListener("input", apply);
  choice?.addEventListener("change", () => {
    apply();
    onTask?.(choice.value);
  });
  apply();
}
