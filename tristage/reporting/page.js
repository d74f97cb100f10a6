"use strict";
// Draws the figures of the page's data as they come into view, and lets people look through samples. Texts of runs are
// only ever set as textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const wide = matchMedia("(min-width: 700px)");
// Okabe and Ito's colours, told apart by people who are colour-blind.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444"];
const DARK = ["#56b4e9", "#ff9f4a", "#2fd6a3", "#e6a5cb", "#f0e442", "#8fb8ff", "#cccccc"];
const drawn = new Set();

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function faint(colour) {
  return colour + "33";
}

function traces(figure) {
  const colours = dark.matches ? DARK : LIGHT;
  const made = [];
  for (const trace of figure.traces) {
    const colour = colours[trace.colour % colours.length];
    const hover = "%{y:.4g}" + (trace.text ? "<br>%{text}" : "");
    if (trace.bars) {
      made.push({ type: "bar", name: trace.name, x: trace.x, y: trace.y, marker: { color: colour }, opacity: 0.65 });
      continue;
    }
    if (trace.bounds) {
      made.push({
        x: trace.x.slice(-trace.bounds[0].length).concat(trace.x.slice(-trace.bounds[1].length).reverse()),
        y: trace.bounds[0].concat(trace.bounds[1].slice().reverse()),
        mode: "lines", fill: "toself", fillcolor: faint(colour), line: { width: 0 }, hoverinfo: "skip", showlegend: false,
      });
    }
    const points = trace.split === "heldout" || trace.dots || trace.x.length < 2;
    made.push({
      name: trace.name, x: trace.x, y: trace.y, text: trace.text, hovertemplate: hover,
      mode: points ? "lines+markers" : "lines", yaxis: trace.axis ? "y2" : "y",
      line: { color: colour, width: points ? 2.5 : 1.2, dash: dashes(trace, figure, colours) },
      marker: { size: 6, symbol: trace.colour ? "square" : "circle" },
    });
  }
  return made;
}

// Held out is dashed where several runs share a figure; a run whose colour comes a second time is dotted.
function dashes(trace, figure, colours) {
  if (trace.colour >= colours.length) return "dot";
  return trace.split === "heldout" && figure.traces.length > 2 ? "dash" : "solid";
}

function draw(place) {
  const figure = data.figures[Number(place.dataset.figure)];
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true, fixedrange: !wide.matches };
  const layout = {
    margin: { l: 44, r: 12, t: 8, b: 36 }, height: 240, showlegend: figure.traces.length > 1 && figure.traces.length < 5,
    legend: { orientation: "h", y: 1.12, x: 0, font: { size: 11 } },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "inherit", size: 12, color: style("--text") },
    xaxis: { ...axis, title: { text: figure.x, standoff: 4, font: { size: 11 } } }, yaxis: { ...axis },
    barmode: "overlay", hovermode: figure.x === "step" ? "x unified" : "closest",
    hoverlabel: { bgcolor: style("--panel"), font: { color: style("--text") } },
  };
  if (figure.traces.some((trace) => trace.axis)) {
    layout.yaxis.title = { text: figure.traces.find((trace) => !trace.axis).name.split(", ").pop(), standoff: 4 };
    layout.yaxis2 = { ...axis, overlaying: "y", side: "right", showgrid: false, tickmode: "auto", title: { text: "grade", standoff: 4 } };
    layout.margin.r = 48;
  }
  Plotly.react(place, traces(figure), layout, { displayModeBar: false, responsive: true });
  drawn.add(place);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "300px" });
for (const place of document.querySelectorAll(".plot")) seen.observe(place);

function key() {
  const colours = dark.matches ? DARK : LIGHT;
  for (const item of document.querySelectorAll(".key li")) {
    const colour = Number(item.dataset.colour);
    item.style.setProperty("--colour", colours[colour % colours.length]);
    item.style.setProperty("--dash", colour >= colours.length ? "dotted" : "solid");
  }
}
key();
dark.addEventListener("change", () => {
  key();
  drawn.forEach(draw);
});

// -- samples -----------------------------------------------------------------------------------------------

