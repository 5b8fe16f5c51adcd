// Which rows are shown: by name, stage, step, strategy and verdict.

const chosen = { text: "", stage: "", step: "", run: "", marks: new Set() };

// Text is looked for anywhere in a name; with * or ? it is a glob for the whole of it.
function matcher(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return () => true;
  if (!/[*?]/.test(wanted)) return (name) => name.includes(wanted);
  const literal = (piece) => piece.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const pattern = wanted.split(/([*?])/).map((piece) => (piece === "*" ? ".*" : piece === "?" ? "." : literal(piece)));
  const whole = new RegExp(`^${pattern.join("")}$`, "s");
  return (name) => whole.test(name);
}

const runsShown = () => (chosen.run === "" ? data.runs : [data.runs[Number(chosen.run)]]);

function rowsShown() {
  const matches = matcher(chosen.text);
  const named = data.names.map((name) => name.toLowerCase());
  const parts = data.parts.map((part) => part.toLowerCase());
  const seen = new Map();
  const runs = runsShown();
  const stage = chosen.stage === "" ? -1 : Number(chosen.stage);
  const rows = [];
  for (let row = 0; row < data.steps.length; row += 1) {
    if (stage >= 0 && data.stage[row] !== stage) continue;
    if (chosen.step !== "" && data.steps[row] !== Number(chosen.step)) continue;
    const key = data.name[row] * parts.length + data.part[row];
    if (!seen.has(key)) seen.set(key, matches(named[data.name[row]]) || matches(titleOf(row).toLowerCase()));
    if (!seen.get(key)) continue;
    if (!runs.some((run) => (chosen.marks.size ? chosen.marks.has(run.marks[row]) : chosen.run === "" || run.marks[row] !== " "))) continue;
    rows.push(row);
  }
  return rows;
}

function fillFilters(changed) {
  const option = (value, text) => h("option", { value }, text);
  const stages = [...new Set(data.stage)].sort((a, b) => a - b);
  const steps = [...new Set(data.steps)];
  byId("stage").append(option("", "all"), ...stages.map((stage) => option(stage, data.stages[stage])));
  byId("step").append(option("", "all"), ...steps.map((step) => option(step, step < 0 ? "before 0" : step)));
  byId("strategy").append(option("", "all"), ...data.runs.map((run, at) => option(at, run.strategy)));
  for (const mark of ["d", "r", "e", "n"]) {
    const count = data.runs.reduce((sum, run) => sum + run.marks.split(mark).length - 1, 0);
    const chip = h("button", { type: "button", class: "chip", "aria-pressed": "false", "data-mark": mark },
      h("b", { "aria-hidden": "true" }, SIGNS[mark]), ` ${WORDS[mark]} ${count}`);
    chip.addEventListener("click", () => {
      if (!chosen.marks.delete(mark)) chosen.marks.add(mark);
      chip.setAttribute("aria-pressed", String(chosen.marks.has(mark)));
      changed();
    });
    byId("verdicts").append(chip);
  }
  const read = () => {
    chosen.text = byId("search").value;
    chosen.stage = byId("stage").value;
    chosen.step = byId("step").value;
    chosen.run = byId("strategy").value;
    changed();
  };
  byId("filters").addEventListener("input", read);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => {
    chosen.marks.clear();
    for (const chip of byId("verdicts").children) chip.setAttribute("aria-pressed", "false");
    setTimeout(read);
  });
}
