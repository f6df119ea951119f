"use strict";
// Everything is made of text nodes and elements; no text is ever read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = matchMedia("(max-width: 46rem)").matches ? 24 : 48;
const classes = new Map(data.classes.map((one) => [one.id, one]));
const number = (value) => value.toLocaleString("en");
const percent = (share, digits = 0) => (100 * share).toFixed(digits) + " %";
const counted = (count, one, many) => number(count) + " " + (count === 1 ? one : many);
const nameOf = (id) => classes.get(id)?.name ?? "id " + id;
const asked = data.classes.filter((one) => one.images);

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const png = (text) => "data:image/png;base64," + text;

// ---- head
function head() {
  const title = counted(data.rows, "image", "images") + " of " + counted(asked.length, "class", "classes");
  document.title = "Dataset report: " + title;
  $("title").textContent = title;
  const run = Object.fromEntries(data.run.map(([name, rows]) => [name, Object.fromEntries(rows)]));
  const sizes = data.sizes.map(([width, height]) => width + " × " + height);
  const drawn = run.model?.id ? "Drawn by " + run.model.id + ". " : "Not drawn by a model of this program. ";
  const many = sizes.length > 3 ? sizes.slice(0, 3).join(", ") + " and other sizes" : sizes.join(", ");
  const pixels = sizes.length ? many + " pixels. " : "";
  const rest = data.missing ? "Not finished: " + counted(data.missing, "shard is", "shards are") + " still missing. " : "";
  const lost = data.damaged ? counted(data.damaged, "row has", "rows have") + " a picture that does not decode." : "";
  $("lead").textContent = drawn + pixels + rest + lost;
  const fact = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));
  const rated = data.classes.filter((one) => one.quality !== null);
  const count = (list) => list.reduce((sum, value) => sum + value, 0);
  const ratings = count(rated.map((one) => count(one.qualities)));
  const mean = ratings ? count(rated.map((one) => one.quality * count(one.qualities))) / ratings : null;
  const alike = count(data.twin_groups);
  $("strip").append(
    fact("Accepted", percent(data.accepted / data.rows), number(data.accepted) + " of " + number(data.rows)),
    fact("Classes", number(asked.length), imbalance()),
    ...(mean === null ? [] : [fact("Mean quality", mean.toFixed(2), "0 worst, 1 best")]),
    ...(data.background === null ? [] : [fact("Background", percent(data.background), "of all pixels" + (data.ignored ? "; ignored " + percent(data.ignored, 1) : ""))]),
    fact("Nearly equal", number(alike), alike ? "images, in " + counted(data.twin_groups.length, "group", "groups") : "no pair was found"),
  );
}
function imbalance() {
  const counts = asked.map((one) => one.images);
  if (counts.length < 2) return "";
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  return low === high ? number(low) + " images each" : number(low) + " to " + number(high) + " images each";
}
function sections() {
  const absent = { rejections: !data.reasons.length, quality: false, alike: !data.twins.length };
  const list = el("ul");
  for (const section of document.querySelectorAll("main section")) {
    section.hidden = Boolean(absent[section.id]);
    if (!section.hidden) list.append(el("li", {}, el("a", { href: "#" + section.id }, section.querySelector("h2").textContent)));
  }
  $("sections").append(list);
}

// ---- pictures
const state = { view: Object.keys(data.views)[0], layer: "mask", limit: PAGE, shown: [], at: 0, opener: null };

