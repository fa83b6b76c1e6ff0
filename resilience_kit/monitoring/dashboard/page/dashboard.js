// The page: figures once a second from the stream, the past from the server when a range is chosen.
import { Chart } from "./charts.js";
import { clock, compact, count, dollars, el, keyed, seconds, setClass, setText } from "./drawing.js";

const RANGES = ["minute", "hour", "day", "week"];
// The server tells one figure a second: after so long without, something is wrong with the link.
const LOST_AFTER_MS = 3_000;
const TRY_AGAIN_MS = 1_000;
const PAST_EVERY_MS = { minute: 5_000, hour: 10_000, day: 60_000, week: 60_000 };
const NEAR = 0.8;

const $ = (id) => document.getElementById(id);
let range = RANGES.includes(localStorage.getItem("range")) ? localStorage.getItem("range") : "hour";
let process = "";
let source = null;
let newest = null;
let heardAt = 0;
let pastAsked = 0;
let past = null;

/* The link to the server */

function listen() {
  source?.close();
  source = new EventSource(`events?process=${encodeURIComponent(process)}`);
  source.onmessage = (event) => {
    heardAt = performance.now();
    show(JSON.parse(event.data));
  };
  source.onerror = () => {
    // The browser comes back by itself where the connection broke, but not after an answer that is no stream.
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(listenAgain, TRY_AGAIN_MS);
    }
  };
}

async function listenAgain() {
  const answer = await fetch("api/now", { cache: "no-store" }).catch(() => null);
  // The session is over: the login form is here.
  if (answer?.status === 401) location.reload();
  else if (!document.hidden) listen();
}

function watchLink() {
  const isLost = performance.now() - heardAt > LOST_AFTER_MS;
  const hasStarted = newest !== null;
  setClass($("link"), "live", hasStarted && !isLost);
  setClass($("link"), "lost", hasStarted && isLost);
  setClass(document.body, "stale", hasStarted && isLost);
  setText($("link"), !hasStarted ? "connecting" : isLost ? `no answer since ${clock(newest.at)}` : "live");
}

// Nobody looks at a hidden page: the server need not work for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    source?.close();
    return;
  }
  listen();
  askPast();
});

/* What the server tells */

function show(figures) {
  newest = figures;
  watchLink();
  setText($("title"), figures.title);
  const circuits = figures.circuits.filter((it) => it.state !== "CLOSED");
  const wrong = figures.alerts.filter((it) => !it.silenced).length + circuits.length;
  document.title = wrong > 0 ? `(${wrong}) ${figures.title}` : figures.title;
  showProcesses(figures);
  showWrong(figures, circuits);
  showLimits(figures);
  showAgents(figures.agents);
  showForecast(figures.forecast);
  showCosts(figures.costs);
  setText($("footer"), figures.footer);
  if (range === "minute") extendMinute(figures.second);
}

function showProcesses({ processes }) {
  $("process-choice").hidden = processes.length < 2;
  const options = [["", `all ${processes.length}`], ...processes.map((name) => [name, name])];
  keyed($("process"), options, ([value]) => value, ([value]) => el("option", { value }), (option, [value, text]) => {
    setText(option, text);
    if (option.selected !== (value === process)) option.selected = value === process;
  });
}

