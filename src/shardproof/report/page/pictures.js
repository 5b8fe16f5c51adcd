// One tensor drawn: who holds which part, its values, where it differs.

const WIDE = 256;

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const spans = (ranks) => {
  const said = [];
  for (let at = 0; at < ranks.length; at += 1) {
    const from = ranks[at];
    while (ranks[at + 1] === ranks[at] + 1) at += 1;
    said.push(from === ranks[at] ? String(from) : `${from}-${ranks[at]}`);
  }
  return said.join(",");
};

function folded(picture) {
  const dims = (from, to) => (to - from === 1 ? `dim ${from}` : `dims ${from}-${to - 1}`);
  const count = picture.shape.length;
  if (count < 2) return count ? `dim 0 across, ${picture.columns}` : "one value";
  return `${dims(0, picture.split)} down, ${picture.rows}; ${dims(picture.split, count)} across, ${picture.columns}`;
}

function frame(picture) {
  const [down, across] = picture.cells;
  const high = Math.min(Math.max((WIDE * picture.rows) / Math.max(picture.columns, 1), 30), 240);
  return { down, across, w: WIDE / across, t: high / down, high };
}

// Rectangles of cells that are alike: rows of equal cells, joined downwards where they fit.
function rectangles(cells, down, across) {
  const open = new Map();
  const done = [];
  for (let y = 0; y < down; y += 1) {
    const here = new Set();
    for (let x = 0; x < across; ) {
      const value = cells[y * across + x];
      let end = x + 1;
      while (end < across && cells[y * across + end] === value) end += 1;
      const key = `${x} ${end} ${value}`;
      here.add(key);
      if (open.has(key)) open.get(key).bottom = y + 1;
      else open.set(key, { value, x, end, y, bottom: y + 1 });
      x = end;
    }
    for (const [key, one] of open) if (!here.has(key)) { done.push(one); open.delete(key); }
  }
  return [...done, ...open.values()];
}

function holders(run, row, picture) {
  if (!picture.owners.length) return h("p", {}, "More sets of ranks hold parts of it than a picture can tell apart.");
  const { down, across, w, t, high } = frame(picture);
  const held = bytes(data.texts[picture.held]);
  const regions = rectangles(held, down, across).map((one) => {
    const owners = picture.owners[one.value];
    const [width, height] = [(one.end - one.x) * w, (one.bottom - one.y) * t];
    const said = spans(owners);
    const group = svg("g", { class: "held", "data-ranks": ` ${owners.join(" ")} ` }, svg("title", {}, owners.length ? `rank${owners.length > 1 ? "s" : ""} ${said}` : "no rank"),
      svg("rect", { class: `region o${one.value % 8}`, x: one.x * w, y: one.y * t, width, height, rx: 3 }));
    if (width > said.length * 7 + 4 && height > 12) group.append(svg("text", { x: one.x * w + width / 2, y: one.y * t + height / 2 }, said));
    return group;
  });
  const words = picture.owners.map((owners) => spans(owners)).join("; ");
  const image = svg("svg", { viewBox: `0 0 ${WIDE} ${high}`, width: WIDE, height: high, role: "img", "aria-label": `Parts of the tensor, by the ranks that hold them: ${words}` }, regions);
  const point = (rank, pressed) => {
    for (const group of image.querySelectorAll(".held")) group.classList.toggle("faded", pressed && !group.dataset.ranks.includes(` ${rank} `));
  };
  return h("div", { class: "holders" },
    h("figure", {}, image, h("figcaption", {}, `The whole tensor: ${folded(picture)}. Numbers are ranks.`)),
    h("figure", {}, meshOf(run, row, picture, point), h("figcaption", {}, "The mesh. Press a rank to see its part.")));
}

function meshOf(run, row, picture, point) {
  const axes = run.axes.filter(([, size]) => size > 1);
  const mesh = h("div", { class: "mesh", role: "group", "aria-label": "Ranks on the mesh" });
  const columns = data.recorded || !axes.length ? Math.min(run.world, 8) : axes.at(-1)[1];
  const wide = Math.min(columns, 16);
  const plain = data.recorded || columns > wide || axes.length === 0;
  mesh.style.gridTemplateColumns = plain ? `repeat(${wide}, auto)` : `auto repeat(${wide}, auto)`;
  if (!plain) mesh.append(h("span", { class: "axis" }), ...Array.from({ length: wide }, (_, n) => h("span", { class: "axis" }, `${axes.at(-1)[0]} ${n}`)));
  for (let rank = 0; rank < Math.min(run.world, 256); rank += 1) {
    if (!plain && rank % wide === 0) mesh.append(h("span", { class: "axis" }, rowSaid(axes.slice(0, -1), rank / wide)));
    const own = picture.owners.findIndex((owners) => owners.includes(rank));
    const wrong = run.wrong[row]?.includes(rank);
    const button = h("button", { type: "button", class: `${own < 0 ? "" : `o${own % 8}`}${wrong ? " wrong" : ""}`, "aria-pressed": "false", "aria-label": `rank ${rank}${wrong ? ", different" : ""}${own < 0 ? ", holds nothing" : ""}` }, wrong ? `${rank} ≠` : String(rank));
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      for (const other of mesh.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && pressed));
      point(rank, pressed);
    });
    mesh.append(button);
  }
  return mesh;
}

