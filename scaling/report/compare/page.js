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

function traces(panel, groups) {
  const drawn = panel.curves.map((curve) => {
    const group = curve.group === null ? null : groups[curve.group];
    const colour = group ? colourOf(group) : curve.kind === "guide" ? token("--soft") : token("--ink");
    const dash = curve.kind === "guide" ? "dot" : DASHES[(group ? group.dash : curve.dash) % 4];
    const many = panel.curves.length > 12;
    return {
      type: "scatter", x: curve.x, y: curve.y, name: escaped(curve.name),
      mode: curve.kind === "points" ? (curve.texts.length ? "markers+text" : "markers") : curve.kind === "both" ? "lines+markers" : "lines",
      text: curve.texts.map(escaped), textposition: towardsMiddle(panel, curve), cliponaxis: false,
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

// The side of a point on which its text doesn't leave the axes.
function towardsMiddle(panel, curve) {
  if (!curve.texts.length) return "top center";
  const scale = (x) => (panel.x_log ? Math.log(x) : x);
  const places = panel.curves.flatMap((other) => other.x).map(scale);
  const [low, high] = [Math.min(...places), Math.max(...places)];
  const nth = panel.curves.filter((other) => other.texts.length).indexOf(curve);
  return `${nth % 2 ? "bottom" : "top"} ${scale(curve.x[0]) - low > (high - low) / 2 ? "left" : "right"}`;
}

function axis(title, isLog, ticks) {
  return {
    ...(ticks.length ? { tickmode: "array", tickvals: ticks, ticktext: ticks.map((tick) => tick.toLocaleString("en")) } : { nticks: 6 }),
    title: { text: escaped(title), font: { size: 12 }, standoff: 6 }, type: isLog ? "log" : "linear", automargin: true,
    gridcolor: token("--line"), linecolor: token("--soft"), zeroline: false, ticks: "outside", tickcolor: token("--line"),
    exponentformat: "SI",
  };
}

function layout(panel) {
  return {
    margin: { l: 10, r: 14, t: 10, b: 10 }, showlegend: false, hovermode: "closest", dragmode: coarse ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: token("--ink"), size: 12 },
    xaxis: axis(panel.x_label, panel.x_log, panel.x_ticks), yaxis: axis(panel.y_label, panel.y_log, []),
    hoverlabel: { bgcolor: token("--card"), bordercolor: token("--line"), font: { color: token("--ink") }, namelength: -1 },
  };
}

function draw(place) {
  const panel = place.panel;
  const config = { responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  drawn.add(place);
  Plotly.react(place, traces(panel, place.groups), layout(panel), config);
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
