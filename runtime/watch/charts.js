"use strict";
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg", DASH = "–", N_SERIES = 8;

function make(parent, name, attributes = {}, text) {
  const element = parent instanceof SVGElement || name === "svg" ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}
const say = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };

function seconds(s, digits = 3) {
  if (s === null || s === undefined) return DASH;
  if (Math.abs(s) >= 120) return s >= 7200 ? (s / 3600).toFixed(1) + " h" : (s / 60).toFixed(0) + " min";
  const [x, unit] = Math.abs(s) >= 1 ? [s, "s"] : Math.abs(s) >= 1e-3 || s === 0 ? [s * 1e3, "ms"] : [s * 1e6, "µs"];
  return `${Math.abs(x) >= 10 ** (digits - 1) ? x.toFixed(0) : x.toPrecision(digits)} ${unit}`;
}
const value = x => x === null ? "NaN" : Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : x.toFixed(3);
const percent = p => p === null || p === undefined ? DASH : p > .995 && p < 1 ? "> 99 %" : `${(100 * p).toFixed(0)} %`;

function bytes(n) {
  const [scale, unit] = n >= 1e12 ? [1e12, "TB"] : n >= 1e9 ? [1e9, "GB"] : n >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(n / scale).toPrecision(3)} ${unit}`;
}

// The clock on the wall; `at` is in seconds since 1970.
function clock(at, digits = 0) {
  const date = new Date(at * 1000), two = n => String(n).padStart(2, "0");
  const fraction = digits ? (date.getMilliseconds() / 1000).toFixed(digits).slice(1) : "";
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}${fraction}`;
}

const nice = x => { const ten = 10 ** Math.floor(Math.log10(x)), m = x / ten; return (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10) * ten; };

// A chart is as many units large as it has pixels, so that its text is never stretched.
class Chart {
  constructor(svg, {left = 48, right = 10, top = 8, bottom = 20} = {}) {
    this.svg = svg;
    const width = Math.max(120, svg.clientWidth), height = Math.max(60, svg.clientHeight);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    this.box = {x0: left, x1: width - right, y0: top, y1: height - bottom};
  }

  times(from, to) {
    this.from = from;
    this.span = to - from || 1;
  }

  values(low, high) {
    this.low = low;
    this.range = high - low || 1;
  }

  x(time) { return this.box.x0 + (time - this.from) / this.span * (this.box.x1 - this.box.x0); }
  y(v) { return this.box.y1 - (v - this.low) / this.range * (this.box.y1 - this.box.y0); }

  // Ticks stand at round times of the wall; `wall` seconds bring times of the decoder to it.
  timeAxis(wall) {
    const {x0, x1, y0, y1} = this.box, most = Math.max(2, Math.floor((x1 - x0) / 90));
    const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600].find(s => this.span / s <= most) ?? 1800;
    make(this.svg, "line", {class: "rule", x1: x0, x2: x1, y1, y2: y1});
    for (let at = Math.ceil((this.from + wall) / step) * step; at - wall <= this.from + this.span; at += step) {
      const x = this.x(at - wall), anchor = x < x0 + 28 ? "start" : x > x1 - 28 ? "end" : "middle";
      make(this.svg, "line", {class: "rule", x1: x, x2: x, y1: y0, y2: y1 + 4});
      make(this.svg, "text", {class: "tick time", x, y: y1 + 16, "text-anchor": anchor}, clock(at));
    }
  }

  valueAxis(ticks, write) {
    const {x0, x1} = this.box;
    for (const tick of ticks) {
      const y = this.y(tick);
      make(this.svg, "line", {class: "rule", x1: x0, x2: x1, y1: y, y2: y});
      make(this.svg, "text", {class: "tick", x: x0 - 6, y: y + 4, "text-anchor": "end"}, write(tick));
    }
  }

  // Ticks at round values within the limits.
  ticks(n = 4) {
    const step = nice(this.range / n), found = [];
    for (let k = Math.ceil(this.low / step - 1e-9); k * step <= this.low + this.range + 1e-9 * step; k++) found.push(k * step);
    return found;
  }

  // Events that share a place share a line; their names are written where they have room.
  marks(marks) {
    let free = -Infinity;
    for (const [time, name] of marks) {
      if (time < this.from || time > this.from + this.span) continue;
      const x = this.x(time), {y0, y1, x1} = this.box;
      const line = make(this.svg, "line", {class: "mark", x1: x, x2: x, y1: y0, y2: y1});
      make(line, "title", {}, name);
      const short = name.length > 18 ? name.slice(0, 17) + "…" : name, width = 6.2 * short.length;
      if (x > free && x + width < x1) {
        make(this.svg, "text", {class: "name", x: x - 2, y: y0 - 6}, short);
        free = x + width + 8;
      }
    }
  }

  // Rows are [time, number or null, whether a line leads here from the row before].
  line(rows, series, dots) {
    let points = [];
    const end = () => {
      if (points.length > 1) make(this.svg, "polyline", {class: `s${series}`, points: points.join(" ")});
      points = [];
    };
    const most = 2 * (this.box.x1 - this.box.x0), step = Math.max(1, Math.floor(rows.length / most));
    rows.forEach(([time, v, joined], n) => {
      if (v === null || !joined) end();
      if (v === null) return;
      const x = this.x(time).toFixed(1), y = this.y(v).toFixed(1);
      if (dots) make(this.svg, "circle", {class: `dot s${series}`, cx: x, cy: y, r: 3.5});
      else if (!(n % step) || n === rows.length - 1) points.push(`${x},${y}`);
    });
    end();
  }
}