function describe(entry) {
  const words = [entry.key];
  if (entry.prompt) words.push(entry.prompt);
  words.push(entry.damaged ? "the picture does not decode" : "with its mask of " + (entry.classes ?? []).map(nameOf).join(", "));
  if (!entry.accepted) words.push("rejected" + (entry.reason ? ": " + entry.reason : ""));
  return words.join("; ");
}
function stack(entry, text) {
  const box = el("span", { className: "stack" });
  if (entry.damaged) {
    box.append(el("span", { className: "lost" }, "This picture does not decode"));
    return box;
  }
  box.style.aspectRatio = entry.size[0] + " / " + entry.size[1];
  box.append(el("img", { src: "data:image/webp;base64," + entry.image, alt: text, decoding: "async" }));
  const heat = state.layer === "map" && entry.maps;
  if (state.layer === "mask") box.append(el("img", { className: "over", src: png(entry.mask), alt: "" }));
  if (heat) box.append(coloured(entry.maps[0], "over heat"));
  return box;
}
function coloured(map, className) {
  const canvas = el("canvas", { className });
  const image = new Image();
  image.onload = () => {
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set(warm(pixels.data[at] / 255), at);
    context.putImageData(pixels, 0, 0);
  };
  image.src = png(map);
  return canvas;
}
function warm(value) {
  const stops = [[36, 22, 74], [118, 33, 110], [207, 68, 70], [246, 149, 47], [252, 246, 170]];
  const place = value * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  return [...stops[low].map((one, index) => Math.round(one + part * (stops[low + 1][index] - one))), 255];
}
function tile(entry, group, place) {
  const names = (entry.classes ?? []).map(nameOf).join(", ") || entry.key;
  const quality = entry.quality?.length ? Math.min(...entry.quality).toFixed(2) : "";
  const button = el("button", { type: "button", className: "tile", "aria-label": describe(entry) },
    stack(entry, ""),
    el("span", { className: "words" }, el("b", {}, names), el("span", {}, quality)),
    entry.accepted ? null : el("span", { className: "rejected" }, "Rejected"));
  button.addEventListener("click", () => open(group, place, button));
  return button;
}
function matching() {
  const wanted = $("class").value, low = Number($("low").value), high = Number($("high").value);
  return data.views[state.view].map((place) => data.entries[place]).filter((entry) => {
    if (wanted && !(entry.classes ?? []).includes(Number(wanted))) return false;
    if (!entry.quality?.length) return low <= 0;
    const least = Math.min(...entry.quality);
    return least >= low && (least <= high || high >= 1);
  });
}
function draw() {
  const found = state.view ? matching() : [];
  state.shown = found.slice(0, state.limit);
  $("grid").replaceChildren(...state.shown.map((entry, place) => el("li", {}, tile(entry, state.shown, place))));
  $("count").textContent = found.length ? "" + state.shown.length + " of " + counted(found.length, "picture", "pictures") : "No picture is like that.";
  $("more").hidden = state.shown.length === found.length;
  for (const [place, button] of [...$("grid").querySelectorAll("button")].entries()) button.tabIndex = place ? -1 : 0;
}
function moveInGrid(event) {
  const buttons = [...$("grid").querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: buttons.length - 1 - at }[event.key];
  if (step === undefined || !buttons[at + step]) return;
  event.preventDefault();
  buttons[at].tabIndex = -1;
  buttons[at + step].tabIndex = 0;
  buttons[at + step].focus();
}
function segments(field, name, choices, chosen, change) {
  for (const [value, label] of choices) {
    const input = el("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => change(value));
    field.append(el("label", {}, input, label));
  }
}
function pictures() {
  const titles = { sample: "Sample", best: "Best", worst: "Worst", rejected: "Rejected", damaged: "Damaged" };
  segments($("views"), "view", Object.keys(data.views).map((name) => [name, titles[name]]), state.view, show);
  const layers = [["mask", "Mask"]];
  if (data.entries.some((entry) => entry.maps)) layers.push(["map", "Map"]);
  layers.push(["none", "None"]);
  segments($("layers"), "layer", layers, "mask", (value) => { state.layer = value; draw(); });
  $("class").append(el("option", { value: "" }, "all"), ...asked.map((one) => el("option", { value: String(one.id) }, one.name)));
  const rated = data.entries.some((entry) => entry.quality?.length);
  $("range").hidden = !rated;
  const all = data.entries.length >= data.rows;
  $("choice").textContent = (all ? "All rows have a picture here. " : number(data.entries.length) + " of " + number(data.rows) + " rows have a picture here, chosen by class; all figures are of all rows. ")
    + (rated ? "The number under a picture is the least quality of its classes." : "");
  for (const id of ["class", "low", "high"]) $(id).addEventListener("input", () => { state.limit = PAGE; draw(); });
  $("more").addEventListener("click", () => {
    const first = state.shown.length;
    state.limit += PAGE;
    draw();
    $("grid").querySelectorAll("button")[first]?.focus();
  });
  $("grid").addEventListener("keydown", moveInGrid);
  for (const slider of document.querySelectorAll(".opacity")) {
    slider.addEventListener("input", () => {
      document.documentElement.style.setProperty("--overlay", slider.value / 100);
      for (const other of document.querySelectorAll(".opacity")) other.value = slider.value;
    });
  }
  draw();
}
function show(view, only = $("class").value) {
  if (!data.views[view]) view = Object.keys(data.views)[0];
  state.view = view;
  state.limit = PAGE;
  $("class").value = only;
  for (const input of $("views").querySelectorAll("input")) input.checked = input.value === view;
  draw();
}

// ---- one picture, large
let group = [];
function open(entries, place, opener) {
  group = entries;
  state.opener = opener;
  turnTo(place);
  if (!$("viewer").open) $("viewer").showModal();
}
function turnTo(place) {
  state.at = place;
  const entry = group[place];
  $("viewer-title").textContent = entry.key;
  $("large").replaceChildren(stack(entry, describe(entry)));
  const box = $("large").firstChild;
  if (entry.size) box.style.maxWidth = "calc(68dvh * " + entry.size[0] / entry.size[1] + ")";
  const facts = [
    ["Prompt", entry.prompt], ["Negative prompt", entry.negative], ["Rejected", entry.accepted ? "" : entry.reason || "without a reason"],
    ["Classes", (entry.classes ?? []).map((id, index) => nameOf(id) + (entry.quality?.[index] === undefined ? "" : ", quality " + entry.quality[index])).join("; ")],
    ["Made by", entry.made], ["Made of", entry.sources?.join(", ")], ["Seed", entry.seed],
    ["Size", entry.size ? entry.size.join(" × ") + " pixels" : ""], ["Damaged", entry.damaged],
  ];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  $("maps").replaceChildren(...(entry.maps ?? []).map((map, index) => {
    const canvas = coloured(map, "map");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Map of " + nameOf(entry.classes[index]));
    return el("figure", {}, canvas, el("figcaption", {}, "Map of " + nameOf(entry.classes[index])));
  }));
  $("previous").disabled = place === 0;
  $("next").disabled = place === group.length - 1;
}
function viewer() {
  const turn = (step) => { if (group[state.at + step]) turnTo(state.at + step); };
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => state.opener?.focus());
  $("viewer").addEventListener("keydown", (event) => {
    if (event.target.type === "range" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "ArrowRight") turn(1);
    else if (event.key === "m" || event.key === "M") document.body.classList.toggle("off");
    else return;
    event.preventDefault();
  });
}

