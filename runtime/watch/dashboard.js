const KEEP = 4096, MAX_OUTPUTS = 16, MAX_NAMED = 40, TRACE_S = 10;
let facts = null, state = null, rows = [], bins = [], heard = performance.now(), ended = false, displaced = false;
const word = kind => kind === "nan" ? "NaN" : kind;
const wall = () => state.wall - state.now;
const shownSpan = () => Math.min(Number($("span-choice").value), Math.max(10, state.uptime));
const hasClasses = () => facts.class_names.length > 0;

// Shape and colour say what is wrong with a channel; a ring says that it is repaired.
function symbol(parent, quality, x, y, r, repaired) {
  const group = make(parent, "g", {transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`});
  const shapes = {
    flat: `M${-r} ${-r}H${r}V${r}H${-r}Z`, saturated: `M0 ${-1.3 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
    noisy: `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0Z`, nan: `M${-r} ${-r}L${r} ${r}M${r} ${-r}L${-r} ${r}`,
  };
  if (shapes[quality]) make(group, "path", {class: quality, d: shapes[quality]});
  else make(group, "circle", {class: quality, r});
  if (repaired) make(group, "circle", {class: "ring", r: 1.9 * r});
  return group;
}

function drawMap() {
  const places = facts.places, map = $("map"), {state: quality, repaired, rms} = state.channels;
  const kinds = quality.map(code => facts.channel_states[code]), named = new Set(state.bads.map(name => name.toLowerCase()));
  const words = facts.ch_names.map((name, i) => named.has(name.toLowerCase()) ? "named as bad" : word(kinds[i]));
  const picture = words.join() + repaired.join();
  if (map.dataset.picture !== picture) {
    map.dataset.picture = picture;
    map.replaceChildren();
    const furthest = places ? Math.max(1, ...places.map(([x, y]) => Math.hypot(x, y))) : 1;
    const head = 140 / furthest, r = facts.ch_names.length > 64 ? 4 : 6;
    if (places) {
      make(map, "path", {class: "head", d: `M${-.12 * head} ${-.993 * head}L0 ${-1.13 * head}L${.12 * head} ${-.993 * head}`});
      make(map, "circle", {class: "head", r: head});
      for (const side of [-1, 1]) make(map, "path", {class: "head",
        d: `M${side * .98 * head} ${-.18 * head}Q${side * 1.12 * head} ${-.2 * head} ${side * 1.1 * head} 0T${side * .98 * head} ${.2 * head}`});
    }
    const ys = places ? places.map(([, y]) => -y * head) : [-145, 145], top = Math.min(...ys, places ? -1.13 * head : 0) - 12;
    map.setAttribute("viewBox", `-160 ${top} 320 ${Math.max(...ys, places ? head : 0) + 24 - top}`);
    const columns = Math.ceil(Math.sqrt(facts.ch_names.length));
    facts.ch_names.forEach((name, i) => {
      const [x, y] = places ? [places[i][0] * head, -places[i][1] * head]
        : [(i % columns + .5) / columns * 290 - 145, (Math.floor(i / columns) + .5) / columns * 290 - 145];
      const group = symbol(map, kinds[i], x, y, r, repaired[i]);
      make(group, "title", {}, `${name}: ${words[i]}${repaired[i] ? ", repaired" : ""}`);
      if (facts.ch_names.length <= MAX_NAMED) make(group, "text", {class: "name", y: (repaired[i] ? 1.9 : 1) * r + 10}, name);
    });
    $("legend").replaceChildren();
    const counts = [...facts.channel_states.map(kind => [kind, kinds.filter(k => k === kind).length]), ["repaired", repaired.filter(x => x).length]];
    for (const [kind, n] of counts) if (n || kind === "ok") {
      const item = make($("legend"), "li");
      symbol(make(item, "svg", {viewBox: "-10 -10 20 20", "aria-hidden": "true"}), kind === "repaired" ? "ok" : kind, 0, 0, kind === "repaired" ? 4.5 : 6, kind === "repaired");
      item.append(` ${n} ${word(kind)}`);
    }
    const bad = facts.ch_names.flatMap((name, i) => kinds[i] === "ok" && !repaired[i] ? [] :
      [`${name} ${words[i]}${repaired[i] ? " (repaired)" : ""}`]);
    say("channels", bad.length ? bad.slice(0, 12).join(", ") + (bad.length > 12 ? ` and ${bad.length - 12} more` : "") : "All channels are good.");
    map.setAttribute("aria-label", counts.filter(([, n]) => n).map(([kind, n]) => `${n} channels ${kind}`).join(", "));
  }
  if ($("all").open) {
    const body = $("all").querySelector("tbody");
    while (body.rows.length < facts.ch_names.length) { const row = make(body, "tr"); make(row, "td"); make(row, "td"); make(row, "td", {class: "n"}); }
    facts.ch_names.forEach((name, i) => {
      [name, words[i] + (repaired[i] ? ", repaired" : ""), rms[i] === null ? DASH : `${rms[i].toPrecision(3)} ${facts.unit}`]
        .forEach((text, column) => { body.rows[i].cells[column].textContent = text; });
    });
  }
}

const classOf = d => d.class ?? value(d.value);
const inWords = d => d.probability === null ? classOf(d) : `${classOf(d)} ${percent(d.probability)}`;

// What is decided, in words. A class stands while nothing can follow it; a decision from before the signal went is no decision.
function drawNow() {
  const newest = state.decision, holds = !ended && ["decoding", "filling"].includes(state.state);
  const name = newest?.state ?? null, stands = name === "decided" || (name === "refractory" && state.decided !== null);
  let big = DASH, p = null, reason = "";
  if (newest && facts.layer !== null) {
    const standing = name === "decided" ? newest : state.decided;
    [big, p] = stands ? [classOf(standing), standing.probability] : [name, null];
    reason = (stands && name !== "decided" ? `${name}: ` : "") + newest.reason;
    if (name !== "decided" && newest.class) reason += ` (${inWords(newest)})`;
    if (newest.interval) reason += ` (${value(newest.interval[0])} to ${value(newest.interval[1])})`;
  } else if (newest) {
    big = facts.output_names.length ? "outputs only" : "features";
    reason = facts.output_names.length ? "Without a decision layer nothing is decided." : "A base model: its features are not shown.";
  }
  $("class").dataset.state = name ?? "";
  $("class").classList.toggle("quiet", !holds || !stands);
  if (!holds && !ended) [big, p] = [state.standing.title, null];
  const chance = p === null ? "" : ` ${percent(p)}`;
  if ($("class").textContent !== big + chance) {
    $("class").textContent = big;
    if (chance) make($("class"), "span", {class: "probability"}, chance);
  }
  say("reason", reason);
  const about = newest?.event ? `${newest.event}, ` : "";
  say("since", newest ? `${about}${clock(newest.time + wall())}, ${seconds(Math.max(0, state.now - newest.decided), 2)} ago` : "No decision yet.");
  say("last", state.decided && name !== "decided" ? `Last: ${inWords(state.decided)} at ${clock(state.decided.time + wall())}` : "");
  say("flags", newest ? newest.flags.join(", ") : "");
}

function drawOutputs() {
  if (!rows.length) return;
  const newest = rows[rows.length - 1], shown = hasClasses() ? facts.class_names : facts.output_names;
  const names = shown.slice(0, MAX_OUTPUTS), values = hasClasses() ? newest.probabilities : newest.prediction;
  const body = $("outputs").tBodies[0];
  say("outputs-caption", hasClasses() ? "Newest probability of each class" : "Newest value of each output");
  const most = hasClasses() ? 1 : rows.reduce((most, row) => Math.max(most, ...row.prediction.slice(0, MAX_OUTPUTS).map(v => Math.abs(v ?? 0))), 0) || 1;
  names.forEach((name, i) => {
    const row = body.rows[i] || make(body, "tr");
    if (!row.cells.length) {
      const label = make(row, "th", {scope: "row"});
      const key = make(label, "svg", {class: "key", viewBox: "0 0 26 10", "aria-hidden": "true"});
      make(key, "line", {class: `s${i % N_SERIES}`, x1: 0, x2: 26, y1: 5, y2: 5});
      label.append(" " + name);
      const bar = make(make(row, "td"), "svg", {viewBox: hasClasses() ? "0 0 50 10" : "-50 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true"});
      make(bar, "rect", {class: "bar", y: 1, height: 8});
      make(bar, "line", {class: "rule", x1: 0, x2: 0, y1: 0, y2: 10});
      make(row, "td", {class: "n"});
    }
    const v = values[i], width = Math.abs(v || 0) / most * 50, rect = row.querySelector("rect");
    rect.setAttribute("x", v < 0 ? -width : 0);
    rect.setAttribute("width", width);
    row.cells[2].textContent = hasClasses() ? percent(v) : value(v);
  });
}

// What people marked stands among the events.
function allMarks() {
  const said = state.incidents.filter(([, kind]) => kind === "mark").map(([ago, , text]) => [state.now - ago, text]);
  return [...state.marks, ...said].sort((a, b) => a[0] - b[0]);
}

function drawValues() {
  const classes = hasClasses(), names = (classes ? facts.class_names : facts.output_names).slice(0, MAX_OUTPUTS);
  say("h-values", classes ? "Probabilities over time" : "Outputs over time");
  if (!names.length) return say("span", "A base model: its features are not shown.");
  const to = state.now, from = to - shownSpan();
  const near = rows.filter(row => row.time >= from - facts.hop && row.time <= to);
  const of = row => classes ? row.probabilities : row.prediction;
  const all = near.flatMap(row => of(row).slice(0, MAX_OUTPUTS)).filter(v => v !== null);
  const chart = new Chart($("values"), {top: 18, bottom: 30});
  chart.times(from, to);
  if (classes) chart.values(0, 1);
  else chart.values(all.reduce((a, b) => Math.min(a, b), 0), all.reduce((a, b) => Math.max(a, b), 0));
  chart.valueAxis(classes ? [0, .5, 1] : chart.ticks(), tick => classes ? `${100 * tick} %` : String(Number(tick.toPrecision(3))));
  chart.timeAxis(wall());
  const marks = allMarks();
  chart.marks(marks);
  names.forEach((_, i) => chart.line(near.map((row, n) => [row.time, of(row)[i], n > 0 && row.index - near[n - 1].index === 1]), i % N_SERIES, facts.events !== null));
  if (classes && facts.events === null) drawDecided(chart, near);
  const key = $("classes");
  if (key.dataset.names !== names.join("\n")) {
    key.dataset.names = names.join("\n");
    key.replaceChildren();
    names.forEach((name, i) => {
      const item = make(key, "li");
      make(make(item, "svg", {class: "key", viewBox: "0 0 26 10", "aria-hidden": "true"}), "line", {class: `s${i % N_SERIES}`, x1: 0, x2: 26, y1: 5, y2: 5});
      item.append(` ${name}`);
    });
  }
  const total = classes ? facts.class_names.length : facts.output_names.length;
  const more = total > MAX_OUTPUTS ? ` The first ${MAX_OUTPUTS} of ${total}.` : "", n = marks.filter(([time]) => time >= from && time <= to).length;
  const bar = classes && facts.events === null ? " The bar below says what was decided." : "";
  const marked = n || facts.events ? `, ${n} ${n === 1 ? "event (vertical line)" : "events (vertical lines)"}` : "";
  say("span", `${near.length} decisions${marked}.${bar}${more}`);
  $("values").setAttribute("aria-label", `${$("h-values").textContent}, ${near.length} decisions`);
}

function drawDecided(chart, near) {
  const y = chart.box.y1 + 20, decided = facts.states.indexOf("decided");
  let open = null;
  const close = until => {
    if (open) make(chart.svg, "rect", {class: `decided s${open.series % N_SERIES}`, x: chart.x(open.from), y, height: 7, width: Math.max(2, chart.x(until) - chart.x(open.from))});
    open = null;
  };
  near.forEach((row, n) => {
    const series = row.state === decided ? row.probabilities.indexOf(Math.max(...row.probabilities)) : -1;
    const follows = n > 0 && row.index - near[n - 1].index === 1;
    if (open && (open.series !== series || !follows)) close(near[n - 1].time + facts.hop);
    if (!open && series >= 0) open = {series, from: Math.max(row.time, chart.from)};
  });
  if (near.length) close(near[near.length - 1].time);
}

function drawTrials() {
  const atEvents = facts.events !== null, layered = facts.layer !== null, trials = state.trials;
  $("trials").hidden = !atEvents && !layered;
  say("h-trials", "");
  $("h-trials").append(atEvents ? "Trials " : "Decided ", make($("h-trials"), "small", {id: "n-trials"}, trials.length ? trials[trials.length - 1].number.toLocaleString("en") : "none yet"));
  $("trial-event").hidden = !atEvents;
  $("trial-number").hidden = !layered;
  say("trial-number", hasClasses() ? "prob." : "value");
  const body = $("trials").querySelector("tbody"), picture = `${trials.length && trials[trials.length - 1].number} ${wall().toFixed(0)}`;
  if (body.dataset.picture === picture) return;
  body.dataset.picture = picture;
  body.replaceChildren();
  for (const trial of trials.slice().reverse()) {
    const row = make(body, "tr", {class: "trial"});
    make(row, "td", {}, trial.time === null ? "in a pause" : clock(trial.time + wall()));
    if (atEvents) make(row, "td", {class: "event"}, trial.event);
    const outputs = trial.outputs.map((v, i) => `${facts.output_names[i]} ${value(v)}`).join(", ");
    const what = trial.outcome === "decided" ? trial.class_name ?? "decided" : trial.outcome === "output" ? outputs : trial.outcome;
    make(row, "td", {class: trial.outcome === "decided" ? "decided" : "soft"}, what);
    if (layered) make(row, "td", {class: "n"}, trial.value !== null ? value(trial.value) : percent(trial.probability));
    make(row, "td", {class: "n"}, seconds(trial.latency));
    const marker = trial.marker_delay === null ? "" : `marker ${seconds(trial.marker_delay, 2)} late`;
    make(make(body, "tr"), "td", {class: "soft why", colspan: 5}, [trial.reason, marker].filter(Boolean).join("; "));
  }
  say("no-trials", atEvents && !trials.length ? "No event yet." : "");
}

// One vertical line a bin and channel, from its smallest to its largest sample, about the channel's middle.
function drawTraces() {
  const names = facts.trace_names, near = bins.filter(bin => bin.time > state.now - TRACE_S && bin.time <= state.now);
  $("signal").hidden = !names.length || !bins.length;
  $("signal").classList.toggle("wide", $("trials").hidden);
  if ($("signal").hidden) return;
  const chart = new Chart($("traces"), {top: 18, left: 62, right: 62}), {x0, x1, y0, y1} = chart.box, height = (y1 - y0) / names.length;
  chart.times(state.now - TRACE_S, state.now);
  chart.timeAxis(wall());
  const sorted = values => values.filter(v => v !== null).sort((a, b) => a - b), at = (values, q) => values[Math.floor(q * (values.length - 1))] ?? 0;
  const middles = names.map((_, i) => at(sorted(near.map(bin => bin.low[i] === null ? null : (bin.low[i] + bin.high[i]) / 2)), .5));
  const ranges = names.map((_, i) => at(sorted(near.map(bin => bin.high[i])), .95) - at(sorted(near.map(bin => bin.low[i])), .05));
  const scale = nice(Math.max(1e-9, at(sorted(ranges.filter(range => range > 0)), .5) || 1)), gain = .9 * height / scale;
  const quality = Object.fromEntries(facts.ch_names.map((name, i) => [name.toLowerCase(), facts.channel_states[state.channels.state[i]]]));
  names.forEach((name, i) => {
    const middle = y0 + (i + .5) * height, bad = (quality[name.toLowerCase()] ?? "ok") !== "ok";
    const y = v => Math.min(middle + .7 * height, Math.max(middle - .7 * height, middle - (v - middles[i]) * gain)).toFixed(1);
    make(chart.svg, "text", {class: "tick", x: x0 - 6, y: middle + 4, "text-anchor": "end"}, name.length > 8 ? name.slice(0, 7) + "…" : name);
    let path = "", last = null;
    for (const bin of near) {
      if (bin.low[i] === null) { last = null; continue; }
      const x = chart.x(bin.time).toFixed(1);
      path += `${last !== null && bin.time - last < 2.5 * facts.bin ? "L" : "M"}${x} ${y(bin.low[i])}L${x} ${y(bin.high[i])}`;
      last = bin.time;
    }
    make(chart.svg, "path", {class: `trace${bad ? " bad" : ""}`, d: path || "M0 0"});
  });
  const bar = scale * gain, top = y0 + .5 * height - bar / 2;
  make(chart.svg, "path", {class: "ring", d: `M${x1 + 6} ${top}h6M${x1 + 9} ${top}v${bar}M${x1 + 6} ${top + bar}h6`});
  make(chart.svg, "text", {class: "tick", id: "trace-scale", x: x1 + 15, y: top + bar / 2 + 4}, `${scale.toPrecision(1) >= 1e4 ? scale.toExponential(0) : Number(scale.toPrecision(2))} ${facts.trace_unit.replace("uV", "µV")}`);
  chart.marks(allMarks());
}

function drawAge() {
  if (!rows.length) return;
  const top = rows.reduce((top, row) => Math.max(top, row.age), facts.deadline * 1.05);
  const chart = new Chart($("ages"), {left: 56}), from = state.now - shownSpan();
  chart.times(from, state.now);
  chart.values(0, top);
  chart.valueAxis(chart.ticks(3), tick => tick ? seconds(tick, 2) : "0");
  chart.timeAxis(wall());
  make(chart.svg, "line", {class: "limit", x1: chart.box.x0, x2: chart.box.x1, y1: chart.y(facts.deadline), y2: chart.y(facts.deadline)});
  const near = rows.filter(row => row.time >= from);
  chart.line(near.map((row, n) => [row.time, Math.max(0, row.age), n > 0 && row.index - near[n - 1].index === 1]), 0, facts.events !== null);
  say("age-span", `From the arrival of the sample: median ${seconds(state.latency.p50)}, p99 ${seconds(state.latency.p99)}, longest ${seconds(state.latency.max)}.`);
  drawHistogram();
}

function drawHistogram() {
  const counts = state.age.counts, edges = facts.edges, used = counts.flatMap((n, i) => n ? [i] : []);
  const limit = edges.findIndex(edge => edge >= facts.deadline * .999);
  const from = Math.floor(Math.min(used[0] ?? 0, limit < 0 ? edges.length : limit) / 10) * 10;
  const to = Math.min(Math.ceil((Math.max(used[used.length - 1] ?? 0, limit) + 1) / 10) * 10, counts.length - 1);
  const chart = new Chart($("histogram")), {y0, y1} = chart.box, most = Math.max(1, ...counts);
  chart.times(from, to + 1);
  chart.values(0, Math.log10(most) + .5);
  const decades = [...Array(Math.floor(Math.log10(most)) + 1).keys()];
  chart.valueAxis(decades.map(k => k + .2), k => `${(10 ** Math.round(k - .2)).toLocaleString("en")}`);
  for (const i of used) {
    const y = chart.y(Math.log10(counts[i]) + .2), least = i ? edges[i - 1] : 0, x = chart.x(i);
    const bar = make(chart.svg, "rect", {class: "bar", x, y, width: Math.max(1, chart.x(i + 1) - x - 1), height: y1 - y});
    make(bar, "title", {}, `${counts[i]} ${i < edges.length ? `from ${seconds(least)} to ${seconds(edges[i])}` : `later than ${seconds(least)}`}`);
  }
  make(chart.svg, "line", {class: "rule", x1: chart.box.x0, x2: chart.box.x1, y1, y2: y1});
  // an edge is the upper one of its bin, so a decade begins one bin later
  for (let i = from; i <= to; i += 10) make(chart.svg, "text", {class: "tick", x: chart.x(i + 1), y: y1 + 15, "text-anchor": i === from ? "start" : i + 1 >= to ? "end" : "middle"}, seconds(edges[i], 1));
  const due = chart.x(limit < 0 ? to + 1 : limit + 1 - 10 * Math.log10(edges[limit] / facts.deadline));
  make(chart.svg, "line", {class: "limit", x1: due, x2: due, y1: y0, y2: y1});
  chart.svg.setAttribute("aria-label", `Histogram of ages: median ${seconds(state.age.p50)}, longest ${seconds(state.age.max)}`);
}

function drawCounters() {
  const skips = Object.entries(state.skips).filter(([, n]) => n).map(([reason, n]) => [`skipped: ${reason}`, n]);
  const states = facts.layer === null ? [] : Object.entries(state.states).filter(([, n]) => n).map(([name, n]) => [`state: ${name}`, n]);
  const lines = [["windows", state.windows], ["decisions", state.decisions], ...skips, ["deadline misses", state.misses], ...states,
    ...Object.entries(state.counters).filter(([, n]) => n), ["memory of the decoder", `${(state.memory / 2 ** 20).toFixed(0)} MiB`]];
  const body = $("counters");
  while (body.rows.length > lines.length) body.deleteRow(-1);
  lines.forEach(([name, n], i) => {
    const row = body.rows[i] || make(body, "tr");
    if (!row.cells.length) { make(row, "th", {scope: "row"}); make(row, "td", {class: "n"}); }
    row.cells[0].textContent = name;
    row.cells[1].textContent = typeof n === "number" ? n.toLocaleString("en") : n;
  });
  if (!state.incidents.length) return;
  $("events").replaceChildren();
  for (const [ago, kind, text] of state.incidents.slice().reverse()) make($("events"), "li", {}, `${clock(state.wall - Math.max(0, ago))} ${kind}: ${text}`);
}

function drawRecording() {
  const record = state.recording, chip = $("recording");
  let text = "Not recorded", wrong = false;
  if (record) {
    const lost = Object.entries(record.lost).map(([what, n]) => `${n.toLocaleString("en")} ${what}`).join(", ");
    const rate = record.size / Math.max(1, state.uptime), left = rate > 1000 && record.free !== null ? record.free / rate : Infinity;
    wrong = record.failed || lost !== "" || left < 600;
    text = record.failed ? `Recording ended: the disk takes no more` : ended ? "Recorded" : "Recording";
    text += ` ${record.name}`;
    text += `, ${bytes(record.size)}`;
    if (record.free !== null) text += `, ${bytes(record.free)} left`;
    if (left < 86400) text += ` (${seconds(left)} at this rate)`;
    if (lost) text += `. Not recorded: ${lost}`;
  }
  say("recording", text);
  chip.classList.toggle("on", Boolean(record) && !record.failed && !ended);
  chip.classList.toggle("late", wrong);
}

// Green is a decoder that is heard and decides.
function drawState() {
  const silent = (performance.now() - heard) / 1000, unheard = silent >= 3;
  $("alert").hidden = !unheard && !displaced;
  if (displaced) say("alert", "Too many pages are open: newer ones took this page's place. Reload it to go on.");
  else if (unheard) say("alert", ended ? "The decoder has ended. These are its last numbers." : `No news from the decoder for ${silent.toFixed(0)} s: these numbers are old.`);
  if (!state) return;
  const gone = !ended && (unheard || displaced);
  $("state").dataset.tone = ended ? "over" : gone ? "bad" : state.standing.tone;
  say("state", ended ? "Stopped: the decoder has ended" : gone ? "No news from the decoder" : state.standing.title);
  say("why", ended || gone ? "" : state.standing.text);
}

function draw() {
  if (!facts || !state || document.hidden) return;
  drawState();
  const rhythm = facts.events === null ? `every ${seconds(facts.hop)}` : facts.events.join() === "all" ? "at all events" : `at events: ${facts.events.join(", ")}`, layer = facts.layer === null ? [] : [`decisions: ${facts.layer}`];
  say("origin", [facts.source, facts.backend, rhythm, ...layer, facts.bundle_hash.slice(0, 12), `up ${seconds(state.uptime)}`, clock(state.wall)].join(" · "));
  const skipped = state.windows - state.decisions;
  for (const [id, text] of [["decisions", state.decisions.toLocaleString("en")], ["age-p50", seconds(state.age.p50)],
    ["age-p99", seconds(state.age.p99)], ["age-max", seconds(state.age.max)],
    ["misses", state.misses.toLocaleString("en")], ["run", String(state.longest_miss_run)], ["skipped", skipped.toLocaleString("en")],
    ["silence", state.silence === null ? DASH : seconds(Math.max(0, state.silence), 2)]]) say(id, text);
  $("misses").classList.toggle("late", state.misses > 0);
  $("silence").classList.toggle("late", state.silence > 1 + facts.hop);
  drawNow();
  drawRecording();
  drawOutputs();
  drawValues();
  drawTrials();
  drawTraces();
  drawMap();
  drawAge();
  drawCounters();
  drawControl();
}

// Commands

function drawControl() {
  $("control").hidden = !facts.control;
  if (!facts.control) return;
  say("pause", state.state === "paused" ? "Start" : "Pause");
  $("pause").disabled = ended;
  const choice = $("bad-name"), names = facts.source_names.filter(name => !state.bads.includes(name)), picture = names.join("\n");
  if (choice.dataset.picture === picture) return;
  choice.dataset.picture = picture;
  choice.replaceChildren();
  for (const name of names) make(choice, "option", {}, name);
  $("bads").replaceChildren();
  for (const name of state.bads) {
    const button = make(make($("bads"), "li"), "button", {type: "button", "aria-label": `${name} is good again`}, `${name} ×`);
    button.addEventListener("click", () => command({command: "bad channels", names: state.bads.filter(other => other !== name)}));
  }
}

async function command(what) {
  say("reply", "…");
  try {
    const answer = await fetch("command", {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(what)});
    const {accepted, text} = await answer.json();
    say("reply", accepted ? text : `Refused: ${text}`);
    return accepted;
  } catch {
    say("reply", "The decoder was not reached.");
    return false;
  }
}

$("mark-form").addEventListener("submit", async event => {
  event.preventDefault();
  if (await command({command: "mark", text: $("mark-text").value})) $("mark-text").value = "";
});
$("pause").addEventListener("click", () => command({command: state.state === "paused" ? "start" : "pause"}));
$("bad-form").addEventListener("submit", event => {
  event.preventDefault();
  command({command: "bad channels", names: [...state.bads, $("bad-name").value]});
});

// The connection

const table = columns => (columns.time ?? []).map((_, i) => Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[i]])));

