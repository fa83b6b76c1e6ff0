// Charts by uPlot: colours from the style sheet, a key that tells the figures under the pointer.
import { clock, el, setText } from "./drawing.js";

const uPlot = window.uPlot;
const HEIGHT = 150;
const COLOURS = ["--blue", "--amber-fill", "--red-fill", "--violet", "--teal", "--soft"];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function faint(name) {
  const [r, g, b] = colour(name).match(/\w\w/g).map((pair) => parseInt(pair, 16));
  return `rgba(${r}, ${g}, ${b}, 0.18)`;
}

export class Chart {
  // series: {label, colour (an index), dash, fill, bars, shown (false: only an edge of a band)}; bands: [upper, lower, colour]
  constructor(figure, { title, unit, series, bands = [], format, synced = true }) {
    this.figure = figure;
    this.options = { title, series, bands, format, synced };
    this.values = series.map(() => el("b", { text: "–" }));
    const keys = series
      .map((it, index) => [it, el("span", { class: `key c${it.colour}` }, `${it.label} `, this.values[index])])
      .filter(([it]) => it.shown !== false)
      .map(([, key]) => key);
    this.place = el("div", { class: "plot", role: "img" });
    figure.replaceChildren(
      el("figcaption", {}, el("h3", {}, `${title} `, el("span", { class: "unit", text: unit })), el("div", { class: "keys" }, ...keys)),
      this.place,
    );
    this.data = [[], ...series.map(() => [])];
    this.range = null;
    new ResizeObserver(() => this.resize()).observe(this.place);
    this.draw();
  }

  draw() {
    this.plot?.destroy();
    const { series, bands, format, synced } = this.options;
    const soft = colour("--soft");
    const line = colour("--line");
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: soft, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    this.plot = new uPlot(
      {
        width: Math.max(this.place.clientWidth, 100),
        height: HEIGHT,
        padding: [6, 24, 0, 0],
        legend: { show: false },
        cursor: { points: { size: 6 }, drag: { x: false, y: false }, sync: synced ? { key: "past" } : undefined },
        scales: {
          x: { range: (_, low, high) => this.range ?? [low, high] },
          y: { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1] },
        },
        axes: [
          { ...axis, size: 24, space: 76, values: (_, ticks, __, ___, step) => ticks.map((at) => tick(at, step)) },
          { ...axis, size: 52, space: 26, values: (_, ticks) => ticks.map(format) },
        ],
        series: [
          {},
          ...series.map((it) => ({
            label: it.label,
            stroke: it.shown === false ? "transparent" : colour(COLOURS[it.colour]),
            width: it.shown === false ? 0 : 1.5,
            dash: it.dash ? [5, 4] : undefined,
            fill: it.fill ? faint(COLOURS[it.colour]) : undefined,
            points: { show: it.points === true },
            spanGaps: it.dash === true || it.spans === true,
          })),
        ],
        bands: bands.map(([upper, lower, index]) => ({ series: [upper, lower], fill: faint(COLOURS[index]) })),
        hooks: { setCursor: [() => this.tell()] },
      },
      this.data,
      this.place,
    );
    this.tell();
  }

  set(data, range = null) {
    this.range = range;
    this.data = data;
    this.plot.setData(data);
    this.tell();
  }

  resize() {
    const width = this.place.clientWidth;
    if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  // The figures under the pointer, else the latest.
  tell() {
    const { title, series, format } = this.options;
    const pointed = this.plot.cursor.idx;
    const told = series.map((it, index) => {
      const column = this.data[index + 1];
      const value = pointed === null || pointed === undefined ? latest(column) : column[pointed];
      const text = value === null || value === undefined ? "–" : format(value);
      setText(this.values[index], text);
      return `${it.label} ${text}`;
    });
    const at = this.data[0][pointed ?? this.data[0].length - 1];
    this.place.setAttribute("aria-label", `${title}${at === undefined ? "" : ` at ${clock(at)}`}: ${told.join(", ")}`);
  }
}

function tick(at, step) {
  const date = new Date(at * 1000);
  const time = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (step >= 86_400) return date.toLocaleDateString("en", { weekday: "short", day: "numeric" });
  if (step < 60) return date.toLocaleTimeString("en", { ...time, second: "2-digit" });
  return date.toLocaleTimeString("en", time);
}

function latest(column) {
  for (let index = column.length - 1; index >= 0; index -= 1) {
    if (column[index] !== null && column[index] !== undefined) return column[index];
  }
  return null;
}
