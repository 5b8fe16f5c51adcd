// What the page knows: the columns of the report, and how numbers and signs are written.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const WORDS = { e: "equal", r: "rounding", d: "different", n: "not-checked", " ": "not shown" };
const SIGNS = { e: "=", r: "≈", d: "≠", n: "?", " ": "" };
const SVG = "http://www.w3.org/2000/svg";

// Texts become text nodes and never markup, whatever a name holds.
function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => made(document.createElementNS(SVG, tag), attributes, children);

const stageOf = (row) => data.stages[data.stage[row]];
const nameOf = (row) => data.names[data.name[row]];
const partOf = (row) => data.parts[data.part[row]];
const stepSaid = (step) => (step < 0 ? "before step 0" : `step ${step}`);
const listed = (numbers) => `[${numbers.join(", ")}]`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function titleOf(row) {
  const part = partOf(row);
  return nameOf(row) + (part === "" ? "" : part.startsWith("[") ? part : ` [${part}]`);
}

// Error over floor: a pure number; Infinity where rounding moves nothing, NaN for NaN.
function floorsOf(run, row) {
  const found = run.error[row];
  if (found === undefined) return 0;
  const [error, floor] = found.map(number);
  return error === 0 ? 0 : floor > 0 ? error / floor : Number.isNaN(error) ? NaN : Infinity;
}
// Python writes `inf` and `nan`.
const number = (value) =>
  value === "inf" ? Infinity : value === "-inf" ? -Infinity : value === "nan" ? NaN : Number(value);

// As Python's `.{digits}g`.
function digits(value, count = 4) {
  if (value === null) return "";
  const x = number(value);
  if (Number.isNaN(x)) return "nan";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  if (x === 0) return "0";
  const [mantissa, exponent] = x.toExponential(count - 1).split("e");
  const power = Number(exponent);
  const bare = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);
  if (power >= -5 && power < count) return bare(x.toFixed(Math.max(count - 1 - power, 0)));
  return `${bare(mantissa)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

// Digits at which both numbers of every pair look different, as far as they are.
function digitsApart(pairs) {
  let count = 5;
  for (const [got, want] of pairs) {
    if (number(got) === number(want) || !Number.isFinite(number(got)) || !Number.isFinite(number(want))) continue;
    while (count < 17 && digits(got, count) === digits(want, count)) count += 1;
  }
  return count;
}

function floorsSaid(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return "not bitwise equal";
  return `${value < 100 ? value.toFixed(1) : digits(value, 2)} floors`;
}

const brief = (value) =>
  Number.isNaN(value) ? "NaN" : !Number.isFinite(value) ? "" : value < 100 ? value.toFixed(1) : value.toExponential(0).replace("+", "");

// Colours tell sizes; the sign and the number tell the same.
function tone(mark, floors) {
  if (mark === "r") return floors > 1 ? "r2" : "r";
  if (mark !== "d") return mark === " " ? "a" : mark;
  if (!Number.isFinite(floors)) return "d4";
  const power = Math.log10(floors);
  return power < 3 ? "d1" : power < 6 ? "d2" : power < 10 ? "d3" : "d4";
}

// What one rank has to do with a tensor: its mark, and about how many floors it is off.
function ofRank(run, row, rank) {
  const mark = run.marks[row];
  if (mark === "n" || mark === " ") return { mark, floors: 0 };
  const letter = run.by_rank[row]?.[rank] ?? (run.by_rank[row] ? "." : "=");
  const wrong = run.wrong[row]?.includes(rank);
  if (letter === "." && !wrong) return { mark: " ", floors: 0 };
  const at = data.scale.letters.indexOf(letter);
  const most = letter === "*";
  const floors = most ? floorsOf(run, row) : letter === "!" ? (run.error[row] && Number.isNaN(number(run.error[row][0])) ? NaN : Infinity)
    : at < 0 ? 0 : 10 ** (at / data.scale.per_decade + data.scale.lowest);
  if (wrong) return { mark: "d", floors: floors || Infinity, about: !most };
  return { mark: floors === 0 ? "e" : "r", floors, about: !most };
}

const reasonOf = (run, row) => (run.reason[row] === undefined ? "" : data.texts[run.reason[row]]);
const layoutOf = (run, row) => (run.layout[row] < 0 ? "" : data.texts[run.layout[row]]);
const shapeOf = (run, row) => (run.shape[row] < 0 ? [] : data.shapes[run.shape[row]]);
