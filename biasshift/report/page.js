// Draws the charts of the page, again when the system changes between light and dark, or to another scale. What is chosen on the page reaches
// the charts through Vega's own bindings; the two listeners below bring a click on the heat map, and a new quantity, to the page.
const page = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const select = (id) => document.getElementById(id);
const choose = (id, value) => {
  select(id).value = String(value);
  select(id).dispatchEvent(new Event("input"));
};
// Vega changes the rows in place, so that every chart gets its own.
const rows = ({ names, rows }) => rows.map((row) => Object.fromEntries(names.map((name, i) => [name, row[i]])));
const datasets = () => Object.fromEntries(Object.entries(page.datasets).map(([name, table]) => [name, rows(table)]));

const every = Object.fromEntries([...document.querySelectorAll("select")].map((one) => [one.id, [...one.options]]));

function offer(id, values, otherwise) {
  const before = select(id).value;
  select(id).replaceChildren(...every[id].filter((option) => values.includes(Number(option.value))));
  if (values.includes(Number(before))) select(id).value = before;
  else choose(id, otherwise);
}

function offerMeasured() {
  const { layers, steps } = page.measured[select("quantity").value];
  offer("layer", [-1, ...layers], -1);
  offer("step", steps, steps[steps.length - 1]);
}

let drawn = [];
async function draw() {
  for (const chart of drawn.splice(0)) chart.finalize();
  const chosen = Object.entries(page.variants).map(([id, options]) => options[select(id)?.value]);
  const charts = Object.assign({}, page.charts, ...chosen);
  for (const [place, spec] of Object.entries(charts)) {
    const chart = await vegaEmbed("#" + place, { ...spec, datasets: datasets() }, {
      ast: true, // expressions are interpreted, not compiled: the page's policy forbids making code from text
      renderer: "svg",
      config: page.themes[dark.matches ? "dark" : "light"],
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    drawn.push(chart);
    if (place === "heat") {
      chart.view.addSignalListener("cell", (_, { l, s }) => {
        if (l) choose("layer", l[0]);
        if (s) choose("step", s[0]);
      });
    }
  }
  document.body.dataset.drawn = [dark.matches ? "dark" : "light", ...Object.keys(page.variants).map((id) => select(id)?.value)].join(" ");
}

if (select("quantity")) {
  select("quantity").addEventListener("input", offerMeasured);
  offerMeasured();
}
addTools(page.exports);
let drawing = draw();
const again = () => (drawing = drawing.then(draw));
dark.addEventListener("change", again);
for (const id of Object.keys(page.variants)) select(id)?.addEventListener("input", again);
