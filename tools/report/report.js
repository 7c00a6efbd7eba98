"use strict";
// What the page does beyond being read. Names come from data: they are set as text, never as HTML.

const root = document.documentElement;
root.classList.add("live"); // shows what needs this script
const find = (selector, from = document) => from.querySelector(selector);
const findAll = (selector, from = document) => [...from.querySelectorAll(selector)];
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// Dark or light: the system's choice until the button is pressed.

function toggleTheme() {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

find("#theme").addEventListener("click", toggleTheme);

const keys = { d: toggleTheme }; // what each does; letters in lower case

// Classes: columns by choice, the gain of one evaluation over another, order by any column.

function startClasses(table) {
  const heads = findAll("thead th", table);
  const body = find("tbody", table);
  const rows = [...body.rows];
  const pair = find("#pair");
  const order = { column: 1, descending: true };

  // As printed, so that a gain is the difference of what one reads; NaN: the class occurs nowhere.
  const number = (cell) => parseFloat(cell.textContent.replace("−", "-"));
  const points = (gain) =>
    Number.isNaN(gain) ? "–" : (gain > 0 ? "+" : "") + gain.toFixed(1).replace("-", "−");

  function subtract() {
    const options = findAll("select", pair).map((select) => select.selectedOptions[0]);
    const runs = options.map((option) => option.value);
    const titles = options.map((option) => option.text).join(" over ");
    find("#gains figcaption").textContent = `Gain in IoU, percentage points: ${titles}`;
    for (const row of [...rows, ...table.tFoot.rows]) {
      const [over, base] = runs.map((run) =>
        number([...row.cells].find((cell) => cell.dataset.run === run)));
      find(".gain", row).textContent = points(over - base);
    }
    const kinds = heads.filter((h) => runs.includes(h.dataset.run)).map((h) => h.dataset.kind);
    find("#lists").hidden = kinds.every((kind) => kind === kinds[0]);
  }

  function compare(a, b) {
    const { column, descending } = order;
    const sign = descending ? -1 : 1;
    if (column === 0) return sign * a.dataset.class.localeCompare(b.dataset.class);
    const [x, y] = [a, b].map((row) => number(row.cells[column]));
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // last
    return sign * (x - y);
  }

  function sort() {
    body.append(...rows.toSorted(compare));
    heads.forEach((head, k) => {
      head.ariaSort = k !== order.column ? "none" : order.descending ? "descending" : "ascending";
    });
  }

  // Bars to both sides of zero, in the order of the table.
  function draw() {
    const gains = rows.map((row) => number(find(".gain", row)) || 0);
    const low = Math.min(0, ...gains);
    const span = Math.max(0, ...gains) - low || 1;
    const chart = find("#gains .bars");
    chart.style.setProperty("--zero", `${100 * -low / span}%`);
    chart.replaceChildren(...[...body.rows].map((row) => {
      const text = find(".gain", row).textContent;
      const gain = gains[rows.indexOf(row)];
      const bar = make("i");
      bar.style.left = `${100 * (Math.min(0, gain) - low) / span}%`;
      bar.style.width = `${100 * Math.abs(gain) / span}%`;
      return make("p", { className: row.className },
        make("b", { textContent: row.dataset.class }),
        make("span", {}, bar),
        make("span", { textContent: text }));
    }));
  }

  function update() {
    if (pair) subtract();
    sort();
    if (pair) draw();
  }

  heads.forEach((head, column) => find("button", head).addEventListener("click", () => {
    order.descending = order.column === column ? !order.descending : column > 0;
    order.column = column;
    update();
  }));
  findAll("#columns input").forEach((box) => box.addEventListener("change", () => {
    for (const cell of findAll("[data-run]", table)) {
      if (cell.dataset.run === box.value) cell.hidden = !box.checked;
    }
  }));
  pair?.addEventListener("change", update);
  update();
}

// Images: two layers of one image, taken from the strips of the galleries.

function startViewer(viewer) {
  const control = Object.fromEntries(findAll("[name]", viewer).map((c) => [c.name, c]));
  const stage = find(".stage", viewer);
  const galleries = findAll(".gallery").filter((g) => find(".strip", g));
  let shown = null; // the strip

  const captions = (strip) => findAll("figcaption", strip).map((c) => c.textContent);
  const gallery = () => galleries[control.gallery.value];
  const strips = () => findAll(".strip", gallery()).filter((strip) =>
    !control.class.value || JSON.parse(strip.dataset.classes).includes(control.class.value));
  const fill = (select, names, chosen) => {
    select.replaceChildren(...names.map(([text, value]) => new Option(text, value)));
    select.value = chosen;
  };

  function enter() {
    const names = captions(gallery());
    const layers = captions(find(".strip", gallery())).map((text, k) => [text, k]);
    const layer = (name, otherwise) => (names.includes(name) ? names.indexOf(name) : otherwise);
    const classes = JSON.parse(gallery().dataset.classes).map((name) => [name, name]);
    fill(control.class, [["all", ""], ...classes], "");
    fill(control.left, layers, layer(gallery().dataset.left, 0));
    fill(control.right, layers, layer(gallery().dataset.right, layers.length - 1));
    show(strips()[0]);
  }

  function show(strip) {
    shown = strip;
    for (const name of ["--photo", "--ratio"]) {
      viewer.style.setProperty(name, strip.style.getPropertyValue(name));
    }
    for (const side of ["left", "right"]) {
      const figure = findAll("figure", strip)[control[side].value];
      const from = find("img", figure);
      const picture = find(`img.${side}`, stage);
      picture.hidden = !from; // only the image
      if (from) {
        const className = `${side} ${from.className}`;
        Object.assign(picture, { src: from.src, alt: from.alt, className });
      }
      find(`span.${side}`, stage).textContent = find("figcaption", figure).textContent;
    }
    find("h4", viewer).replaceChildren(...find("h4", strip).cloneNode(true).childNodes);
    find("output", viewer).value = `${strips().indexOf(strip) + 1} of ${strips().length}`;
  }

  function step(by) {
    const all = strips();
    show(all[(all.indexOf(shown) + by + all.length) % all.length]);
  }

  function next(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.length;
    select.dispatchEvent(new Event("change"));
  }

  function wipe(percent) {
    control.wipe.value = percent;
    stage.style.setProperty("--wipe", `${control.wipe.value}%`);
  }

  function enlarge() {
    if (viewer.matches(":modal")) return viewer.close();
    viewer.parentElement.style.minHeight = `${viewer.offsetHeight}px`; // the page stays where it is
    viewer.open = false;
    viewer.showModal();
    control.next.focus(); // not the first select, which would take the arrow keys
    control.enlarge.textContent = "Back";
  }

  viewer.addEventListener("close", () => {
    viewer.open = true;
    viewer.parentElement.style.minHeight = "";
    control.enlarge.textContent = "Enlarge";
  });

  control.gallery.addEventListener("change", enter);
  control.class.addEventListener("change", () => show(strips()[0]));
  for (const side of [control.left, control.right]) {
    side.addEventListener("change", () => show(shown));
  }
  control.previous.addEventListener("click", () => step(-1));
  control.next.addEventListener("click", () => step(1));
  control.enlarge.addEventListener("click", enlarge);
  control.wipe.addEventListener("input", () => wipe(control.wipe.value));
  control.strength.addEventListener("input", () =>
    root.style.setProperty("--overlay", control.strength.value / 100));

  // A drag wipes, a click enlarges.
  let pressed = null;
  stage.addEventListener("pointerdown", (event) => {
    pressed = { x: event.clientX, moved: false };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!event.buttons || !pressed) return;
    pressed.moved ||= Math.abs(event.clientX - pressed.x) > 4;
    const box = stage.getBoundingClientRect();
    if (pressed.moved) wipe(100 * (event.clientX - box.left) / box.width);
  });
  stage.addEventListener("click", () => pressed?.moved || enlarge());

  galleries.forEach((g, k) => g.addEventListener("click", (event) => {
    const figure = event.target.closest(".pane")?.parentElement;
    if (!figure) return;
    control.gallery.value = k;
    enter();
    const strip = figure.closest(".strip");
    control.right.value = findAll("figure", strip).indexOf(figure);
    show(strip);
    enlarge();
  }));

  Object.assign(keys, {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ",": () => wipe(Number(control.wipe.value) - 5),
    ".": () => wipe(Number(control.wipe.value) + 5),
    l: () => next(control.left),
    r: () => next(control.right),
    c: () => next(control.class),
    z: enlarge,
  });

  fill(control.gallery, galleries.map((g, k) => [g.dataset.title, k]), 0);
  wipe(50);
  enter();
}

for (const table of findAll("#iou")) startClasses(table);
for (const viewer of findAll("#viewer")) startViewer(viewer);

document.addEventListener("keydown", (event) => {
  const busy = event.target.matches("select, input[type=range], .scroll"); // these use the keys
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || busy || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  act();
});
