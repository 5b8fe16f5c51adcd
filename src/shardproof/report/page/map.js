// The map: only the rows in sight are elements, so that 20,000 tensors scroll as 20 do.

const ROW = 28;
const HEAD = 34;
const FEW = 32;
const LONGEST_TAIL = 22;

const map = { items: [], rows: [], at: -1, open: new Set(), body: null, head: null, drawn: [-1, -1] };

function itemsOf(rows) {
  const items = [];
  let before = "";
  for (const row of rows) {
    const group = `${stepSaid(data.steps[row])}, ${stageOf(row)}`;
    if (group !== before) items.push({ group });
    before = group;
    items.push({ row });
  }
  return items;
}

function columnsOf() {
  const columns = [];
  for (const run of runsShown()) {
    columns.push({ run });
    if (map.open.has(run)) for (let rank = 0; rank < run.world; rank += 1) columns.push({ run, rank });
  }
  return columns;
}

function showRows(keep) {
  const active = map.items[map.at]?.row;
  map.rows = rowsShown();
  map.items = itemsOf(map.rows);
  map.columns = columnsOf();
  const narrow = innerWidth < 560;
  const name = narrow ? "minmax(150px, 1fr)" : "minmax(236px, 1fr)";
  const sizes = map.columns.map((c) => (c.rank === undefined ? (narrow ? "62px" : "minmax(84px, 150px)") : "30px"));
  const grid = byId("grid");
  grid.style.setProperty("--columns", [name, ...sizes].join(" "));
  map.at = keep ? map.items.findIndex((item) => item.row === active && active !== undefined) : -1;
  if (map.at < 0) map.at = map.items.findIndex((item) => item.row !== undefined);
  grid.setAttribute("aria-rowcount", map.items.length + 1);
  grid.setAttribute("aria-colcount", map.columns.length + 1);
  grid.classList.toggle("few", map.items.length <= FEW);
  const across = (narrow ? 150 : 236) + map.columns.reduce((sum, c) => sum + (c.rank === undefined ? (narrow ? 64 : 86) : 32), 0);
  map.body = h("div", { class: "body", role: "rowgroup" });
  map.body.style.height = `${map.items.length * ROW}px`;
  map.body.style.minWidth = `${across}px`;
  map.head = headRow();
  map.head.style.minWidth = `${across}px`;
  grid.replaceChildren(h("div", { role: "rowgroup", class: "head-group" }, map.head), map.body);
  if (!map.rows.length) map.body.append(h("div", { role: "row" }, h("div", { role: "gridcell", class: "nothing" }, "No tensor is like that.")));
  map.drawn = [-1, -1];
  draw();
  byId("count").textContent = `${plural(map.rows.length, "tensor")} of ${data.steps.length}`;
}

function headRow() {
  const cells = map.columns.map((column, at) => {
    const place = { role: "columnheader", "aria-colindex": at + 2 };
    if (column.rank !== undefined) return h("div", { ...place, class: "rank", title: `rank ${column.rank}` }, h("span", { class: "unseen" }, "rank "), String(column.rank));
    const open = map.open.has(column.run);
    if (column.run.world < 2) return h("div", place, column.run.strategy);
    const press = () => {
      if (!map.open.delete(column.run)) map.open.add(column.run);
      showRows(true);
      byId("grid").querySelectorAll(".head button")[runsShown().indexOf(column.run)]?.focus();
    };
    return h("div", place, h("button", { type: "button", onclick: press, "aria-expanded": String(open), title: `${column.run.strategy}: ${open ? "hide" : "show"} its ${column.run.world} ranks` },
      h("span", { "aria-hidden": "true" }, open ? "▾ " : "▸ "), column.run.strategy));
  });
  return h("div", { class: "row head", role: "row", "aria-rowindex": 1 }, h("div", { class: "name", role: "columnheader", "aria-colindex": 1 }, "tensor"), cells);
}

