// Drawing ----------------------------------------------------------------------------------------------------------

let turns = 0;

async function draw() {
  const turn = ++turns, picture = pictures[state.image];
  document.body.dataset.status = "loading";
  const loaded = await Promise.all(picture.views.map((view, m) => load(view, m)));
  if (turn !== turns) return;  // the state changed meanwhile
  drawChoices(picture);
  const parts = picture.views.map((view, m) => partOf(view, models[m], loaded[m]));
  drawn = parts.map((part) => ({ out: mapOf("out", part), in: isClass(state.map) ? null : mapOf("in", part) }));
  for (const direction of ["out", "in"]) setRanges(drawn.map((maps) => maps[direction]).filter((map) => map?.values));
  parts.forEach((part, m) => drawModel(find(`#model${m}`), part, drawn[m]));
  document.title = `${file.title} · ${picture.name} · ${where(tokenOf())}`;
  const whose = (m) => models.length > 1 ? `${models[m].name}: ` : "";
  find("#said").textContent = drawn.map(({ out }, m) => whose(m) + said(out, picture.views[m])).join(". ");
  const token = state.token === null && pointed === null && !isClass(state.map);
  document.body.dataset.status = token ? "nothing" : drawn.some(({ out }) => out.values) ? "drawn" : "absent";
}

const tokenOf = () => pointed ?? state.token;

async function load(view, m) {  // what is drawn of a model; `here` is undefined where the file has no such block
  const kind = isClass(state.map) ? "attention" : state.map, there = Object.keys(view[kind]).map(Number);
  const all = await Promise.all(there.filter((b) => state.scale === "blocks" || b === state.block)
    .map(async (b) => [b, await attentionOf(kind, m, state.image, b)]));
  const here = all.find(([b]) => b === state.block)?.[1];
  return { here, all: all.map(([, at]) => at), grey: await greyOf(view.src) };
}

function partOf(view, model, { here, all, grey }) {
  const token = moved(tokenOf(), finest(pictures[state.image]), view), place = here?.placeOf(view, token);
  return { view, model, here, all, grey, token, place, head: state.map === "rollout" ? 0 : state.head };
}

function setRanges(maps) {
  const every = state.scale === "models" ? maps.map(({ values }) => values) : [];
  for (const map of maps) {
    const others = [...every, ...map.others], scope = others.length ? state.scale : "map";  // a class map is alone
    map.range = rangeOf(others.length ? others : [map.values], SCALES.find(([key]) => key === scope)[1]);
  }
}

function drawModel(section, part, maps) {
  drawPicture(section, part);
  for (const direction of ["out", "in"]) drawMap(section.querySelector(`.${direction}`), maps[direction], part);
  const parts = state.map === "attention" && part.here !== undefined;
  section.querySelector(".below").hidden = !parts;
  if (parts) drawHeads(section, maps.out, part);
  if (parts) drawSums(section.querySelector(".sums"), part);
  drawReadings(section, maps, part);
}

// The title of a map, and why it has no values, or these and the others of its scale.
function mapOf(direction, { view, model, here, all, token, place, head }) {
  if (isClass(state.map)) {
    const [name, values] = classOf(view);
    return values ? { title: name, values: Float64Array.from(values), others: [] }
      : { title: "Class map", absent: "no class maps of this model" };
  }
  if (token === null) return { title: "", absent: "Point at a patch of the image" };
  const rolled = state.map === "rollout", name = nameOf(token), inside = nameOf(token, true);
  const title = direction === "out" ? rolled ? `${name}: content from each patch, by rollout` : `${name} attends to`
    : rolled ? `Patches: content from ${inside}, by rollout` : `Patches attend to ${inside}`;
  if (here === undefined) return { title, absent: `${model.name} has no block ${state.block} in this file` };
  if (place === undefined) return { title, absent: absence(model, token) };
  if (rolled && direction === "in" && !isPatch(token))
    return { title, absent: `${name}: brings nothing of the image when it enters` };
  if (direction === "in" && token === "pool") return { title, absent: `${name}: nothing attends to it` };
  if (direction === "out" && place >= here.queries) {
    const only = here.places.pool === undefined ? "only CLS does (class attention)" : "only the attention pooling does";
    return { title, absent: `${name}: does not attend at block ${state.block}, ${only}` };
  }
  if (head !== "mean" && head >= here.heads.length) return { title, absent: `${model.name} has no head ${head}` };
  const places = all.map((at) => [at, at.placeOf(view, token)]).filter(([, its]) => its !== undefined);
  const others = !["heads", "blocks"].includes(state.scale) ? []
    : places.flatMap(([at, its]) => at.heads.map((h) => at.map(h, its, direction)));
  return { title, values: here.map(head, place, direction), others };
}

