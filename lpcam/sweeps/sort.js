for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("button")?.parentElement;
    if (!head) return;
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const order = row => parseFloat(row.cells[head.cellIndex].dataset.order);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [order(a), order(b)];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    });
    table.tBodies[0].append(...rows);
  });
}