// ---- figures
function bars(series, labels, what) {
  const total = labels.map((_, index) => series.reduce((sum, values) => sum + values[index], 0));
  const most = Math.max(...total, 1), all = total.reduce((sum, value) => sum + value, 0);
  const text = what + ": " + labels.map((label, index) => total[index] ? label + " " + number(total[index]) : "").filter(Boolean).join(", ");
  return el("div", { className: "bars", role: "img", "aria-label": all ? text : what + ": none" }, ...labels.map((label, index) => {
    const column = el("div", { title: label + ": " + series.map((values) => number(values[index])).join(" + ") });
    series.slice().reverse().forEach((values, place) => {
      const bar = el("i", { className: series.length > 1 && place === 0 ? "other" : "" });
      bar.style.height = values[index] ? Math.max(100 * values[index] / most, 2) + "%" : "0";
      column.append(bar);
    });
    return column;
  }));
}
function meter(parts, most) {
  const box = el("span", { className: "meter", "aria-hidden": "true" });
  for (const part of parts) {
    const bar = el("i");
    bar.style.width = 100 * part / most + "%";
    box.append(bar);
  }
  return box;
}
const qualityLabels = data.quality[0].map((_, index, all) => (index / all.length).toFixed(2) + " to " + ((index + 1) / all.length).toFixed(2));
const edges = [0, ...data.edges, 1].map((edge) => +(100 * edge).toFixed(2));
const areaLabels = edges.slice(1).map((edge, index) => edges[index] + " to " + edge + " %");

