"use strict";
// Draws the charts, follows light and dark, and filters charts and tables. Text from the job is only ever compared
// and hidden here, never turned into markup.

const root = document.documentElement;
const charts = []; // {plot, spec}

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function paint() {
  const style = getComputedStyle(root);
  const [ink, soft, grid] = ["--ink", "--soft", "--grid"].map((name) => style.getPropertyValue(name).trim());
  for (const { plot } of charts) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.axis_label_text_color = ink;
      axis.major_label_text_color = ink;
      axis.axis_line_color = soft;
      axis.major_tick_line_color = soft;
      axis.minor_tick_line_color = null;
      axis.axis_label_text_font_style = "normal";
    }
    for (const part of plot.center) {
      if (part.grid_line_color) part.grid_line_color = grid;
    }
  }
}

function chosen(job, name) {
  return job.querySelector(`select[data-filter="${name}"]`)?.value ?? "";
}

function applyFilters(job) {
  const node = chosen(job, "node");
  const device = chosen(job, "device");
  const fits = (host, dev) => (!node || !host || host === node) && (!device || !dev || dev === device);
  const classes = new Set([...job.querySelectorAll("input[data-class]:checked")].map((box) => box.dataset.class));
  const groups = new Set([...job.querySelectorAll("input[data-class]:checked")].map((box) => box.dataset.group));
  for (const { plot, spec } of charts) {
    if (spec.job !== job.id) continue;
    const shown = spec.lanes.filter((lane) => fits(lane.host, lane.device));
    const names = new Set(shown.map((lane) => lane.name));
    for (const part of plot.renderers) {
      const [kind, value] = (part.name ?? "").split(":");
      if (kind === "lane") part.visible = names.has(part.name);
      if (kind === "class") part.visible = classes.has(value);
      if (kind === "group") part.visible = groups.has(value);
    }
    if (spec.key === "work" || spec.key === "shares") {
      plot.y_range.factors = shown.map((lane) => lane.label).reverse();
    }
  }
  for (const part of job.querySelectorAll("tr[data-host], li[data-host], tr[data-class]")) {
    const { host, device } = part.dataset;
    const away = part.dataset.class ? !classes.has(part.dataset.class) : !fits(host, device);
    part.dataset.away = away ? "1" : "";
    part.hidden = away;
  }
  for (const box of job.querySelectorAll("input[data-search]")) search(box);
}

function search(box) {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const items = [...document.getElementById(box.dataset.search).querySelectorAll("tbody tr, li")];
  let shown = 0;
  for (const item of items) {
    const text = (item.querySelector(".prompt") ?? item).textContent.toLowerCase();
    item.hidden = item.dataset.away === "1" || !words.every((word) => text.includes(word));
    shown += !item.hidden;
  }
  const count = box.parentElement.querySelector("output");
  if (count) count.textContent = `${shown} of ${items.length}`;
}

async function draw() {
  for (const spec of JSON.parse(document.getElementById("report-charts").textContent)) {
    await Bokeh.embed.embed_item(spec.item, spec.target);
    charts.push({ spec, plot: Bokeh.documents[Bokeh.documents.length - 1].roots()[0] });
  }
  paint();
  for (const job of document.querySelectorAll("section.job")) {
    job.addEventListener("change", () => applyFilters(job));
    job.addEventListener("input", (event) => event.target.dataset.search && search(event.target));
    applyFilters(job);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    paint();
  });
  root.dataset.ready = "1";
}

draw();