function drawMap(figure, map, { view }) {
  figure.hidden = map === null;
  if (map === null) return;
  const there = map.values !== undefined, canvas = figure.querySelector(".frame canvas");
  figure.querySelector("figcaption").textContent = map.title;
  figure.querySelector(".absent").hidden = there;
  canvas.hidden = figure.querySelector(".bar").hidden = !there;
  if (!there) return figure.querySelector(".absent").textContent = map.absent;
  paint(canvas, map.values, view.grid[1], map.range, state.opacity);
  canvas.ariaLabel = said(map, view);
  paintBar(figure.querySelector(".bar canvas"), state.opacity);
  figure.querySelector(".low").textContent = map.range.low ? percent(map.range.low) : "0";
  figure.querySelector("output").textContent = percent(map.range.top);
  figure.querySelector(".top").textContent = map.range.words;
}

// For those who do not see it.
function said({ title, values, absent }, { grid: [, gw] }) {
  if (values === undefined) return absent;
  const at = values.indexOf(largest(values));
  const place = `${at % gw},${Math.floor(at / gw)}`, total = values.reduce((a, b) => a + b, 0);
  return `${title}: largest ${percent(values[at])} at ${place}, ${percent(total)} on all patches`;
}

// What is shown: "block 8 · Register 1 · mean over heads".
function where(token) {
  if (isClass(state.map)) return classOf(pictures[state.image].views[0])[0];
  const head = state.map === "rollout" ? "rollout" : state.head === "mean" ? "mean over heads" : `head ${state.head}`;
  return [`block ${state.block}`, token === null ? "no token" : nameOf(token), head].join(" · ");
}

function absence(model, token) {
  const own = model.tokens.find(({ key }) => key === token);
  if (!own) return `${nameOf(token)}: not in this model`;
  return `${own.name}: absent at block ${state.block} (${comesOrGoes(own)})`;
}

function comesOrGoes({ enters, leaves }) {
  return state.block < enters ? `enters at block ${enters}` : `left at block ${leaves}`;
}

function button(words, small, props, onclick) {
  const made = Object.assign(document.createElement("button"), { type: "button", onclick, ...props });
  made.append(...words);
  if (small) made.append(Object.assign(document.createElement("small"), { textContent: small }));
  return made;
}

// Buttons are rebuilt only for another image: a rebuilt button would lose the focus.
let buttonsOf = null;

const press = (list, i) => list.childNodes.forEach((b, j) => b.setAttribute("aria-pressed", i === j));