function showWrong({ notes, alerts, circuits, limits, has_controls: hasControls }, notClosed) {
  const open = notClosed.filter((it) => it.state === "OPEN");
  const full = limits.filter((it) => it.waiting > 0);
  const loud = alerts.filter((it) => !it.silenced);
  const critical = loud.filter((it) => it.severity === "critical");
  const verdict = $("verdict");
  const isIll = open.length > 0 || critical.length > 0;
  const isUneasy = !isIll && (notes.length > 0 || loud.length > 0 || notClosed.length > 0);
  const headline = [
    open.length > 0 ? `${list(open)} ${open.length === 1 ? "is" : "are"} open: calls are refused` : null,
    loud.length > 0 ? `${loud.length} ${loud.length === 1 ? "alert" : "alerts"}` : null,
    open.length === 0 && notClosed.length > 0 ? `${list(notClosed)} on trial` : null,
    notes.length > 0 ? "Not all is known" : null,
  ].filter((it) => it !== null);
  const waiting = full.reduce((sum, it) => sum + it.waiting, 0);
  const aside = waiting > 0 ? `${count(waiting)} ${waiting === 1 ? "call waits" : "calls wait"} for quota, as they should.` : "";
  const text = headline.length > 0 ? `${headline.join(", ")}.` : "All is well.";
  if (verdict.dataset.told !== text + aside) {
    verdict.dataset.told = text + aside;
    verdict.replaceChildren(el("strong", { text }), ...(aside ? [el("span", { text: aside })] : []));
  }
  setClass(verdict, "ill", isIll);
  setClass(verdict, "uneasy", isUneasy);
  setClass(verdict, "well", !isIll && !isUneasy);
  keyed($("notes"), notes, (it) => it, (it) => el("li", {}, el("span", { text: it })), () => {});
  keyed(
    $("alerts"),
    alerts,
    (it) => `${it.rule} ${it.name}`,
    () => el("li", {}, el("b"), el("span"), el("time")),
    (item, it) => {
      setClass(item, "critical", it.severity === "critical");
      setClass(item, "silenced", it.silenced);
      setText(item.children[0], it.silenced ? `${it.rule} (silenced)` : it.rule);
      setText(item.children[1], it.message);
      setText(item.children[2], it.since === null ? "" : `since ${clock(it.since)}`);
    },
  );
  keyed(
    $("circuits"),
    circuits,
    (it) => it.name,
    (it) =>
      el("li", {}, el("b"), el("span"), ...(hasControls ? [button("Reset", "reset-circuit", it.name, `Reset the circuit ${it.name}`)] : [])),
    (item, it) => {
      setClass(item, "open", it.state === "OPEN");
      setClass(item, "half-open", it.state === "HALF_OPEN");
      setText(item.children[0], it.name);
      const state = { OPEN: "open", HALF_OPEN: "half-open", CLOSED: "closed" }[it.state] ?? it.state;
      const more = it.state === "CLOSED" ? (it.failure_count > 0 ? `, ${count(it.failure_count)} failed` : "") : `, ${count(it.calls_refused)} refused`;
      setText(item.children[1], `circuit ${state}${more}`);
      if (hasControls) item.children[2].hidden = it.state === "CLOSED";
    },
  );
}

const list = (circuits) => `Circuit ${circuits.map((it) => it.name).join(", ")}`;

function showLimits({ limits, has_controls: hasControls }) {
  emptyNote($("limits"), limits.length === 0);
  keyed($("limits"), limits, (it) => it.name, (it) => limitCard(it, hasControls), updateLimit);
}

function limitCard(it, hasControls) {
  const facts = ["In flight", "Waiting", "429s / min", "Wait p95"].map((text) => el("div", {}, el("dt", { text }), el("dd")));
  const top = el("div", { class: "top" }, el("h3", { text: it.name }), el("span", { class: "badge" }));
  if (hasControls) {
    top.append(
      button("Pause", "pause", it.name, `Pause the limit ${it.name}`),
      button("Resume", "resume", it.name, `Resume the limit ${it.name}`),
    );
  }
  return el("article", { class: "card limit" }, top, gauge("Requests"), gauge("Tokens"), el("dl", {}, ...facts));
}

function updateLimit(card, it) {
  const [top, requests, tokens, facts] = card.children;
  const share = Math.max(
    setGauge(requests, `Requests in ${seconds(it.period)}`, it.requests_in_window, it.requests_per_minute),
    setGauge(tokens, `Tokens in ${seconds(it.period)}`, it.tokens_in_window, it.tokens_per_minute),
  );
  const [, badge, pause, resume] = top.children;
  setText(badge, it.paused ? "paused" : it.waiting > 0 ? "queueing" : share >= 1 ? "full" : share >= NEAR ? "near" : "");
  setClass(badge, "full", share >= 1 && !it.paused);
  badge.hidden = badge.textContent === "";
  if (pause) [pause.hidden, resume.hidden] = [Boolean(it.paused), !it.paused];
  const told = [`${count(it.in_flight)} of ${count(it.max_concurrent)}`, count(it.waiting), count(it.rate_limited), seconds(it.wait_p95)];
  told.forEach((text, index) => setText(facts.children[index].lastElementChild, text));
}

function gauge(label) {
  return el(
    "div",
    { class: "gauge", role: "meter", "aria-label": label, "aria-valuemin": "0" },
    el("div", { class: "words" }, el("span"), el("span", {}, el("b"), el("span"))),
    el("div", { class: "bar" }, el("i")),
  );
}

