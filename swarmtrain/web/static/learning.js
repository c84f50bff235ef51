// Both losses by tokens or by time: on the page, and in a report.
import { CurveChart } from "./charts.js";

const RARE = "not measured yet: a bootstrap or a volunteer does so now and then";
const get = (id) => document.getElementById(id);

export class LearningCharts {
  /** Draw into `#chart-held-out` and `#chart-training`; `#axis` is the choice of their axis. */
  constructor() {
    this.heldOut = new CurveChart(get("chart-held-out"), "Held-out loss", "nats per byte", RARE);
    this.training = new CurveChart(get("chart-training"), "Training loss", "nats per token");
    this.axis = "tokens";
    this.shown = null;
    get("axis").addEventListener("change", (event) => {
      this.axis = event.target.value;
      if (this.shown) this.show(this.shown);
    });
  }

  /** Show the curves `held_out`, `swarm` and `own`, each as `{tokens, time, loss}`. */
  show(learning) {
    this.shown = learning;
    get("axis").disabled = false;
    const curve = (given, name, shade, dots) => ({ name, colour: shade, x: given[this.axis], y: given.loss, dots });
    const given = (curves) => curves.filter((each) => each.x.length);
    this.heldOut.show(given([curve(learning.held_out, "held-out", "--held-out", true)]), this.axis);
    const swarm = { ...curve(learning.swarm, "median of the volunteers", "--training", false), label: true };
    const thisPeer = { ...curve(learning.own, "this peer", "--other-1", false), label: true, thin: swarm.x.length > 0 };
    this.training.show(given([thisPeer, swarm]), this.axis);
  }
}
