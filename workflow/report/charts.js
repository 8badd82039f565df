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

  // What an input steers: one chart, or all charts within an element.
  function viewsFor(input) {
    if (!input.dataset.within) return viewsOf(input.dataset.chart + "|");
    const elements = [...document.querySelectorAll(`#${CSS.escape(input.dataset.within)} .chart`)];
    return elements.map((element) => views.get(element.id + "|" + element.dataset.source)).filter(Boolean);
  }

  for (const input of document.querySelectorAll("[data-signal]")) {
    input.addEventListener("change", () => {
      const value = input.type === "checkbox" ? input.checked : input.value;
      for (const view of viewsFor(input)) view.signal(input.dataset.signal, value).runAsync();
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

  function make(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  window.cellmill = { report, save, make };
  drawAll();
})();
