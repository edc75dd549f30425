// Saving -----------------------------------------------------------------------------------------------------------

const SIDE = 360, GAP = 20, LINE = 18;  // of a saved view

// The view as a picture of one row per model: header line, image, maps with their scales. Patches are rectangles.
async function asSvg() {
  const views = pictures[state.image].views, parts = [];
  const safe = (words) => String(words).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const text = (x, y, words, size = 13) => `<text x="${x}" y="${y}" font-size="${size}">${safe(words)}</text>`;
  const width = GAP + 3 * (SIDE + GAP);
  const linesOf = (words, size, wide = SIDE) => {  // at most two
    const letters = Math.floor(wide / size * 1.95), cut = words.length > letters ? words.lastIndexOf(" ", letters) : -1;
    return cut > 0 ? [words.slice(0, cut), words.slice(cut + 1)] : [words];
  };
  const wrapped = (x, y, words, size = 13, wide = SIDE) =>
    linesOf(words, size, wide).map((line, i) => text(x, y + i * (size + 3), line, size)).join("");
  const ending = (map) => `0 to ${percent(map.range.top)}: ${map.range.words}`;
  let y = GAP;
  for (const [m, view] of views.entries()) {
    const [height, width] = view.size, [gh, gw] = view.grid;
    const h = SIDE * Math.min(1, height / width), w = h * width / height;
    const patch = patchOf(view, moved(tokenOf(), finest(pictures[state.image]), view));
    const area = (at, up, wide, high) =>
      `x="${+at.toFixed(2)}" y="${+up.toFixed(2)}" width="${+wide.toFixed(2)}" height="${+high.toFixed(2)}"`;
    const ofPatch = (x, p) => area(x + w * (p % gw) / gw, y + 44 + h * Math.floor(p / gw) / gh, w / gw, h / gh);
    const photo = (x, src) => `<image ${area(x, y + 44, w, h)} preserveAspectRatio="none" href="${src}"/>`;
    const mark = (x) => patch === null ? ""
      : `<rect ${ofPatch(x, patch)} fill="none" stroke="#ff2d2d" stroke-width="2"/>`;
    const box = (where, [r, g, b, alpha]) =>
      `<rect ${where} fill="rgb(${r},${g},${b})" fill-opacity="${+alpha.toFixed(3)}"/>`;
    const header = `${aboutOf(models[m], view)} · ${where(tokenOf())}`, wide = width - 2 * GAP;
    parts.push(`<g fill="#555">${wrapped(GAP, y + 4, header, 12, wide)}</g>`);
    y += 15 * (linesOf(header, 12, wide).length - 1);
    parts.push(wrapped(GAP, y + 24, pictures[state.image].name), photo(GAP, view.src), mark(GAP));
    view.caption.split("\n").forEach((words, i) => parts.push(text(GAP, y + h + 44 + LINE * (i + 1), words, 12)));
    for (const [i, map] of Object.values(drawn[m]).filter(Boolean).entries()) {
      const x = GAP + (i + 1) * (SIDE + GAP);
      parts.push(wrapped(x, y + 24, map.title));
      if (!map.values) { parts.push(wrapped(x, y + 64, map.absent)); continue; }
      parts.push(photo(x, await greyOf(view.src)), '<g shape-rendering="crispEdges">');
      map.values.forEach((v, p) => parts.push(box(ofPatch(x, p), shade(v, map.range, state.opacity))));
      parts.push(`<rect ${area(x, y + h + 50, w, 8)} fill="#808080"/>`);
      for (const s of count(64)) {
        const colour = shade(s, { low: 0, top: 63 }, state.opacity);
        parts.push(box(area(x + w * s / 64, y + h + 50, w / 64, 8), colour));
      }
      const words = map.range.low ? ending(map).replace("0 to", `${percent(map.range.low)} to`) : ending(map);
      parts.push("</g>", mark(x), wrapped(x, y + h + 74, words, 12));
    }
    y += h + 124;
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${y}" width="${width}" height="${y}" `
    + `font-family="system-ui, sans-serif" ${Math.max(...views[0].size) <= 64 ? 'image-rendering="pixelated"' : ""}>`
    + `<rect width="100%" height="100%" fill="#fff"/>${parts.join("")}</svg>`;
}

async function exported(kind) {  // a Blob
  const svg = await asSvg();
  if (kind === "svg") return new Blob([svg], { type: "image/svg+xml" });
  const photo = Object.assign(new Image(), { src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}` });
  await photo.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: 2 * photo.width, height: 2 * photo.height });
  canvas.getContext("2d").drawImage(photo, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

async function save(kind) {
  const url = URL.createObjectURL(await exported(kind)), words = `${pictures[state.image].name} ${where(tokenOf())}`;
  const name = `${words.replace(/[^\p{L}\p{N}.,-]+/gu, "_").slice(0, 100)}.${kind}`;
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