function heatmap(one) {
  if (!one.heat) return el("span", { className: "small" }, "in no mask");
  const cells = Uint8Array.from(atob(one.heat), (letter) => letter.charCodeAt(0)), side = Math.sqrt(cells.length);
  const rows = ["top", "middle", "bottom"], columns = ["left", "centre", "right"], peak = cells.indexOf(Math.max(...cells));
  const where = rows[Math.floor(3 * Math.floor(peak / side) / side)] + " " + columns[Math.floor(3 * (peak % side) / side)];
  const canvas = el("canvas", { className: "heatmap", width: side, height: side, role: "img", "aria-label": "Where " + one.name + " lies: most often " + where, title: "Most often " + where });
  const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
  cells.forEach((cell, index) => pixels.data.set([26, 150, 130, cell], 4 * index));
  context.putImageData(pixels, 0, 0);
  return canvas;
}
function classRow(one, most) {
  const cell = (...children) => el("div", { role: "cell" }, ...children);
  const swatch = el("span", { className: "swatch" });
  swatch.style.background = one.colour;
  const label = el("button", { type: "button", className: "link", title: "Show its pictures" }, one.name);
  label.addEventListener("click", () => { show("sample", String(one.id)); $("pictures").focus(); $("pictures").scrollIntoView(); });
  const named = one.images ? label : el("span", {}, one.name);
  return el("div", { role: "row" },
    cell(el("span", { className: "name" }, swatch, el("span", {}, named, el("span", { className: "small" }, "id " + one.id)))),
    cell(el("span", { className: "small" }, one.images ? number(one.accepted) + " of " + number(one.images) + " accepted" : "asked for by no row"),
      one.images ? meter([one.accepted, one.images - one.accepted], most) : null),
    cell(one.seen ? bars([one.areas], areaLabels, "Area of " + one.name) : null,
      el("span", { className: "small" }, one.seen ? "mean area " + percent(one.area, 1) : "")),
    cell(one.qualities ? bars([one.qualities], qualityLabels, "Quality of " + one.name) : null,
      el("span", { className: "small" }, one.quality === null ? "" : "mean quality " + one.quality.toFixed(2))),
    cell(heatmap(one)));
}
function classTable() {
  const keys = {
    id: ["id", (one) => one.id], name: ["name", null], images: ["images, fewest first", (one) => one.images],
    accepted: ["share accepted, least first", (one) => (one.images ? one.accepted / one.images : 2)],
    area: ["area, smallest first", (one) => one.area ?? 2], quality: ["quality, worst first", (one) => one.quality ?? 2],
  };
  for (const [value, [label]] of Object.entries(keys)) $("sort").append(el("option", { value }, label));
  const some = data.classes.filter((one) => one.images || one.seen), most = Math.max(...some.map((one) => one.images), 1);
  let limit = 24;
  const fill = () => {
    const key = keys[$("sort").value][1];
    some.sort((a, b) => (key ? key(a) - key(b) : a.name.localeCompare(b.name)) || a.id - b.id);
    const title = ["Class", "Images", "Area", "Quality", "Position"].map((text) => el("div", { role: "columnheader" }, text));
    $("class-table").replaceChildren(el("div", { role: "row", className: "head" }, ...title), ...some.slice(0, limit).map((one) => classRow(one, most)));
    $("all-classes").hidden = some.length <= limit;
    $("all-classes").textContent = "Show all " + number(some.length) + " classes";
  };
  $("sort").addEventListener("change", fill);
  $("all-classes").addEventListener("click", () => { limit = some.length; fill(); });
  fill();
}
function charts() {
  const total = (list) => list.reduce((sum, value) => sum + value, 0);
  const two = total(data.quality[1]) > 0;
  if (total(data.quality[0]) + total(data.quality[1])) {
    $("charts").append(el("div", {}, el("h3", {}, "Quality"), el("p", { className: "note" }, "One number for each class of each row; higher is better."),
      bars(two ? data.quality : [data.quality[0]], qualityLabels, "Quality"),
      el("div", { className: "axis", "aria-hidden": "true" }, ...["0", "0.25", "0.5", "0.75", "1"].map((text) => el("span", {}, text))),
      two ? el("p", { className: "legend" }, el("span", {}, "accepted"), el("span", {}, "rejected")) : null));
  }
  const areas = areaLabels.map((_, index) => total(data.classes.map((one) => one.areas[index])));
  $("charts").append(el("div", {}, el("h3", {}, "Area of objects"), el("p", { className: "note" }, "Share of the image that a class covers, in per cent; the steps are not equal."),
    bars([areas], areaLabels, "Area of objects"),
    el("div", { className: "axis each", "aria-hidden": "true" }, ...edges.slice(1).map((edge) => el("span", {}, String(edge))))));
}
function reasons() {
  const most = Math.max(...data.reasons.map(([, count]) => count), 1);
  $("reasons").append(...data.reasons.map(([text, count]) => el("li", {}, el("span", {}, text || "without a reason"), el("b", {}, number(count)), meter([count], most))));
}
function twins() {
  const hidden = data.twin_groups.length - data.twins.length;
  $("alike-note").textContent = "Compared by a hash of 128 bits of the whole image; augmented images are left out, for they are like their source. " + (hidden > 0 ? counted(hidden, "smaller group is", "smaller groups are") + " not shown." : "");
  data.twins.forEach((places, index) => {
    const entries = places.map((place) => data.entries[place]);
    const list = el("ul", { className: "grid" }, ...entries.map((entry, place) => el("li", {}, tile(entry, entries, place))));
    $("twins").append(el("h3", {}, number(data.twin_groups[index]) + " images alike" + (data.twin_groups[index] > places.length ? ", the first " + places.length : "")), list);
  });
}
function breakable(key) {
  return key.replaceAll("_", " ").split(/(?<=\.)/).flatMap((part) => [el("wbr"), part]);
}
function run() {
  const titles = { model: "Model", options: "Options", environment: "Environment", plan: "Plan", drift: "Other environments", source: "Source" };
  for (const [name, rows] of data.run) {
    $("tables").append(el("table", {}, el("caption", {}, titles[name]), el("tbody", {}, ...rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, ...breakable(key)), el("td", {}, value))))));
  }
}

head();
sections();
pictures();
viewer();
classTable();
charts();
reasons();
twins();
run();
