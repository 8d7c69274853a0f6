// Draw the panels of the report. Each is drawn once it comes into view; texts of runs are never taken as HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const coarse = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page rather than zooming
const dark = matchMedia("(prefers-color-scheme: dark)");
const MARKERS = ["circle", "triangle-up", "square", "diamond"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
// Plotly takes %{…} in a template for a value.
const inTemplate = (text) => escaped(text).replace(/%/g, "&#37;");
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (group) => (dark.matches ? group.dark : group.light);
const drawn = new Set();

function traces(panel, groups, width) {
  const sides = sidesOfTexts(panel, groups, width);
  const drawn = panel.curves.map((curve) => {
    const group = curve.group === null ? null : groups[curve.group];
    const colour = group ? colourOf(group) : curve.kind === "guide" ? token("--soft") : token("--ink");
    const dash = curve.kind === "guide" ? "dot" : DASHES[(group ? group.dash : curve.dash) % 4];
    if (curve.kind === "band") {
      return { type: "scatter", mode: "lines", x: curve.x, y: curve.y, name: escaped(curve.name), line: { width: 0 }, fill: "toself", fillcolor: group ? colour + "30" : token("--shade"), hoverinfo: "skip", visible: !group || group.shown };
    }
    const many = panel.curves.length > 12;
    return {
      type: "scatter", x: curve.x, y: curve.y, name: escaped(curve.name),
      mode: curve.kind === "points" ? (curve.texts.length ? "markers+text" : "markers") : curve.kind === "both" ? "lines+markers" : "lines",
      text: curve.texts.map(escaped), textposition: sides.get(curve) ?? "top center", cliponaxis: false,
      line: { color: colour, dash, width: many ? 1.3 : 1.8, shape: curve.kind === "step" ? "hv" : "linear" },
      marker: { color: colour, size: curve.texts.length ? 10 : curve.kind === "points" ? 7 : group ? 4 : 8, symbol: curve.kind === "points" ? MARKERS[curve.dash % 4] : "circle" },
      opacity: curve.kind === "points" && !curve.texts.length ? 0.5 : 0.9,
      error_y: curve.errors.some(Boolean) ? { type: "data", array: curve.errors, color: colour, thickness: 1 } : undefined,
      visible: !group || group.shown, connectgaps: false,
      hovertemplate: `${inTemplate(panel.y_label)} %{y:.5~g}<br>${inTemplate(panel.x_label)} %{x:,.5~g}<extra>${inTemplate(curve.name)}</extra>`,
    };
  });
  return [...drawn, ...panel.curves.filter((curve) => curve.mark).map((curve) => cross(curve, groups[curve.group]))];
}

// A cross at the end of a run that failed.
function cross(curve, group) {
  let last = curve.y.length - 1;
  while (last >= 0 && curve.y[last] === null) last -= 1;
  return {
    type: "scatter", mode: "markers", x: [curve.x[last]], y: [curve.y[last]], visible: group.shown && last >= 0,
    marker: { symbol: "x-thin-open", size: 11, color: colourOf(group), line: { width: 2.5 } },
    hovertemplate: `${inTemplate(curve.mark)}<extra>${inTemplate(curve.name)}</extra>`,
  };
}

// The side of each point on which its text stays within the axes, and clear of the texts before it.
function sidesOfTexts(panel, groups, width) {
  const places = (name) => {
    const scale = panel[`${name}_log`] ? Math.log : Number;
    const values = panel.curves.flatMap((curve) => curve[name]).filter((value) => value !== null).map(scale);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return (curve) => (scale(curve[name][0]) - low) / (high - low || 1);
  };
  const [across, up] = [places("x"), places("y")];
  const shown = panel.curves.filter((curve) => curve.texts.length && groups[curve.group].shown);
  const sides = new Map(), taken = [];
  for (const curve of shown.sort((one, other) => across(one) - across(other))) {
    const [x, wide, left] = [across(curve), (7 * curve.texts[0].length) / width, across(curve) > 0.5];
    const box = (side) => ({ from: left ? x - wide : x, to: left ? x : x + wide, y: up(curve) + (side === "top" ? 0.06 : -0.06) });
    const free = (one) => taken.every((other) => one.to < other.from || one.from > other.to || Math.abs(one.y - other.y) > 0.08);
    const side = ["top", "bottom"].find((name) => free(box(name))) ?? "top";
    taken.push(box(side));
    sides.set(curve, `${side} ${left ? "left" : "right"}`);
  }
  return sides;
}

// Whole numbers at a logarithmic axis: 1, 2, 5, 10 over up to two decades, powers of ten over more.
function logTicks(values) {
  const known = values.filter((value) => value > 0);
  const low = Math.min(...known), decades = Math.log10(Math.max(...known) / low);
  return { tickformat: low >= 1 ? "~s" : ",~g", dtick: decades < 0.8 || decades > 6 ? undefined : decades < 2.2 ? "D2" : 1 };
}

function axis(title, isLog, ticks, values) {
  return {
    ...(isLog ? logTicks(values) : {}),
    ...(ticks.length ? { tickmode: "array", tickvals: ticks, ticktext: ticks.map((tick) => tick.toLocaleString("en")) } : { nticks: 6 }),
    title: { text: escaped(title), font: { size: 12 }, standoff: 6 }, type: isLog ? "log" : "linear", automargin: true,
    gridcolor: token("--line"), linecolor: token("--soft"), zeroline: false, ticks: "outside", tickcolor: token("--line"),
    exponentformat: "SI", separatethousands: true,
  };
}

function layout(panel) {
  return {
    margin: { l: 10, r: 14, t: 10, b: 10 }, showlegend: false, hovermode: "closest", dragmode: coarse ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: token("--ink"), size: 12 },
    xaxis: axis(panel.x_label, panel.x_log, panel.x_ticks, panel.curves.flatMap((curve) => curve.x)),
    yaxis: axis(panel.y_label, panel.y_log, [], panel.curves.flatMap((curve) => curve.y)),
    hoverlabel: { bgcolor: token("--card"), bordercolor: token("--line"), font: { color: token("--ink") }, namelength: -1 },
  };
}

