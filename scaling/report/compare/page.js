// Draw the panels of the report. Each is drawn once it comes into view; texts of runs are never taken as HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const DASHES = ["solid", "dash", "dot", "dashdot"];
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (group) => (dark.matches ? group.dark : group.light);
const drawn = new Set();

function traces(panel, groups) {
  return panel.curves.map((curve, index) => {
    const group = curve.group === null ? null : groups[curve.group];
    const colour = group ? colourOf(group) : curve.kind === "guide" ? token("--soft") : token("--ink");
    const dash = group ? DASHES[group.dash % 4] : curve.kind === "guide" ? "dash" : DASHES[index % 4];
    const many = panel.curves.length > 12;
    return {
      type: "scatter", x: curve.x, y: curve.y, name: escaped(curve.name),
      mode: curve.kind === "points" ? (curve.texts.length ? "markers+text" : "markers") : curve.kind === "both" ? "lines+markers" : "lines",
      text: curve.texts.map(escaped), textposition: "top center", cliponaxis: false,
      line: { color: colour, dash, width: many ? 1.3 : 1.8, shape: curve.kind === "step" ? "hv" : "linear" },
      marker: { color: colour, size: curve.kind === "points" && group ? 7 : group ? 4 : 8 },
      opacity: curve.kind === "points" && group ? 0.5 : 0.9,
      error_y: curve.errors.some(Boolean) ? { type: "data", array: curve.errors, color: colour, thickness: 1 } : undefined,
      visible: !group || group.shown, connectgaps: false,
      hovertemplate: `${escaped(panel.y_label)} %{y:.5~g}<br>${escaped(panel.x_label)} %{x:,.5~g}<extra>${escaped(curve.name)}</extra>`,
    };
  });
}

function axis(title, isLog) {
  return {
    title: { text: escaped(title), font: { size: 12 }, standoff: 6 }, type: isLog ? "log" : "linear", automargin: true,
    gridcolor: token("--line"), linecolor: token("--soft"), zeroline: false, ticks: "outside", tickcolor: token("--line"),
    dtick: undefined, exponentformat: "SI", nticks: 6,
  };
}

function layout(panel) {
  return {
    margin: { l: 10, r: 14, t: 10, b: 10 }, showlegend: false, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: token("--ink"), size: 12 },
    xaxis: axis(panel.x_label, panel.x_log), yaxis: axis(panel.y_label, panel.y_log),
    hoverlabel: { bgcolor: token("--card"), bordercolor: token("--line"), font: { color: token("--ink") }, namelength: -1 },
  };
}

function draw(place) {
  const panel = place.panel;
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
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

function chip(group, places) {
  const made = button("", group.shown, () => {
    group.shown = !group.shown;
    made.setAttribute("aria-pressed", group.shown);
    for (const place of places) if (drawn.has(place)) draw(place);
  });
  made.className = "chip";
  const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const look = { x1: 0, x2: 24, y1: 6, y2: 6, "stroke-width": 3, "stroke-dasharray": ["", "6 3", "2 3", "7 3 2 3"][group.dash % 4] };
  for (const [name, value] of Object.entries(look)) stroke.setAttribute(name, value);
  group.paint = () => stroke.setAttribute("stroke", colourOf(group));
  group.paint();
  line.append(stroke);
  made.append(line, group.label);
  return made;
}

for (const section of document.querySelectorAll("[data-task]")) {
  const task = data[Number(section.dataset.task)];
  const places = [...section.querySelectorAll(".plot")];
  for (const place of places) {
    place.panel = task.pictures[Number(place.dataset.picture)].panels[Number(place.dataset.panel)];
    place.groups = task.groups;
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
