// Tables of a report: a click on a column sorts, menus filter by the case.
"use strict";
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.value;
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    const numeric = rows.every(row => !isNaN(value(row, i)));
    rows.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      return way * (numeric ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
  }));
  const filters = heads.flatMap((head, i) => {
    if (!("filter" in head.dataset)) return [];
    const select = document.createElement("select");
    const names = [...new Set(rows.map(row => value(row, i)))];
    for (const name of ["all", ...names]) select.add(new Option(name));
    select.addEventListener("change", show);
    return [[i, select, head.innerText]];
  });
  const bar = document.createElement("div"), count = document.createElement("output");
  function show() {
    for (const row of rows)
      row.hidden = filters.some(([i, select]) =>
        select.selectedIndex > 0 && select.value !== value(row, i));
    const shown = rows.filter(row => !row.hidden).length;
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  if (filters.length) {
    bar.className = "filters";
    for (const [, select, name] of filters) {
      const label = document.createElement("label");
      label.append(name + " ", select);
      bar.append(label);
    }
    bar.append(count);
    table.parentElement.before(bar);
    show();
  }
}