function draw(place) {
  const panel = place.panel;
  const config = { responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  drawn.add(place);
  Plotly.react(place, traces(panel, place.groups, place.clientWidth), layout(panel), config);
}

const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
}, { rootMargin: "300px" });

function button(text, pressed, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", () => act(made));
  return made;
}

function axisButton(place, name) {
  const key = `${name}_log`;
  const text = () => `${name}: ${place.panel[key] ? "log" : "linear"}`;
  return button(text(), place.panel[key], (made) => {
    place.panel[key] = !place.panel[key];
    made.textContent = text();
    made.setAttribute("aria-pressed", place.panel[key]);
    draw(place);
  });
}

// Name the lines of a panel that belong to no group.
function legend(place) {
  for (const curve of place.panel.curves.filter((one) => one.group === null && one.label)) {
    const entry = document.createElement("span");
    entry.append(sample(curve.kind === "guide" ? 2 : curve.dash, "currentColor"), curve.label);
    place.parentElement.querySelector(".legend").append(entry);
  }
}

function sample(dash, colour) {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const look = { x1: 0, x2: 24, y1: 6, y2: 6, "stroke-width": 3, stroke: colour, "stroke-dasharray": ["", "6 3", "2 3", "7 3 2 3"][dash % 4] };
  for (const [name, value] of Object.entries(look)) stroke.setAttribute(name, value);
  line.append(stroke);
  return line;
}

function chip(group, places) {
  const made = button("", group.shown, () => {
    group.shown = !group.shown;
    made.setAttribute("aria-pressed", group.shown);
    for (const place of places) if (drawn.has(place)) draw(place);
  });
  made.className = "chip";
  const line = sample(group.dash, colourOf(group));
  group.paint = () => line.firstChild.setAttribute("stroke", colourOf(group));
  made.append(line, group.label);
  return made;
}

for (const section of document.querySelectorAll("[data-task]")) {
  const task = data[Number(section.dataset.task)];
  const places = [...section.querySelectorAll(".plot")];
  for (const place of places) {
    place.panel = task.pictures[Number(place.dataset.picture)].panels[Number(place.dataset.panel)];
    place.groups = task.groups;
    legend(place);
    place.parentElement.querySelector(".axes").append(axisButton(place, "x"), " ", axisButton(place, "y"));
    inView.observe(place);
  }
  const chips = section.querySelector(".chips");
  if (task.groups.length > 1) chips.append(...task.groups.map((group) => chip(group, places)));
  else chips.remove();
}

dark.addEventListener("change", () => {
  for (const task of data) for (const group of task.groups) group.paint?.();
  for (const place of drawn) draw(place);
});
