"use strict";
// A page of a study or a store. Texts are untrusted: set them as text only.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const byId = (id) => document.getElementById(id);
  const charts = read("charts-data"), study = read("study-data");
  const checkpoints = study.checkpoints;
  const words = {
    axis: "epoch of fine-tuning", by: "By epoch", step: "epoch", winner: "closer", none: "The study has no queries.",
    influence: "Highest influence (cosine)", ...study.words,
  };
  const epochs = study.series ? checkpoints : checkpoints.map((name) => name.replace(/^epoch-/, ""));

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") element.className = value;
      else if (name === "style") Object.assign(element.style, value);
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  function draw(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const number = (value, digits = 3) =>
    value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");

  // Figures: Vega replaces the static ones, at the width of the page.
  function fitted(spec, width) {
    const fit = structuredClone(spec);
    const names = [...(spec.layer ?? []), ...(spec.hconcat?.[0].layer ?? [])].flatMap((l) => l.encoding?.color?.scale?.domain ?? []);
    fit.config.legend.columns = width > 480 ? 4 : (names.some((name) => String(name).length > 16) ? 1 : 2);
    fit.config.padding = width < 480 ? 2 : 8;
    if (fit.concat) return Object.assign(fit, { columns: width < 760 ? 1 : 2 });
    const panels = fit.hconcat;
    if (!panels) return Object.assign(fit, { width: "container", autosize: { type: "fit-x", contains: "padding" } });
    const isNarrow = width < 560;
    for (const panel of panels) panel.width = isNarrow ? width - 75 : Math.floor((width - 30) / panels.length) - 65;
    if (isNarrow) {
      delete fit.hconcat;
      fit.vconcat = panels;
    }
    return fit;
  }
  async function drawCharts() {
    const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    for (const holder of document.querySelectorAll("[data-chart]")) {
      const name = holder.dataset.chart;
      holder.classList.add("is-drawn");
      try {
        const spec = fitted(charts[name], holder.clientWidth);
        await vegaEmbed(holder, spec, {
          mode: "vega-lite", renderer: "svg", ast: true, tooltip: { theme }, downloadFileName: name,
          actions: { export: true, source: false, compiled: false, editor: false },
        });
      } catch (error) {
        holder.classList.remove("is-drawn");
        console.error(`figure ${name}:`, error);
      }
    }
    document.documentElement.dataset.drawn = "yes";
  }

  // Small plots of one query.
  function ticks(low, high) {
    const span = high - low || 1, raw = span / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((n) => n * power >= raw);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
    return { step, found };
  }
  function path(values, x, y) {
    let word = "", isOn = false;
    values.forEach((value, i) => {
      if (value === null) { isOn = false; return; }
      word += `${isOn ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      isOn = true;
    });
    return word;
  }
  function plot(title, series, digits) {
    const width = 380, height = 190, left = 44, right = 12, top = 10, bottom = 36;
    const all = series.flatMap((one) => one.values).filter((value) => value !== null);
    if (!all.length) return null;
    const low = Math.min(...all), high = Math.max(...all), room = (high - low || Math.abs(high) || 1) * 0.08;
    const x = (i) => left + ((width - left - right) * (i + 0.5)) / epochs.length;
    const y = (value) => top + ((high + room - value) / (high - low + 2 * room)) * (height - top - bottom);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    const { step, found } = ticks(low - room, high + room);
    const places = Math.max(0, -Math.floor(Math.log10(step)));
    for (const value of found) {
      svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      svg.append(draw("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, number(value, places)));
    }
    epochs.forEach((name, i) => svg.append(draw("text", { x: x(i), y: height - 20, "text-anchor": "middle" }, name)));
    svg.append(draw("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, words.axis));
    for (const { name, colour, values } of series) {
      svg.append(draw("path", { d: path(values, x, y), fill: "none", stroke: colour, "stroke-width": 2 }));
      values.forEach((value, i) => {
        if (value === null) return;
        const mark = draw("circle", { cx: x(i), cy: y(value), r: 3.5, fill: colour });
        mark.append(draw("title", {}, `${name}, ${checkpoints[i]}: ${number(value, digits)}`));
        svg.append(mark);
      });
    }
    const keys = series.length < 2 ? [] : series.map(({ name, colour }) =>
      make("span", { class: "key" }, make("span", { class: "dot", style: { background: colour } }), name));
    return make("div", { class: "plot" }, make("p", {}, title), keys.length ? make("p", { class: "keys" }, ...keys) : null, svg);
  }
  function spark(values, chosen, colour, scale) {
    const width = 144, height = 34;
    const x = (i) => 5 + ((width - 10) * i) / Math.max(1, values.length - 1);
    const y = (value) => 4 + ((scale.high - value) / (scale.high - scale.low || 1)) * (height - 8);
    const said = values.map((value, i) => `${checkpoints[i]}: ${value === null ? "not in the top 100" : number(value, 4)}`);
    const svg = draw("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "xMinYMid meet", role: "img", "aria-label": said.join(", ") });
    svg.append(draw("title", {}, said.join("\n")));
    if (scale.low <= 0 && scale.high >= 0) svg.append(draw("line", { class: "grid", x1: 0, x2: width, y1: y(0), y2: y(0) }));
    svg.append(draw("path", { d: path(values, x, y), fill: "none", stroke: colour, "stroke-width": 1.75 }));
    values.forEach((value, i) => {
      if (value !== null) svg.append(draw("circle", { cx: x(i), cy: y(value), r: i === chosen ? 4 : 1.8, fill: colour }));
    });
    return svg;
  }

  // One query.
  const colourOf = (source) => study.colours[source] ?? "#7f8790";
  let shown = null, chosen = checkpoints.length - 1;

  const plain = (text) => Array.isArray(text) ? text.map(([role, said]) => `${role}: ${said}`).join("\n") : text || "";
  const questionOf = (query) => plain(query.text).match(/^Context:[\s\S]*\nQuestion:\s*([\s\S]+)$/)?.[1] ?? "";

  function fillText(place, text, response) {
    if (Array.isArray(text)) {
      place.replaceChildren(...text.map(([role, said]) =>
        make("span", { class: "message" }, make("b", { class: "role" }, role), said)));
    } else place.replaceChildren(text || "(no text in the store)");
    if (response) place.append(make("span", { class: "answer" }, `Answer: ${response}`));
  }
  function fillTable(query) {
    const head = (words) => make("th", { scope: "col", class: "number" }, words);
    const row = (title, cells) => make("tr", {}, make("th", { scope: "row" }, title),
      ...cells.map((cell) => (cell instanceof Node ? cell : make("td", { class: "number" }, cell))));
    const rows = [];
    if (query.prediction.some((word) => word !== null)) {
      rows.push(row("prediction", query.prediction.map((word, i) => word === null ? "–" : make("td",
        { class: `number ${query.correct[i] ? "right" : "wrong"}` }, `${word} ${query.correct[i] ? "✓" : "✗"}`))));
    }
    rows.push(row("loss (nats per token)", query.loss.map((value) => number(value))));
    if (study.series) {
      study.series.forEach((name, i) => rows.push(row(`Φ, ${name}`, query.phi[i].map((value) => number(value)))));
    } else {
      rows.push(row("Φ, fine-tuning", query.ft.map((value) => number(value))));
      rows.push(row(`Φ, ${study.against}`, query.pt.map((value) => number(value))));
      rows.push(row("FT/PT", query.ft.map((ft, i) => number(ft !== null && query.pt[i] > 0 ? ft / query.pt[i] : null, 2))));
    }
    rows.push(row(words.winner, query.winner.map((word) => word ?? "–")));
    byId("query-label").textContent = query.label === null ? `${words.by}.` : `Label: ${query.label}. ${words.by}:`;
    byId("query-table").replaceChildren(
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, words.step), ...epochs.map(head))),
      make("tbody", {}, ...rows));
  }
  function fillPlots(query) {
    const series = study.series
      ? study.series.map((name, i) => ({ name, colour: colourOf(name), values: query.phi[i] }))
      : [{ name: "fine-tuning", colour: colourOf(study.tuning), values: query.ft },
         { name: study.against, colour: colourOf(study.against.split(" · ")[0]), values: query.pt }];
    const plots = [
      plot(words.influence, series, 4),
      plot("Loss (nats per target token)", [{ name: "loss", colour: "#7f8790", values: query.loss }], 3),
    ];
    byId("query-plots").replaceChildren(...plots.filter((one) => one !== null));
  }
  function fillTop() {
    const rows = shown.top[chosen].map((i) => shown.rows[i]);
    byId("top-title").textContent = rows.length
      ? `The ${rows.length} most influential samples at ${checkpoints[chosen]}`
      : `No influence is stored at ${checkpoints[chosen]}`;
    const all = rows.flatMap((row) => row[2]).filter((value) => value !== null);
    const scale = { low: Math.min(0, ...all), high: Math.max(0, ...all) };
    byId("top").replaceChildren(...rows.map(([sample, group, scores, qs], i) => {
      const [source, id, text, response] = study.samples[sample], variant = study.groups[group][1];
      const body = make("div", { class: "text" });
      fillText(body, text, response);
      const q = qs?.[chosen] ?? null;
      const tested = q === null ? "" : ` · q = ${q < 0.001 ? "< 0.001" : q.toFixed(3)}${q <= 0.05 ? ", significant" : ""}`;
      const first = plain(text).replace(/\s+/g, " ").slice(0, 140);
      return make("li", {},
        make("div", { class: "line" },
          make("span", { class: "rank" }, String(i + 1)),
          make("span", { class: "score" }, number(scores[chosen])),
          make("span", { class: "who" },
            make("span", { class: "dot", style: { background: colourOf(source) } }), `${source} · ${variant}`, make("small", {}, `${id}${tested}`)),
          make("span", { class: "path" }, spark(scores, chosen, colourOf(source), scale))),
        make("details", {}, make("summary", {}, first || "(no text in the store)"), body));
    }));
  }
  function show(index) {
    shown = study.queries[index];
    byId("query-name").textContent = `Query ${shown.id}`;
    byId("query-question").textContent = questionOf(shown);
    byId("query-question").hidden = !questionOf(shown);
    fillText(byId("query-text"), shown.text, shown.response);
    fillTable(shown);
    fillPlots(shown);
    fillTop();
  }

  // Search and navigation.
  const select = byId("query-select");
  function step(by) {
    select.selectedIndex = Math.min(Math.max(select.selectedIndex + by, 0), select.options.length - 1);
    changed();
  }
  function changed() {
    const isAny = select.options.length > 0;
    if (isAny) show(Number(select.value));
    byId("query-previous").disabled = !isAny || select.selectedIndex === 0;
    byId("query-next").disabled = !isAny || select.selectedIndex === select.options.length - 1;
    byId("query-count").textContent = isAny ? `${select.selectedIndex + 1} of ${select.options.length}` : "no match";
  }
  function find() {
    const sought = byId("query-find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const before = String(study.queries.indexOf(shown));
    const found = study.queries.flatMap((query, i) => {
      const all = `${query.id} ${plain(query.text)} ${query.label ?? ""}`.toLowerCase();
      const name = `${query.id}: ${(questionOf(query) || plain(query.text)).replace(/\s+/g, " ").slice(0, 90)}`;
      return sought.every((word) => all.includes(word)) ? [make("option", { value: i }, name)] : [];
    });
    select.replaceChildren(...found);
    if (found.some((option) => option.value === before)) select.value = before;
    changed();
  }
  function start() {
    if (!study.queries.length) {
      byId("queries").append(make("p", {}, words.none));
      return;
    }
    byId("query-controls").hidden = byId("query").hidden = false;
    byId("checkpoint-select").append(...checkpoints.map((name, i) => make("option", { value: i }, name)));
    byId("checkpoint-select").value = String(chosen);
    byId("checkpoint-select").addEventListener("change", (event) => { chosen = Number(event.target.value); fillTop(); });
    byId("query-find").addEventListener("input", find);
    select.addEventListener("change", changed);
    byId("query-previous").addEventListener("click", () => step(-1));
    byId("query-next").addEventListener("click", () => step(1));
    find();
  }

  // Open folded tables for printing.
  const asides = [...document.querySelectorAll("details.aside")];
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = asides.filter((aside) => !aside.open);
    for (const aside of closed) aside.open = true;
  });
  addEventListener("afterprint", () => { for (const aside of closed) aside.open = false; });

  start();
  drawCharts();
})();
