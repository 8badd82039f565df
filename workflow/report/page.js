"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const views = new Map();
  const errors = [];
  window.addEventListener("error", (event) => errors.push(event.message));

  // Columns to rows; a data set may join the columns of another (the cells behind every UMAP).
  function rowsOf(name) {
    const { join, ...own } = report.data[name];
    const columns = { ...(join ? report.data[join] : {}), ...own };
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    return Array.from({ length }, (_, i) => Object.fromEntries(names.map((key) => [key, columns[key][i]])));
  }

  async function draw(element) {
    const { spec: name, source } = element.dataset;
    const spec = structuredClone(report.specs[name]);
    const signals = JSON.parse(element.dataset.signals);
    spec.height = Number(element.dataset.height);
    spec.datasets = { source: rowsOf(source) };
    for (const param of spec.params ?? []) if (param.name in signals) param.value = signals[param.name];
    if (element.clientWidth < 480 && spec.layer) spec.layer = spec.layer.filter((layer) => layer.name !== "values");
    const renderer = name.startsWith("umap") ? "canvas" : "svg";
    const result = await vegaEmbed(element, spec, { actions: false, renderer, tooltip: { theme: "custom" } });
    views.set(element.id + "|" + element.dataset.source, result.view);
    element.style.minHeight = "";
  }

  async function drawAll() {
    const elements = [...document.querySelectorAll(".chart")];
    for (const element of elements) {
      try {
        await draw(element);
      } catch (error) {
        errors.push(`${element.id}: ${error.message}`);
        console.error(element.id, error);
      }
      await new Promise((done) => setTimeout(done)); // the page stays responsive between charts
    }
    Object.assign(document.documentElement.dataset, { charts: views.size, errors: errors.join(" | "), state: "ready" });
  }

  // Views of the charts whose id starts so: of one chart, or of all charts of one kind.
  function viewsOf(prefix) {
    return [...views].filter(([key]) => key.startsWith(prefix)).map(([, view]) => view);
  }

  for (const input of document.querySelectorAll("[data-signal]")) {
    input.addEventListener("change", () => {
      const value = input.type === "checkbox" ? input.checked : input.value;
      for (const view of viewsOf(input.dataset.chart + "|")) view.signal(input.dataset.signal, value).runAsync();
      const direction = document.querySelector(`[data-direction="${CSS.escape(input.dataset.chart)}"]`);
      if (direction && input.dataset.signal === "metric") {
        direction.textContent = `${input.selectedOptions[0].text}: ${JSON.parse(direction.dataset.higher)[value]}`;
      }
    });
  }

  // Legends: hover shows one entry in every chart of the legend's scope, a click keeps it.
  for (const legend of document.querySelectorAll(".legend[data-scope]")) {
    const buttons = [...legend.querySelectorAll("button")];
    let kept = "";
    const focus = (value) => {
      for (const view of viewsOf(legend.dataset.scope)) view.signal("focus", value).runAsync();
    };
    for (const button of buttons) {
      const own = button.dataset.focus;
      button.addEventListener("pointerenter", () => focus(own));
      button.addEventListener("pointerleave", () => focus(kept));
      button.addEventListener("click", () => {
        kept = kept === own ? "" : own;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other.dataset.focus === kept));
        focus(kept);
      });
    }
  }

  // A chart as a file of its own: its CSS variables are replaced by the colours that they have now.
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", async () => {
      const style = getComputedStyle(document.documentElement);
      const svg = await viewsOf(button.dataset.save + "|")[0].toSVG(1);
      save(svg.replace(/var\((--[\w-]+)\)/g, (_, name) => colourOf(style, name)), "image/svg+xml", `${button.dataset.save}.svg`);
    });
  }

  function colourOf(style, name) {
    const value = style.getPropertyValue(name).trim();
    const inner = value.match(/^var\((--[\w-]+)\)$/);
    return inner ? colourOf(style, inner[1]) : value;
  }

  function save(content, type, name) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  // The score table.
  const { command, ...tableColumns } = report.table;
  const rows = tableColumns.task.map((_, i) => Object.fromEntries(Object.entries(tableColumns).map(([key, column]) => [key, column[i]])));
  const filters = ["task", "dataset", "regime", "split", "metric", "kind"];
  const headers = [
    ["rank", "rank", "n"], ["label", "method"], ["metric", "metric"], ["mean", "mean", "n"], ["low", "95 % interval", "n"], ["n", "seeds", "n"],
    ["standing", "against the first"], ["seen", "seen"], ["regime", "regime"], ["split", "split"], ["task", "task"], ["dataset", "data set"],
  ];
  const chosen = {};
  let sorted = null, downward = false, limit = 30, open = new Set();

  function make(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }
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
      line.append(make("td", { className: "reason", colSpan: 4 }, row.reason || "no value and no reason was recorded"));
    } else {
      line.append(make("td", { className: "n" }, score(row.mean)), make("td", { className: "n" }, intervalOf(row)));
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
  drawAll();
})();
