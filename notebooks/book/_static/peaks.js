// The page `peaks`: what a step holds, turned by sliders. PEAKS is in peaks_data.js, which peaks.py writes.
(() => {
  const page = document.getElementById("peaks");
  const find = (id) => document.getElementById(`peaks-${id}`);
  const sliders = { depth: find("depth"), batch: find("batch") };
  const values = { depth: PEAKS.depths, batch: PEAKS.batches };
  const SHORT = { local_readout: "readouts", checkpoint: "checkp.", checkpoint_step_in_backward: "checkp. + step" };
  const chosen = (name) => page.querySelector(`input[name=${name}]:checked`).value;

  for (const [name, start] of [["depth", 64], ["batch", 2048]]) {
    sliders[name].max = values[name].length - 1;
    sliders[name].value = values[name].indexOf(start);
  }
  for (const [rule, { label, color }] of Object.entries(PEAKS.rules)) {
    const box = document.createElement("label");
    box.innerHTML = `<input type="checkbox" name="rule" value="${rule}" checked> <span style="background:${color}"></span>${label}`;
    find("rules").append(box);
  }

  function readable(bytes) {
    const unit = bytes < 2 ** 20 ? 1 : bytes < 2 ** 30 ? 2 : 3;
    const number = bytes / 2 ** (10 * unit);
    return `${number.toLocaleString("en", { maximumSignificantDigits: 3 })} ${["", "KiB", "MiB", "GiB"][unit]}`;
  }

  const text = (x, y, words, more = "") => `<text x="${x}" y="${y}" ${more}>${words}</text>`;

  function fit(svg, height) { // one unit is one pixel, so that text has the size of the page's on a telephone, too
    const width = Math.max(280, svg.clientWidth || 640);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    return width;
  }

  function bars(rows) {
    const svg = find("bars");
    const width = fit(svg, rows.length * 46 + 4);
    const longest = Math.max(...rows.map((row) => row.rest + row.peak));
    svg.innerHTML = rows.map(({ label, color, rest, peak }, i) => {
      const [y, scale] = [i * 46 + 22, (width - 80) / longest];
      return text(0, y - 5, label)
        + `<rect x="0" y="${y}" width="${rest * scale}" height="16" fill="#bbbbbb"/>`
        + `<rect x="${rest * scale}" y="${y}" width="${Math.max(1, peak * scale)}" height="16" fill="${color}"/>`
        + text((rest + peak) * scale + 6, y + 13, readable(rest + peak));
    }).join("");
  }

  function lines(rows, axis, at) {
    const [svg, height, left, top, bottom] = [find("lines"), 360, 62, 12, 44];
    const width = fit(svg, height);
    const narrow = width < 520;
    const right = narrow ? 112 : 275; // where the lines' labels are
    const ticks = values[axis];
    const all = rows.flatMap((row) => row.curve);
    const [low, high] = [Math.floor(Math.log2(Math.min(...all))), Math.ceil(Math.log2(Math.max(...all)))];
    const x = (i) => left + i * (width - left - right) / (ticks.length - 1);
    const y = (bytes) => top + (high - Math.log2(bytes)) * (height - top - bottom) / (high - low || 1);
    let drawn = "";
    for (let power = low; power <= high; power += Math.max(1, Math.ceil((high - low) / 7))) {
      drawn += `<line class="grid" x1="${left}" x2="${width - right}" y1="${y(2 ** power)}" y2="${y(2 ** power)}"/>`;
      drawn += text(left - 6, y(2 ** power) + 4, readable(2 ** power), 'text-anchor="end"');
    }
    ticks.forEach((tick, i) => {
      if (!narrow || i % 3 === 0) drawn += text(x(i), height - bottom + 18, tick.toLocaleString("en"), 'text-anchor="middle"');
    });
    drawn += text((left + width - right) / 2, height - 6, axis === "depth" ? "hidden layers" : "batch", 'text-anchor="middle"');
    drawn += `<line class="now" x1="${x(at)}" x2="${x(at)}" y1="${top}" y2="${height - bottom}"/>`;
    const thick = (row) => row.rule === "dfa"; // below the others, so that a line that lies upon it is seen
    for (const row of [...rows].sort((a, b) => thick(b) - thick(a))) {
      const points = row.curve.map((bytes, i) => `${x(i)},${y(bytes)}`).join(" ");
      drawn += `<polyline points="${points}" stroke="${row.color}" stroke-width="${thick(row) ? 7 : 2.5}"/>`;
      drawn += `<circle cx="${x(at)}" cy="${y(row.curve[at])}" r="${thick(row) ? 7 : 5}" fill="${row.color}"/>`;
    }
    let last = -Infinity;
    for (const row of [...rows].sort((a, b) => b.curve.at(-1) - a.curve.at(-1))) {
      last = Math.max(y(row.curve.at(-1)) + 4, last + 16);
      drawn += text(width - right + 8, last, narrow ? SHORT[row.rule] ?? row.label : row.label);
    }
    svg.innerHTML = drawn;
  }

  function draw() {
    const now = { depth: Number(sliders.depth.value), batch: Number(sliders.batch.value) };
    const setting = `${chosen("optimizer")} ${chosen("width")}`;
    const axis = chosen("axis");
    const rows = [...page.querySelectorAll("input[name=rule]:checked")].map(({ value: rule }) => {
      const table = PEAKS.peaks[rule][setting];
      const curve = axis === "depth" ? table.map((row) => row[now.batch]) : table[now.depth];
      return { rule, ...PEAKS.rules[rule], curve, peak: table[now.depth][now.batch], rest: PEAKS.rest[rule][setting][now.depth] };
    });
    for (const name of ["depth", "batch"]) {
      const value = values[name][now[name]].toLocaleString("en");
      find(`${name}-value`).textContent = value;
      sliders[name].setAttribute("aria-valuetext", value);
    }
    find("axis").textContent = axis === "depth" ? "depth" : "batch";
    const [depth, batch] = [values.depth[now.depth], values.batch[now.batch].toLocaleString("en")];
    const optimizer = chosen("optimizer") === "sgd" ? "plain SGD" : "Adam";
    find("caption").textContent = `Predicted, one step of 784-[${chosen("width")}]x${depth}-10 at batch ${batch}, ${optimizer}`;
    page.querySelector("tbody").innerHTML = rows.map(({ rule, label, rest, peak }) =>
      `<tr data-rule="${rule}" data-peak="${peak}"><th scope="row">${label}</th><td>${readable(rest)}</td><td>${readable(peak)}</td><td>${readable(rest + peak)}</td></tr>`
    ).join("");
    if (rows.length === 0) for (const id of ["bars", "lines"]) find(id).innerHTML = "";
    else { bars(rows); lines(rows, axis, now[axis]); }
  }

  page.addEventListener("input", draw);
  window.addEventListener("resize", draw);
  draw();
})();
