const data = JSON.parse(document.getElementById("data").textContent);
for (const table of document.querySelectorAll("table[data-sortable]")) makeSortable(table);
for (const tools of document.querySelectorAll(".tools[data-table]")) {
  if (tools.dataset.table !== "candidates") makeFilters(tools);
}
const sections = { explore: Explorer, interpolation: Interpolation, trajectory: Trajectory };
for (const [name, Part] of Object.entries(sections)) {
  const section = document.getElementById(name);
  if (section && data[name]) new Part(data[name], section);
}
document.documentElement.dataset.ready = "true";