function drawChoices(picture) {
  if (buttonsOf !== picture) makeButtons(picture);
  buttonsOf = picture;
  press(find("#images"), state.image);
  press(find("#blocks"), state.block);
  for (const [id, choices, chosen] of [["#kinds", KINDS, state.map], ["#scales", SCALES, state.scale],
    ["#tops", TOPS, state.top], ["#curves", CURVES, state.curve]])
    press(find(id), choices.findIndex(([key]) => key === chosen));
  Object.keys(picture.views[0].classes).forEach((name, i) => {  // the next image may have another predicted class
    find("#kinds").childNodes[KINDS.findIndex(([key]) => key === `class${i}`)].textContent = name;
  });
  find("#blocks-row").hidden = find("#tokens-row").hidden = isClass(state.map);
  find("#opacity").value = state.opacity;
  const pinned = isPatch(state.token);
  press(find("#tokens"), pinned ? TOKENS.length : TOKENS.findIndex(({ key }) => key === state.token));
  TOKENS.forEach(({ key }, i) => {
    const made = find("#tokens").childNodes[i];
    const there = isThere(picture, key, state.block);
    const own = models.flatMap(({ tokens }) => tokens).find((token) => token.key === key);
    made.disabled = !there;
    made.querySelector("small").textContent = there ? "" : comesOrGoes(own);
  });
  const patch = find("#tokens").lastChild;
  patch.disabled = !pinned;
  patch.firstChild.textContent = pinned ? `${nameOf(state.token)}  ✕` : "Patch: point at the image";
}

// Whether any model has the token there.
const isThere = (picture, key, block) =>
  picture.views.some(({ attention }) => attention[block]?.places[key] !== undefined);

function makeButtons(picture) {
  const there = allBlocks(picture), title = (b) => there.includes(b) ? "" : "not in this file";
  find("#blocks").replaceChildren(...count(Math.max(...models.map(({ depth }) => depth), there.at(-1) + 1)).map((b) =>
    button([`${b}`], "", { disabled: !there.includes(b), title: title(b), ariaLabel: `Block ${b}` },
      () => show({ block: b }))));
  find("#tokens").replaceChildren(
    ...TOKENS.map(({ key, name }) => button([name], " ", {}, () => { pointed = null; show({ token: key }); })),
    button([""], "", { className: "patch" }, release));
  const ofHead = (head) =>
    button([document.createElement("canvas")], head === "mean" ? "mean" : `head ${head}`, {}, () => show({ head }));
  picture.views.forEach(({ heads }, m) =>
    find(`#model${m} .heads`).replaceChildren(...["mean", ...count(heads)].map(ofHead)));
}

function drawPicture(section, { view, model, token, grey }) {
  const [gh, gw] = view.grid, [height, width] = view.size, picture = pictures[state.image];
  section.style.setProperty("--ratio", width / height);
  section.classList.toggle("small", Math.max(height, width) <= 64);  // shown in its own pixels
  section.querySelectorAll(".frame img").forEach((img, i) => {
    const src = i === 0 ? view.src : grey;
    if (img.src !== src) img.src = src;
  });
  section.querySelector(".picture img").alt = picture.name;
  section.querySelector(".picture .frame").ariaLabel =
    `Patches of ${picture.name}: arrow keys select one, Escape releases it`;
  section.querySelector(".picture figcaption").textContent = picture.name;
  section.querySelector(".caption").textContent = view.caption;
  section.querySelector(".about").textContent = aboutOf(model, view);
  const read = patchOf(view, moved(cursor, finest(picture), view));
  for (const [selector, p] of [[".mark", patchOf(view, token)], [".cursor", read]])
    section.querySelectorAll(selector).forEach((box) => {
      box.hidden = p === null;
      const [x, y] = [p % gw, Math.floor(p / gw)];
      Object.assign(box.style, { left: `${100 * x / gw}%`, top: `${100 * y / gh}%`, width: `${100 / gw}%`,
        height: `${100 / gh}%` });
    });
}

const aboutOf = (model, { about, grid: [gh, gw] }) => `${model.name} · ${about} · ${gw} x ${gh} patches`;

function drawHeads(section, map, { view, here, token, place }) {
  section.querySelector(".by-head h2").textContent = `Heads of block ${state.block}`
    + (place === undefined ? "" : `: what ${nameOf(token, true)} attends to`);
  const list = section.querySelector(".heads");
  press(list, state.head === "mean" ? 0 : 1 + state.head);
  list.childNodes.forEach(({ firstChild: canvas }, i) => {
    const head = i === 0 ? "mean" : i - 1;
    if (map.absent || i > here.heads.length) return canvas.width = canvas.height = 1;  // empties it
    const values = here.map(head, place, "out");
    paint(canvas, values, view.grid[1], ["map", "models"].includes(state.scale) ? rangeOf([values]) : map.range, 1);
  });
}

