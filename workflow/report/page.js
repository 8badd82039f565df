"use strict";
(() => {
  const { report, save, make } = window.cellmill;

  // The score table.
  const { command, ...tableColumns } = report.table;
  const rows = tableColumns.task.map((_, i) => Object.fromEntries(Object.entries(tableColumns).map(([key, column]) => [key, column[i]])));
  const filters = ["task", "dataset", "regime", "split", "metric", "kind"];
  const headers = [
    ["rank", "rank", "n"], ["label", "method"], ["metric", "metric"], ["mean", "mean", "n"], ["scaled", "scaled", "n"], ["low", "95 % interval", "n"], ["n", "seeds", "n"],
    ["standing", "against the first"], ["seen", "seen"], ["regime", "regime"], ["split", "split"], ["task", "task"], ["dataset", "data set"],
  ];
  const chosen = {};
  let sorted = null, downward = false, limit = 30, open = new Set();

  const words = (text) => (text ?? "").replaceAll("_", " ");
  const written = (name, value) => {
    if (name === "dataset") return value;
    if (name === "split") return value.replace("leave_out:", "left out: ");
    return (name === "metric" && report.metrics[value]) || words(value);
  };
  const score = (value) => value === null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(3).replace("-", "−");

  function buildFilters() {
    const box = document.getElementById("scores-filters");
    const search = make("input", { type: "search", placeholder: "Find a method", ariaLabel: "Find a method" });
    search.addEventListener("input", () => { chosen.search = search.value.toLowerCase(); fill(); });
    box.append(search);
    for (const name of filters) {
      const values = [...new Set(rows.map((row) => row[name]))];
      if (values.length < 2) continue;
      const select = make("select", { ariaLabel: name }, make("option", { value: "" }, `every ${words(name === "dataset" ? "data set" : name)}`));
      for (const value of values) select.append(make("option", { value }, written(name, value)));
      select.addEventListener("change", () => { chosen[name] = select.value; fill(); });
      box.append(select);
    }
  }

  function buildHead() {
    const line = make("tr");
    for (const [key, text, align] of headers) {
      const cell = make("th", { className: align ?? "" });
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", () => { downward = sorted === key && !downward; sorted = key; fill(); });
      cell.dataset.key = key;
      cell.append(button);
      line.append(cell);
    }
    document.querySelector("#scores-table thead").append(line);
  }

  function compare(a, b) {
    const [x, y] = [a[sorted], b[sorted]];
    if (x === null || y === null) return (x === null) - (y === null); // missing values last, either way
    return (typeof x === "number" ? x - y : String(x).localeCompare(String(y))) * (downward ? -1 : 1);
  }

  function intervalOf(row) {
    if (row.low === null) return "one seed";
    return row.deterministic ? "all equal" : `[${score(row.low)}, ${score(row.high)}]`;
  }

  function lineOf(row) {
    const line = make("tr", { className: "row", tabIndex: 0 });
    const method = make("td", {}, make("span", { className: `mark ${row.kind}`, title: row.kind }), " ", row.label);
    line.append(make("td", { className: "n" }, row.rank === null ? "" : String(row.rank)), method);
    line.append(make("td", {}, written("metric", row.metric)));
    if (row.mean === null) {
      line.append(make("td", { className: "reason", colSpan: 5 }, row.reason || "no value and no reason was recorded"));
    } else {
      line.append(make("td", { className: "n" }, score(row.mean)));
      line.append(make("td", { className: "n" }, row.scaled === null ? "" : score(row.scaled)));
      line.append(make("td", { className: "n" }, intervalOf(row)));
      line.append(make("td", { className: "n" }, String(row.n)), make("td", {}, row.standing ?? ""));
    }
    for (const name of ["seen", "regime", "split", "task", "dataset"]) line.append(make("td", {}, written(name, row[name])));
    const toggle = () => { open.has(row) ? open.delete(row) : open.add(row); fill(); };
    line.addEventListener("click", toggle);
    line.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
    return line;
  }

  function detailsOf(row) {
    const list = make("dl");
    const said = {
      "single seeds": row.values.map((value, i) => `seed ${row.seeds[i]}: ${value}`).join("; ") || "none",
      "no value": row.reason,
      "higher is better": row.higher_is_better ? "yes" : "no",
      "cells scored": row.cells?.toLocaleString("en"),
      "seconds (median)": row.seconds?.toFixed(1),
      "code version": row.code_version, commit: row.commit, "config hash": row.config_hash, checkpoint: row.checkpoint,
    };
    for (const [name, text] of Object.entries(said)) if (text) list.append(make("dt", {}, name), make("dd", {}, text));
    list.append(make("dt", {}, "make it again"), make("dd", {}, make("code", {}, `${command} ${row.target}`)));
    return make("tr", { className: "details" }, make("td", { colSpan: headers.length }, list));
  }

  function fill() {
    const kept = rows.filter((row) =>
      filters.every((name) => !chosen[name] || row[name] === chosen[name]) && (!chosen.search || row.label.toLowerCase().includes(chosen.search)));
    if (sorted) kept.sort(compare);
    for (const cell of document.querySelectorAll("#scores-table th")) {
      cell.setAttribute("aria-sort", cell.dataset.key !== sorted ? "none" : downward ? "descending" : "ascending");
    }
    const body = document.querySelector("#scores-table tbody");
    body.replaceChildren(...kept.slice(0, limit).flatMap((row) => (open.has(row) ? [lineOf(row), detailsOf(row)] : [lineOf(row)])));
    document.getElementById("scores-count").textContent = `${Math.min(limit, kept.length)} of ${kept.length} rows`;
    const more = document.getElementById("scores-more");
    more.textContent = kept.length > limit ? `Show all ${kept.length}` : "";
  }

  document.getElementById("scores-more").addEventListener("click", () => { limit = Infinity; fill(); });
  document.getElementById("scores-download").addEventListener("click", () => {
    save(report.csv, "text/csv", `${report.run}-scores.csv`);
  });
  buildFilters();
  buildHead();
  fill();
})();
