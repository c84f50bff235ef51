// Methods beside each other: which curves are drawn, of which seed, and by which axis.
import { CurveChart } from "./charts.js";
import { make } from "./dom.js";
import { data, finish } from "./still.js";

const get = (id) => document.getElementById(id);
const { curves } = data();

/** Return a box that shows and hides a curve, beside a line as it is drawn. */
function box(curve, draw) {
  const input = make("input", { type: "checkbox", checked: curve.shown });
  input.addEventListener("change", () => {
    curve.shown = input.checked;
    draw();
  });
  const swatch = make("i");
  swatch.style.background = `var(${curve.colour})`;
  return make("label", {}, input, swatch, curve.name);
}

function begin() {
  const chart = new CurveChart(get("chart-methods"), "Held-out loss", "nats per byte");
  let axis = document.querySelector("#axis input:checked").value;
  const draw = () => {
    const seed = get("seed").value;
    const shown = curves.filter((curve) => curve.shown && curve.seeds[seed]?.loss.length);
    const drawn = shown.map(({ name, colour, dash, seeds }) => ({
      name,
      colour,
      dash: dash.length ? dash : undefined,
      x: seeds[seed][axis],
      y: seeds[seed].loss,
    }));
    chart.show(drawn, axis);
  };
  get("methods").append(...curves.map((curve) => box(curve, draw)));
  get("seed").addEventListener("change", draw);
  get("axis").addEventListener("change", (event) => {
    axis = event.target.value;
    draw();
  });
  draw();
}

finish();
if (get("chart-methods")) begin();