function drawSums(section, { model, here, token, place, head }) {
  section.hidden = place === undefined || (head !== "mean" && head >= here.heads.length);
  if (section.hidden) return;
  const line = (name, out, into) => {
    const row = document.createElement("tr");
    row.append(...[["th", name], ["td", out], ["td", into]].map(([tag, words]) =>
      Object.assign(document.createElement(tag), { textContent: words })));
    row.firstChild.scope = "row";
    return row;
  };
  const others = model.tokens.filter(({ key }) => here.places[key] !== undefined);
  const into = here.map(head, place, "in"), on = here.onPatches(head, place);
  const rows = [line("patches, all", percent(on), `${percent(into.reduce((a, b) => a + b, 0) / into.length)} each`)];
  if (isPatch(token)) {
    const own = percent(here.share(head, place, place), here.roundingError(head, place));
    rows.push(line("– of it, itself", own, ""));
  }
  let total = on;
  for (const { key, name } of others) {
    const its = here.places[key], share = here.share(head, place, its);
    total += share;
    rows.push(line(its === place ? "itself" : name, percent(share), percent(here.share(head, its, place))));
  }
  rows.push(line("total", percent(total), ""));
  const words = head === "mean" ? "mean over heads" : `head ${head}`;
  section.querySelector("h2").textContent = `Attention of ${nameOf(token, true)}, ${words}`;
  section.querySelector("tbody").replaceChildren(...rows);
}

function drawReadings(section, maps, { view, here, place, head }) {
  const patch = patchOf(view, moved(cursor ?? pointed, finest(pictures[state.image]), view));
  for (const direction of ["out", "in"]) {
    const reading = section.querySelector(`.${direction} .reading`), map = maps[direction];
    reading.textContent = "";
    if (patch === null || !map?.values) continue;
    let error = 0;
    if (!isClass(state.map)) {
      const at = here.first + patch, [from, to] = direction === "out" ? [place, at] : [at, place];
      if (to >= here.first && to < here.first + here.patches) error = here.roundingError(head, from);
    }
    reading.textContent = `at ${nameOf(patchKey(view, patch)).slice(6)}: ${percent(map.values[patch], error)}`;
  }
}

// Events -----------------------------------------------------------------------------------------------------------

function patchAt(event, frame, m) {  // its key in the finest grid
  const picture = pictures[state.image], view = picture.views[m], [gh, gw] = view.grid;
  const box = frame.getBoundingClientRect();
  const cell = (along, n) => Math.max(0, Math.min(n - 1, Math.floor(along * n)));
  const x = cell((event.clientX - box.left) / box.width, gw), y = cell((event.clientY - box.top) / box.height, gh);
  return moved(`patch${x}-${y}`, view, finest(picture));
}

function point(newPointed, newCursor) {
  if (newPointed === pointed && newCursor === cursor) return;
  [pointed, cursor] = [newPointed, newCursor];
  draw();
}

function listenToPicture(frame, m) {
  // While a patch is selected, the mouse only reads values; a finger always selects.
  const at = (event) => {
    const patch = patchAt(event, frame, m), kept = isPatch(state.token) && event.pointerType === "mouse";
    point(kept ? null : patch, kept ? patch : null);
  };
  frame.onpointerdown = frame.onpointermove = at;
  frame.onpointerleave = frame.onpointercancel = () => point(null, null);
  frame.onpointerup = (event) => {
    if (event.button !== 0) return;
    const token = patchAt(event, frame, m);
    state.token === token ? release() : show({ token });
    at(event);
  };
  frame.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const view = finest(pictures[state.image]), [gh, gw] = view.grid, patch = patchOf(view, state.token);
    const within = (i, n) => Math.max(0, Math.min(n - 1, i));
    const beside = () => [within(patch % gw + step[0], gw), within(Math.floor(patch / gw) + step[1], gh)];
    const [x, y] = patch === null ? [gw >> 1, gh >> 1] : beside();
    event.preventDefault();
    event.stopPropagation();
    pointed = null;
    show({ token: `patch${x}-${y}` });
  };
}

