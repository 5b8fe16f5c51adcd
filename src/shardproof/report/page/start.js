// What keys and clicks do.

const THEMES = ["", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.setAttribute("aria-label", `Colours: ${theme || "as the system has them"}`);
  button.textContent = { "": "◐", light: "☀", dark: "☾" }[theme];
  // A page that was opened from a file may have no storage.
  try { localStorage.setItem("shardproof-theme", theme); } catch { /* it then starts as the system has it */ }
}

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length]);
}

function legend() {
  const entry = (mark, floors, value, said) => h("li", {}, h("span", { class: `cell ${tone(mark, floors)}`, "aria-hidden": "true" }, `${SIGNS[mark]} ${value}`.trim()), said);
  byId("legend").append(
    entry("e", 0, "", "equal"),
    ...(data.invariants ? [] : [entry("r", 0.5, "0.5", "rounding, in noise floors")]),
    entry("d", 10, "40", "different"), entry("d", 1e5, "1e5", "over 1e3"), entry("d", 1e8, "1e8", "over 1e6"), entry("d", 1e15, "1e15", "over 1e10, other bits, NaN"),
    entry("n", 0, "", "not checked"));
}

const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowDown: () => step(1), ArrowUp: () => step(-1),
  PageDown: () => page(1), PageUp: () => page(-1),
  Home: () => { map.at = -1; return step(1); }, End: () => { map.at = map.items.length; return step(-1); },
  n: () => step(1, differs), p: () => step(-1, differs),
  Enter: () => { const item = map.items[map.at]; if (item?.row !== undefined) openDetail(item.row); return true; },
  Escape: closeDetail,
  "/": () => { byId("search").focus(); byId("search").select(); return true; },
  t: () => { nextTheme(); return true; },
  "?": () => { byId("help").showModal(); return true; },
};
const OF_THE_MAP = new Set(["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End", "Enter"]);

function page(by) {
  const rows = Math.max(Math.floor(byId("grid").clientHeight / ROW) - 2, 1);
  const wanted = Math.min(Math.max(map.at + by * rows, 0), map.items.length - 1);
  return goTo(wanted) || goTo(wanted + 1) || goTo(wanted - 1);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (typing) {
    if (event.target.id !== "search" || !["Escape", "Enter", "ArrowDown"].includes(event.key)) return;
    byId("grid").focus();
    event.preventDefault();
    return;
  }
  // A button's Enter is its own, and arrows elsewhere scroll the page.
  if (OF_THE_MAP.has(event.key) && document.activeElement !== byId("grid")) {
    if (event.key !== "Enter" || event.target !== document.body) return;
  }
  const action = KEYS[event.key];
  if (!action) return;
  const inside = byId("detail").contains(document.activeElement);
  const moved = action();
  if (moved && ["j", "k", "n", "p"].includes(event.key)) {
    if (byId("detail").hidden) byId("grid").focus({ preventScroll: map.items.length > FEW });
    else { openDetail(map.items[map.at].row); if (!inside) byId("grid").focus({ preventScroll: true }); }
  }
  if (moved) event.preventDefault();
}

function start() {
  for (const element of document.querySelectorAll(".script-only")) element.hidden = false;
  let theme = "";
  try { theme = localStorage.getItem("shardproof-theme") ?? ""; } catch { /* no storage */ }
  setTheme(THEMES.includes(theme) ? theme : "");
  byId("theme").addEventListener("click", nextTheme);
  byId("help-open").addEventListener("click", () => byId("help").showModal());
  fillFilters(() => showRows(true));
  legend();
  showRows(false);
  const grid = byId("grid");
  grid.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  grid.addEventListener("click", (event) => {
    const row = event.target.closest("[data-at]");
    if (!row) return;
    goTo(Number(row.dataset.at));
    const column = map.columns[Number(event.target.closest("[role=gridcell]")?.ariaColIndex) - 2];
    openDetail(map.items[map.at].row, column && data.runs.indexOf(column.run));
  });
  for (const link of document.querySelectorAll("[data-open]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const run = Number(link.dataset.open);
      const row = data.runs[run].findings[0].row;
      byId("map").scrollIntoView();
      if (goToRow(row)) openDetail(row, run);
    });
  }
  document.addEventListener("keydown", pressed);
  addEventListener("hashchange", fromAddress);
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; showRows(true); } });
  fromAddress();
}

start();