function setGauge(element, label, used, most) {
  const share = most > 0 ? used / most : 0;
  const [words, bar] = element.children;
  setText(words.children[0], label);
  setText(words.children[1].children[0], count(used));
  setText(words.children[1].children[1], ` of ${count(most)}`);
  const width = `${Math.min(100, share * 100).toFixed(1)}%`;
  if (bar.firstElementChild.style.width !== width) bar.firstElementChild.style.width = width;
  setClass(bar.firstElementChild, "near", share >= NEAR && share < 1);
  setClass(bar.firstElementChild, "full", share >= 1);
  element.setAttribute("aria-valuemax", String(Math.max(most, used)));
  element.setAttribute("aria-valuenow", String(used));
  element.setAttribute("aria-valuetext", `${count(used)} of ${count(most)}`);
  return share;
}

function showAgents(agents) {
  const all = agents.reduce((sum, it) => sum + it.prompt_tokens + it.completion_tokens, 0);
  emptyNote($("agents").closest(".table"), agents.length === 0);
  keyed(
    $("agents"),
    agents,
    (it) => it.name,
    () => {
      const row = el("tr", {}, el("th", { scope: "row" }, el("span"), el("span", { class: "share" }, el("i"))));
      for (let column = 0; column < 6; column += 1) row.append(el("td", { class: column === 2 || column === 3 ? "wide" : null }));
      return row;
    },
    (row, it) => {
      const tokens = it.prompt_tokens + it.completion_tokens;
      const [name, share] = row.children[0].children;
      setText(name, it.name);
      share.firstElementChild.style.width = `${all > 0 ? ((100 * tokens) / all).toFixed(1) : 0}%`;
      const told = [it.calls, tokens, it.prompt_tokens, it.completion_tokens].map(count);
      told.push(it.usd === 0 && it.calls_of_unknown_price > 0 ? "no price" : dollars(it.usd), count(it.truncations));
      told.forEach((text, index) => setText(row.children[index + 1], text));
    },
  );
}

function emptyNote(container, isEmpty) {
  container.hidden = isEmpty;
  container.nextElementSibling.hidden = !isEmpty;
}

/* The past */

const charts = {
  tokens: new Chart($("chart-tokens"), {
    title: "Tokens", unit: "per minute", format: compact,
    series: [{ label: "used", colour: 0, fill: true }, { label: "quota", colour: 5, dash: true }],
  }),
  requests: new Chart($("chart-requests"), {
    title: "Requests", unit: "per minute", format: compact,
    series: [{ label: "sent", colour: 0, fill: true }, { label: "429s", colour: 2 }, { label: "retries", colour: 1 }, { label: "quota", colour: 5, dash: true }],
  }),
  waits: new Chart($("chart-waits"), {
    title: "Waits", unit: "for a slot and quota", format: seconds,
    series: [{ label: "p50", colour: 4, spans: true }, { label: "p95", colour: 3, spans: true }],
  }),
  answers: new Chart($("chart-answers"), {
    title: "Answers", unit: "from slot to end", format: seconds,
    series: [{ label: "p50", colour: 4, spans: true }, { label: "p95", colour: 3, spans: true }, { label: "p99", colour: 2, spans: true }],
  }),
};
const forecastChart = new Chart($("chart-forecast"), {
  title: "Tokens to come", unit: "per minute, the last hour and the next", format: compact, synced: false,
  series: [
    { label: "used", colour: 0, fill: true },
    { label: "forecast", colour: 3, spans: true, points: true },
    { label: "high", colour: 3, shown: false, spans: true },
    { label: "low", colour: 3, shown: false, spans: true },
    { label: "naive", colour: 5, dash: true },
  ],
  bands: [[3, 4, 3]],
});
const COLUMNS = {
  tokens: ["tokens", "quota_tokens"],
  requests: ["requests", "rate_limited", "retries", "quota_requests"],
  waits: ["wait_p50", "wait_p95"],
  answers: ["answer_p50", "answer_p95", "answer_p99"],
};