function listenToMap(frame, m) {
  frame.onpointerdown = frame.onpointermove = (event) => point(null, patchAt(event, frame, m));
  // Lifting a finger keeps the reading.
  frame.onpointerleave = (event) => { if (event.pointerType === "mouse") point(null, null); };
}

function listenToKeys(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.id === "opacity") return;
  const picture = pictures[state.image];
  const step = (list, now, by) => list[Math.max(0, Math.min(list.length - 1, list.indexOf(now) + by))];
  const block = (by) => show({ block: step(allBlocks(picture), state.block, by) });
  const head = (by) => show({ head: step(["mean", ...count(mostHeads(picture))], state.head, by) });
  const keys = { ArrowLeft: () => block(-1), ArrowRight: () => block(1), ArrowUp: () => head(-1),
    ArrowDown: () => head(1), Escape: release };
  if (!keys[event.key]) return;
  event.preventDefault();  // the page would scroll
  keys[event.key]();
}

function makeModel(m) {
  const section = find("#model").content.firstElementChild.cloneNode(true), out = section.querySelector(".out");
  section.id = `model${m}`;
  section.ariaLabel = models[m].name;
  const into = out.cloneNode(true);
  into.className = "in";
  out.after(into);
  listenToPicture(section.querySelector(".picture .frame"), m);
  [out, into].forEach((figure) => listenToMap(figure.querySelector(".frame"), m));
  return section;
}

const start = {};  // the first view

async function begin() {
  find("h1").textContent = file.title;
  find("#images").hidden = pictures.length < 2;
  find("#images").append(...pictures.map(({ name, views }, image) => {
    const small = Object.assign(document.createElement("img"), { src: views[0].src, alt: "" });
    return button([small], name, { title: name }, () => show({ image }));
  }));
  find("#kinds-row").hidden = KINDS.length < 2;
  for (const [id, name, choices] of [["#kinds", "map", KINDS], ["#scales", "scale", SCALES], ["#tops", "top", TOPS],
    ["#curves", "curve", CURVES]])
    find(id).append(...choices.map(([key, words]) => button([words], "", {}, () => show({ [name]: key }))));
  find("#save").append(...["png", "svg"].map((kind) => button([kind.toUpperCase()], "", {}, () => save(kind))));
  find("#opacity").oninput = (event) => show({ opacity: +event.target.value });
  find("#opacity").onpointerup = (event) => event.target.blur();  // the arrow keys are for blocks again
  find("#models").style.setProperty("--models", models.length);
  document.body.classList.toggle("several", models.length > 1);
  find("#models").append(...models.map((_, m) => makeModel(m)));
  document.onkeydown = listenToKeys;
  const picture = pictures[0], block = allBlocks(picture).at(-1), view = finest(picture), [gh, gw] = view.grid;
  const first = TOKENS.find(({ key }) => isThere(picture, key, block));
  const token = first ? first.key : patchKey(view, Math.floor(gh / 2) * gw + Math.floor(gw / 2));
  Object.assign(start, DEFAULTS, { image: 0, block, token });
  window.onhashchange = () => showLinked({ ...start, ...linked() });
  await showLinked({ ...start, ...linked() });
}

// For the console, scripts and tests: viewer.show({ image: 0, block: 5, head: "mean", token: "patch3-5" }).
window.viewer = {
  state, show, exported,  // exported("png" or "svg"): a Blob of the view
  values: (direction, m = 0) => drawn[m][direction]?.values && Array.from(drawn[m][direction].values),  // or absent
  ready: begin(),
};
window.viewer.ready.catch((error) => {
  document.body.dataset.status = "failed";
  find("#problem").hidden = false;
  find("#problem").textContent = `This browser cannot show the file (it needs one of 2023 or later): ${error.message}`;
});