const PAGE = 10;
const number = (value) => (Math.abs(value) < 5e-5 ? "0" : Number(value.toPrecision(4)).toString());

function element(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

function labelled(text, control) {
  control.id = `control-${document.querySelectorAll(".tools").length}-${text.replaceAll(" ", "-")}`;
  const box = element("div");
  box.append(element("label", text, { htmlFor: control.id }), control);
  return box;
}

function choices(names, text) {
  const select = element("select");
  for (const name of names) select.append(element("option", name));
  return [select, labelled(text, select)];
}

function side(title, answer) {
  const box = element("div", undefined, { className: "side" });
  const facts = ["score", "grade", "kl", "length"].filter((name) => typeof answer[name] === "number");
  const numbers = facts.map((name) => `${name} ${number(answer[name])}`);
  for (const [name, value] of Object.entries(answer.scores || {})) {
    if (Object.keys(answer.scores).length > 1) numbers.push(`${name} ${number(value)}`);
  }
  if (answer.ended === false) numbers.push("cut at the limit");
  box.append(element("h5", `${title}: ${numbers.join(", ")}`), element("p", answer.response || "(empty)"));
  return box;
}

function browse(place) {
  const samples = data.samples[Number(place.dataset.samples)];
  const [kind, kindLabel] = choices(Object.keys(samples), "Which");
  const [key, keyLabel] = choices(["order in the file", "score", "grade", "kl", "length", "gain of score"], "Sort by");
  const [order, orderLabel] = choices(["highest first", "lowest first"], "Order");
  const filter = element("input", undefined, { type: "search", size: 24 });
  const tools = element("div", undefined, { className: "tools" });
  tools.append(kindLabel, keyLabel, orderLabel, labelled("Only with this text", filter));
  const list = element("div");
  const back = element("button", "Previous", { type: "button" });
  const on = element("button", "Next", { type: "button" });
  const where = element("span", "", { className: "muted" });
  where.setAttribute("role", "status");
  const pages = element("div", undefined, { className: "pages" });
  pages.append(back, on, where);
  place.append(tools, list, pages);
  let first = 0;

  function value(item) {
    const after = item.answers[item.answers.length - 1][1];
    if (key.value === "gain of score") return after.score - item.answers[0][1].score;
    return after[key.value];
  }

  function show() {
    const wanted = filter.value.toLowerCase();
    const has = (item) => [item.prompt, ...item.answers.map((answer) => answer[1].response)].join("\n").toLowerCase().includes(wanted);
    const found = samples[kind.value].filter(has);
    if (key.value !== "order in the file") {
      const sign = order.value === "highest first" ? -1 : 1;
      found.sort((a, b) => sign * ((value(a) ?? -sign * Infinity) - (value(b) ?? -sign * Infinity)));
    }
    first = Math.min(first, Math.max(0, found.length - 1));
    first -= first % PAGE;
    list.replaceChildren(...found.slice(first, first + PAGE).map((item) => {
      const box = element("article", undefined, { className: "sample" });
      box.append(element("p", item.prompt));
      const sides = element("div", undefined, { className: "sides" });
      for (const [title, answer] of item.answers) sides.append(side(title, answer));
      box.append(sides);
      return box;
    }));
    where.textContent = found.length ? `${first + 1} to ${Math.min(first + PAGE, found.length)} of ${found.length}` : "none has this text";
    back.disabled = first === 0;
    on.disabled = first + PAGE >= found.length;
  }

  back.addEventListener("click", () => { first -= PAGE; show(); });
  on.addEventListener("click", () => { first += PAGE; show(); });
  for (const control of [kind, key, order, filter]) {
    control.addEventListener("input", () => { first = 0; show(); });
  }
  show();
}
for (const place of document.querySelectorAll(".samples")) browse(place);

// -- a page that is written again while a run goes on -------------------------------------------------------

if (data.reload) {
  const kept = sessionStorage.getItem("scroll");
  if (kept !== null) scrollTo(0, Number(kept));
  setTimeout(() => { sessionStorage.setItem("scroll", String(scrollY)); location.reload(); }, 1000 * data.reload);
}