async function askPast() {
  if (document.hidden) return;
  pastAsked = performance.now();
  const asked = [range, process];
  const query = `range=${range}&process=${encodeURIComponent(process)}`;
  const answer = await fetch(`api/history?${query}`, { cache: "no-store" }).catch(() => null);
  if (answer === null || !answer.ok) return;
  const told = await answer.json();
  // Somebody has chosen another range meanwhile.
  if (asked[0] !== range || asked[1] !== process) return;
  past = told;
  drawPast();
}

function drawPast() {
  setText($("past-note"), past.note ?? "");
  $("past-note").hidden = past.note === null;
  const shown = [past.start, past.end];
  for (const [name, columns] of Object.entries(COLUMNS)) {
    charts[name].set([past.at, ...columns.map((column) => past[column])], shown);
  }
}

// The newest second beside those that the server told.
function extendMinute(second) {
  if (past?.range !== "minute" || second === null || second.at <= (past.at.at(-1) ?? 0)) return;
  past.at.push(second.at);
  for (const column of Object.values(COLUMNS).flat()) past[column].push(second[column]);
  const step = second.at - past.end;
  past.start += step;
  past.end += step;
  while (past.at.length > 0 && past.at[0] < past.start) {
    past.at.shift();
    for (const column of Object.values(COLUMNS).flat()) past[column].shift();
  }
  drawPast();
}

function showForecast(forecast) {
  setText($("forecast-note"), forecast.note);
  $("chart-forecast").hidden = forecast.points.length === 0;
  if (forecast.points.length === 0 || forecastChart.told === JSON.stringify(forecast)) return;
  forecastChart.told = JSON.stringify(forecast);
  const columns = [[], [], [], [], [], []];
  const add = (...values) => values.forEach((value, index) => columns[index].push(value));
  forecast.past.at.forEach((at, index) => add(at, forecast.past.tokens[index], null, null, null, null));
  const naive = forecast.points[0].last_value;
  add(forecast.from, naive, naive, naive, naive, naive);
  for (const it of forecast.points) add(forecast.from + it.seconds, null, it.expected, it.high, it.low, it.last_value);
  forecastChart.set(columns);
}

function showCosts(costs) {
  const sums = costs === null ? [] : [["Today", costs.today], ["This month", costs.month], ["Projected", costs.projected]];
  keyed($("sums"), sums, ([name]) => name, ([name]) => el("div", { class: "card sum" }, el("span", { text: name }), el("b")), (card, [, value]) =>
    setText(card.lastElementChild, dollars(value)),
  );
  for (const [place, rows] of [["cost-agents", costs?.by_agent ?? []], ["cost-models", costs?.by_model ?? []]]) {
    keyed($(place), rows, (it) => it.name, () => el("tr", {}, el("th", { scope: "row" }), el("td"), el("td")), (row, it) => {
      setText(row.children[0], it.name);
      setText(row.children[1], dollars(it.today));
      setText(row.children[2], dollars(it.month));
    });
  }
  setText($("cost-note"), costs?.note ?? "Nothing is known of costs: several processes tell them by a history.");
  for (const id of ["sums", "cost-agents", "cost-models"]) $(id).closest(".halves, .sums").hidden = costs === null;
}

/* What can be pressed */

function button(text, action, name, label) {
  return el("button", {
    type: "button",
    text,
    "aria-label": label,
    onclick: async ({ currentTarget }) => {
      currentTarget.disabled = true;
      const answer = await fetch(`api/${action}`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ name }),
      }).catch(() => null);
      currentTarget.disabled = false;
      if (answer === null || !answer.ok) setText(currentTarget, "failed");
    },
  });
}

for (const name of RANGES) {
  const tab = el("button", { type: "button", text: name[0].toUpperCase() + name.slice(1), "aria-pressed": String(name === range) });
  tab.addEventListener("click", () => {
    range = name;
    localStorage.setItem("range", name);
    for (const other of $("ranges").children) other.setAttribute("aria-pressed", String(other === tab));
    askPast();
  });
  $("ranges").append(tab);
}

$("process").addEventListener("change", (event) => {
  process = event.target.value;
  listen();
  askPast();
});

function redraw() {
  for (const chart of [...Object.values(charts), forecastChart]) chart.draw();
}

$("theme").addEventListener("click", () => {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const isDark = (document.documentElement.dataset.theme ?? (prefersDark ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

setInterval(() => {
  watchLink();
  if (performance.now() - pastAsked > PAST_EVERY_MS[range]) askPast();
}, 1_000);
listen();
askPast();