function cellOf(column, row, at) {
  const { run, rank } = column;
  const whole = rank === undefined;
  const { mark, floors, about } = whole ? { mark: run.marks[row], floors: floorsOf(run, row) } : ofRank(run, row, rank);
  const said = mark === "d" || mark === "r" ? `${WORDS[mark]}, ${about && Number.isFinite(floors) ? "about " : ""}${floorsSaid(floors)}` : WORDS[mark];
  const reason = mark === "n" ? `: ${reasonOf(run, row)}` : "";
  const place = `${run.strategy}${whole ? "" : ` rank ${rank}`}: ${said}${reason}`;
  const value = whole && (mark === "d" || mark === "r") ? brief(floors) : "";
  return h("div", { role: "gridcell", "aria-colindex": at + 2, class: `cell ${tone(mark, floors)}`, title: place },
    h("span", { "aria-hidden": "true" }, SIGNS[mark], value ? ` ${value}` : ""), h("span", { class: "unseen" }, said));
}

// Where the end of a name begins that is shown whatever has to be left out: its last two parts, or one that is long.
function tailOf(name) {
  const last = name.lastIndexOf(".");
  const before = name.lastIndexOf(".", last - 1);
  return name.length - before <= LONGEST_TAIL && last > 0 ? before + 1 : last + 1;
}

function rowOf(item, at) {
  const attributes = { id: `row-${at}`, role: "row", "aria-rowindex": at + 2 };
  let row;
  if (item.row === undefined) {
    row = h("div", { ...attributes, class: "row group" }, h("div", { role: "rowheader", "aria-colspan": map.columns.length + 1 }, item.group));
  } else {
    const title = titleOf(item.row);
    const cut = tailOf(nameOf(item.row));
    const name = h("div", { class: "name", role: "rowheader", "aria-colindex": 1, title }, h("span", { class: "begin" }, title.slice(0, cut)), h("span", { class: "end" }, title.slice(cut)));
    const active = at === map.at;
    row = h("div", { ...attributes, class: `row tensor${active ? " active" : ""}`, "aria-selected": String(active), "data-at": at }, name, map.columns.map((column, n) => cellOf(column, item.row, n)));
  }
  row.style.top = `${at * ROW}px`;
  return row;
}

function draw() {
  const grid = byId("grid");
  const all = map.items.length <= FEW;
  const first = all ? 0 : Math.max(Math.floor((grid.scrollTop - HEAD) / ROW) - 6, 0);
  const last = all ? map.items.length : Math.min(first + Math.ceil(grid.clientHeight / ROW) + 14, map.items.length);
  if (first === map.drawn[0] && last === map.drawn[1]) return;
  map.drawn = [first, last];
  if (map.rows.length) map.body.replaceChildren(...map.items.slice(first, last).map((item, n) => rowOf(item, first + n)));
  const seen = byId(`row-${map.at}`);
  if (seen) grid.setAttribute("aria-activedescendant", seen.id);
  else grid.removeAttribute("aria-activedescendant");
}

function goTo(at) {
  if (at < 0 || at >= map.items.length || map.items[at].row === undefined) return false;
  map.at = at;
  const grid = byId("grid");
  const top = at * ROW;
  if (map.items.length > FEW) {
    if (top < grid.scrollTop) grid.scrollTop = Math.max(top - ROW, 0);
    else if (top + ROW + HEAD > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + ROW + HEAD - grid.clientHeight;
  }
  map.drawn = [-1, -1];
  draw();
  if (map.items.length <= FEW) byId(`row-${at}`)?.scrollIntoView({ block: "nearest" });
  return true;
}

// The next item in a direction that is a tensor, and as wanted.
function step(by, wanted = () => true) {
  let at = map.at + by;
  while (at >= 0 && at < map.items.length) {
    if (map.items[at].row !== undefined && wanted(map.items[at].row)) return goTo(at);
    at += by;
  }
  return false;
}

const differs = (row) => runsShown().some((run) => run.marks[row] === "d");

// Shows a row whatever the filters, which are taken back where they hide it.
function goToRow(row) {
  let at = map.items.findIndex((item) => item.row === row);
  if (at < 0) {
    byId("filters").reset();
    for (const key of ["text", "stage", "step", "run"]) chosen[key] = "";
    showRows(false);
    at = map.items.findIndex((item) => item.row === row);
  }
  return goTo(at);
}