function rowSaid(axes, at) {
  const said = [];
  let rest = at;
  for (const [axis, size] of [...axes].reverse()) {
    said.unshift(`${axis} ${rest % size}`);
    rest = Math.floor(rest / size);
  }
  return said.join(", ");
}

function sideBySide(run, row, picture) {
  const against = stageOf(row) === "batch" ? "want (its peer)" : `want (${data.reference})`;
  const box = h("div", { class: "side" });
  const shown = picture.got;
  // The rank that is furthest off is shown first.
  const far = ([, got]) => Math.max(...got.map((value, n) => (value === null ? -1 : Math.abs(number(value) - number(picture.want[n])))).map((one) => (Number.isNaN(one) ? Infinity : one)));
  const worst = shown.reduce((most, one, at) => (far(one) > far(shown[most]) ? at : most), 0);
  const whole = picture.window[0] === picture.rows && picture.window[1] === picture.columns;
  const from = whole ? "All of it." : `Around the element that differs most: rows ${picture.first[0]}-${picture.first[0] + picture.window[0] - 1} of ${picture.rows}, columns ${picture.first[1]}-${picture.first[1] + picture.window[1] - 1} of ${picture.columns}.`;
  const show = (at) => {
    const [, got] = shown[at];
    const want = picture.want.map((value, n) => (got[n] === null ? null : value));
    const pairs = got.map((value, n) => [value, want[n]]).filter(([value]) => value !== null);
    // What only rounding moved looks the same, and the third table has the difference.
    const count = run.marks[row] === "d" ? digitsApart(pairs) : 5;
    const apart = got.map((value, n) => (value === null ? null : number(value) === number(want[n]) ? 0 : number(value) - number(want[n])));
    const limit = data.scale.multiple * number((run.error[row] ?? [0, 0])[1]);
    const off = apart.map((value) => run.marks[row] === "d" && value !== null && !(Math.abs(value) <= limit));
    box.replaceChildren(table("got", got, picture, off, count), table(against, want, picture, [], count), table("got - want", apart, picture, off, 3));
  };
  const choice = tabs(shown.map(([rank]) => `rank ${rank}`), worst, show, "Whose values");
  return [choice, h("p", { class: "sub" }, `${from} A dash is held by another rank.`), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Values side by side" }, box)];
}

function table(title, values, picture, off, count) {
  const [down, across] = picture.window;
  const rows = [];
  for (let y = 0; y < down; y += 1) {
    const cells = [];
    for (let x = 0; x < across; x += 1) {
      const value = values[y * across + x];
      const nothing = value === null || value === undefined;
      cells.push(h("td", { class: nothing ? "none" : off[y * across + x] ? "off" : "" }, nothing ? "–" : digits(Number.isNaN(value) ? "nan" : value, count)));
    }
    rows.push(h("tr", {}, cells));
  }
  return h("table", {}, h("caption", {}, title), h("tbody", {}, rows));
}

function heatOf(picture) {
  if (!picture.heat) return h("p", {}, "Every element has the reference's bits.");
  const { down, across, w, t, high } = frame(picture);
  const last = data.scale.letters.length - 1;
  const level = (letter) => (letter === "=" ? 0 : letter === "!" ? 8 : 1 + Math.min(Math.floor((data.scale.letters.indexOf(letter) / last) * 7), 6));
  const cells = [...picture.heat].map(level);
  const regions = rectangles(cells, down, across).map((one) =>
    svg("rect", { class: `q${one.value}`, x: one.x * w, y: one.y * t, width: (one.end - one.x) * w + 0.3, height: (one.bottom - one.y) * t + 0.3 }));
  const image = svg("svg", { viewBox: `0 0 ${WIDE} ${high}`, width: WIDE, height: high, role: "img", "aria-label": `Differences from ${digits(picture.low, 2)} to ${digits(picture.high, 2)}, by place in the tensor` }, regions);
  const bar = svg("svg", { viewBox: "0 0 112 12", width: 112, height: 12, "aria-hidden": "true" }, Array.from({ length: 7 }, (_, n) => svg("rect", { class: `q${n + 1}`, x: n * 16, y: 0, width: 16, height: 12 })));
  const pooled = picture.rows > down || picture.columns > across ? ` Each cell is the largest of ${Math.ceil(picture.rows / down)} x ${Math.ceil(picture.columns / across)} elements.` : "";
  const black = picture.heat.includes("!") ? " Cells of the strongest contrast hold NaN or infinity." : "";
  return h("figure", { class: "heat" }, image, h("div", { class: "scale" }, digits(picture.low, 2), bar, digits(picture.high, 2)),
    h("figcaption", {}, `|got - want|, the worst rank of each place; the scale is of powers of ten. Cells as faint as the page are equal.${pooled}${black}`));
}

function tabs(names, at, show, label) {
  const box = h("div", { class: "tabs", role: "group", "aria-label": label });
  const press = (number) => {
    [...box.children].forEach((button, n) => button.setAttribute("aria-pressed", String(n === number)));
    show(number);
  };
  names.forEach((name, number) => box.append(h("button", { type: "button", onclick: () => press(number) }, name)));
  press(at);
  return box;
}