function merge(recent, traces) {
  const newest = rows.length ? rows[rows.length - 1].index : -1, last = bins.length ? bins[bins.length - 1].time : -Infinity;
  rows = [...rows, ...table(recent).filter(row => row.index > newest)].slice(-KEEP);
  const came = table(traces), again = came.length && came[came.length - 1].time < last - 60; // the clock was set
  bins = [...(again ? [] : bins), ...came.filter(bin => again || bin.time > last)].slice(-1000);
}

function showBundle() {
  document.title = `${facts.bundle} · sjepa-stream`;
  say("bundle", facts.bundle);
  $("random").hidden = !facts.random_weights;
}

function connect() {
  const source = new EventSource("events");
  source.addEventListener("facts", event => {
    facts = JSON.parse(event.data);
    rows = [];
    bins = [];
    ended = false;
    merge(facts.recent, facts.traces);
    showBundle();
    say("deadline", seconds(facts.deadline));
    $("span-choice").value = facts.events === null ? "60" : "300";
    $("outputs").tBodies[0].replaceChildren();
    for (const id of ["map", "classes", "bad-name"]) delete $(id).dataset.picture;
  });
  source.addEventListener("state", event => {
    heard = performance.now();
    state = JSON.parse(event.data);
    Object.assign(facts, state.facts);
    showBundle();
    merge(state.recent, state.traces);
    draw();
  });
  source.addEventListener("displaced", () => { displaced = true; source.close(); drawState(); });
  source.addEventListener("end", () => { ended = true; draw(); });
  source.addEventListener("error", () => { // refused or gone: the browser itself tries again only after the latter
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
  });
}

document.addEventListener("visibilitychange", draw);
window.addEventListener("resize", draw);
$("all").addEventListener("toggle", draw);
$("span-choice").addEventListener("change", draw);
setInterval(drawState, 500);
connect();
