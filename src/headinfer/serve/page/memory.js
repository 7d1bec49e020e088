// A live picture of memory: where the KV is, how it grows, and how fast it moves.

import {byId, make, makeSvg, setText} from "./dom.js";
import {byteRate, bytes, tokenRate} from "./format.js";

const POINTS = 120; // one a second
const FEWEST = 30; // that a chart has room for
const WIDTH = 240;
const HEIGHT = 40;
const PLACES = [
  ["device_kv_bytes", "On the device", "KV on the device"],
  ["host_kv_bytes", "In host memory", "KV in host memory"],
  ["disk_kv_bytes", "On disk", "KV on disk"],
];

export class Memory {
  constructor() {
    this.points = new Map(PLACES.map(([key]) => [key, []]));
    this.gauges = new Map();
    for (const [key, label, description] of PLACES) {
      const value = make("b", {});
      const note = make("span", {class: "quiet"});
      const fill = make("span", {class: "fill"});
      const area = makeSvg("path", {class: "area"});
      const line = makeSvg("path", {class: "line"});
      const chart = makeSvg(
        "svg",
        {class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img"},
        area,
        line,
      );
      chart.setAttribute("aria-label", `${description} in the last two minutes`);
      byId("gauges").append(
        make(
          "div",
          {class: "gauge"},
          make("p", {class: "gauge-head"}, make("span", {}, label), value, note),
          make("div", {class: "bar", "aria-hidden": "true"}, fill),
          chart,
        ),
      );
      this.gauges.set(key, {value, note, fill, area, line});
    }
    this.rates = ["Tokens", "Link", "CPU"].map((label) => {
      const number = make("b", {}, "0");
      const unit = make("span", {});
      byId("rates").append(make("div", {}, make("dt", {}, label), make("dd", {}, number, unit)));
      return {number, unit};
    });
  }

  update(state) {
    // One scale for all three bars, so that their lengths can be compared.
    const scale = Math.max(1, ...PLACES.map(([key]) => state[key]));
    for (const [key] of PLACES) {
      const points = this.points.get(key);
      points.push(state[key]);
      if (points.length > POINTS) points.shift();
      const gauge = this.gauges.get(key);
      setText(gauge.value, bytes(state[key]));
      gauge.fill.hidden = state[key] === 0;
      gauge.fill.style.setProperty("--share", `${state[key] / scale}`);
      this.draw(gauge, points);
    }
    const budget = state.device_kv_budget_bytes;
    setText(this.gauges.get("device_kv_bytes").note, budget ? `of ${bytes(budget)}` : "");
    const values = [
      [tokenRate(state.tokens_per_s), "/s"],
      byteRate(state.link_bytes_per_s),
      byteRate(state.cpu_bytes_per_s),
    ];
    values.forEach(([number, unit], index) => {
      setText(this.rates[index].number, number);
      setText(this.rates[index].unit, unit);
    });
  }

  // A line from the oldest point to the newest one at the right edge. Each chart has its own scale, from 0.
  draw({area, line}, points) {
    const most = Math.max(1, ...points);
    const step = WIDTH / (Math.max(FEWEST, points.length) - 1);
    const x = (index) => WIDTH - (points.length - 1 - index) * step;
    const y = (value) => HEIGHT - 2 - (value / most) * (HEIGHT - 5);
    const path = points.map((value, index) => `${x(index).toFixed(1)} ${y(value).toFixed(1)}`).join(" L");
    line.setAttribute("d", `M${path}`);
    area.setAttribute("d", `M${x(0).toFixed(1)} ${HEIGHT} L${path} L${WIDTH} ${HEIGHT} Z`);
  }
}
