// One tensor: its verdict under each strategy, and all that was kept of it.

const detail = { row: -1, run: 0 };

// The run that has most to say of a row: where it differs, else where a picture was kept.
function bestRun(row) {
  const shown = runsShown();
  const found = shown.find((run) => run.marks[row] === "d") ?? shown.find((run) => run.pictures[row]) ?? shown.find((run) => run.marks[row] !== " ") ?? shown[0];
  return data.runs.indexOf(found);
}

function openDetail(row, run = bestRun(row)) {
  detail.row = row;
  const box = byId("detail");
  const title = h("h3", { id: "detail-title", tabindex: -1 }, titleOf(row));
  const body = h("div");
  const named = data.runs.map((one) => `${SIGNS[one.marks[row]]} ${one.strategy}`.trim());
  const choice = tabs(named, run, (at) => { detail.run = at; body.replaceChildren(...ofRun(data.runs[at], row)); remember(); }, data.recorded ? "Recording" : "Strategy");
  const sub = `${stageOf(row)}, ${stepSaid(data.steps[row])}`;
  box.replaceChildren(
    h("header", {}, h("div", {}, title, h("p", { class: "sub" }, sub)), h("button", { type: "button", class: "close", "aria-label": "Close", onclick: closeDetail }, "✕")),
    choice, body);
  box.hidden = false;
  byId("both").classList.add("open");
  box.scrollTop = 0;
  title.focus({ preventScroll: innerWidth >= 1000 });
}

function closeDetail() {
  if (byId("detail").hidden) return false;
  byId("detail").hidden = true;
  byId("both").classList.remove("open");
  history.replaceState(null, "", location.pathname + location.search);
  byId("grid").focus({ preventScroll: true });
  return true;
}

function ofRun(run, row) {
  const mark = run.marks[row];
  if (mark === " ") return [h("p", { class: "sub" }, "This run shows no such tensor.")];
  const [error, floor] = run.error[row] ?? [0, 0];
  const shape = shapeOf(run, row);
  const facts = [["verdict", `${WORDS[mark]}${mark === "d" || mark === "r" ? `: ${floorsSaid(floorsOf(run, row))}` : ""}`]];
  const reason = reasonOf(run, row);
  if (reason) facts.push(["why", reason]);
  if (run.error[row]) facts.push(["difference", `${digits(error, 3)}, where rounding moves ${number(floor) === 0 ? "nothing at all" : digits(floor, 3)}`]);
  if (shape.length) facts.push(["shape", listed(shape)]);
  if (layoutOf(run, row)) facts.push(["layout", layoutOf(run, row)]);
  const findings = run.findings.filter((one) => one.row === row);
  facts.push(...findings.map((finding) => ["cause", finding.why]));
  const parts = [h("dl", { class: "facts" }, facts.map(([label, said]) => h("div", {}, h("dt", {}, label), h("dd", {}, said))))];
  if (run.by_rank[row] || run.wrong[row]) parts.push(h("h4", {}, "Rank by rank, in noise floors"), ranksOf(run, row));
  parts.push(...drawn(run, row), ...findings.flatMap(cause));
  return parts;
}

function cause(finding) {
  const tried = finding.tried.map(([name, holds, left]) => {
    const rest = number(left);
    return h("li", {}, `${name}: ${holds ? "holds" : "no"}${Number.isFinite(rest) && rest ? `, ${floorsSaid(rest)} left` : ""}`);
  });
  return [h("h4", {}, "Evidence"), h("p", {}, finding.evidence), tried.length ? [h("h4", {}, "Hypotheses tried"), h("ul", { class: "tried" }, tried)] : [],
    finding.fix ? h("div", { class: "fix" }, h("h4", {}, "Fix"), h("p", {}, finding.fix)) : []].flat();
}

function ranksOf(run, row) {
  const cells = [];
  for (let rank = 0; rank < Math.min(run.world, 256); rank += 1) {
    const { mark, floors, about } = ofRank(run, row, rank);
    const near = about && Number.isFinite(floors);
    const said = mark === " " ? "holds nothing" : `${WORDS[mark]}${floors ? `, ${near ? "about " : ""}${floorsSaid(floors)}` : ""}`;
    cells.push(h("span", { class: `cell ${tone(mark, floors)}`, title: `rank ${rank}: ${said}` }, `${rank} ${SIGNS[mark] || "–"} ${floors ? `${near && mark === "d" ? "~" : ""}${brief(floors)}` : ""}`.trim()));
  }
  return h("div", { class: "ranks" }, cells);
}

function drawn(run, row) {
  const own = run.pictures[row];
  const parts = [];
  if (own) {
    parts.push(h("h4", {}, "Who holds which part"), holders(run, row, own));
    if (own.got.length) parts.push(h("h4", {}, "Values"), ...sideBySide(run, row, own));
    parts.push(h("h4", {}, "Where it differs"), heatOf(own));
    return parts;
  }
  const other = Object.keys(run.pictures).map(Number).find((at) => run.layout[at] === run.layout[row] && run.shape[at] === run.shape[row] && layoutOf(run, row) && !["batch", "forward", "backward"].includes(stageOf(at)) === !["batch", "forward", "backward"].includes(stageOf(row)));
  if (other !== undefined) parts.push(h("h4", {}, "Who holds which part"), holders(run, row, run.pictures[other]), h("p", { class: "sub" }, `As ${stageOf(other)} of ${titleOf(other)}, which is laid out alike.`));
  const samples = run.samples[row];
  if (samples) {
    const count = digitsApart(samples.map(([, , got, want]) => [got, want]));
    parts.push(h("h4", {}, "Values that differ most"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Values that differ most" },
      h("table", { class: "values" }, h("thead", {}, h("tr", {}, ["rank", "index", "got", "want"].map((head) => h("th", { scope: "col" }, head)))),
        h("tbody", {}, samples.map(([rank, index, got, want]) => h("tr", {}, [rank, listed(index), digits(got, count), digits(want, count)].map((value) => h("td", {}, value))))))));
  }
  parts.push(h("h4", {}, "Values"), h("p", { class: "sub" }, notKept(run, row)));
  return parts;
}

function notKept(run, row) {
  if (run.invariants || data.invariants) return "Replicas were held against each other without keeping values.";
  if (["loss", "grad-norm"].includes(stageOf(row))) return "A single number: it stands above.";
  const how = data.recorded ? "shardproof show prints any tensor of a recording." : "shardproof check --show RANK prints what a rank held.";
  return `Not kept. A report keeps values of at most ${data.kept} tensors of a run: those that differ first and most, and one of each layout. ${how}`;
}

// The address names the tensor, so that it can be sent to somebody who has the same file.
function remember() {
  const row = detail.row;
  const place = new URLSearchParams({ step: data.steps[row], stage: stageOf(row), name: nameOf(row), part: partOf(row), in: data.runs[detail.run].strategy });
  history.replaceState(null, "", `#${place}`);
}

function fromAddress() {
  const place = new URLSearchParams(location.hash.slice(1));
  if (!place.has("name")) return;
  const wanted = ["step", "stage", "name", "part"].map((key) => place.get(key) ?? "");
  const row = data.steps.findIndex((step, at) => [String(step), stageOf(at), nameOf(at), partOf(at)].every((one, n) => one === wanted[n]));
  if (row < 0 || !goToRow(row)) return;
  const run = data.runs.findIndex((one) => one.strategy === place.get("in"));
  byId("map").scrollIntoView();
  openDetail(row, run < 0 ? undefined : run);
}
