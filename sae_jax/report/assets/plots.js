// What is drawn: the panels of the ZF plot, of which rows can be chosen, and histograms.

const LEFT = 44, TOP = 8, SIDE = 244; // of a panel, in its own units
const WIDE = LEFT + SIDE + 56, TALL = TOP + SIDE + 36;

let shown = ""; // panel and point whose text is shown

function ticks(limit) {
  const power = 10 ** Math.floor(Math.log10(limit / 3));
  const step = power * [5, 2, 1].find(n => n * power <= limit / 3);
  return Array.from({ length: Math.floor(limit / step) + 1 }, (_, i) =>
    [i * step, String(Number((i * step).toPrecision(3)))]);
}

async function drawPanel(panel, i) {
  const { norm_z, norm_f, row } = await unpack(`points${i}`);
  const x = z => LEFT + SIDE * z / panel.limit;
  const y = f => TOP + SIDE * (1 - f / panel.limit);
  const end = panel.limit;
  const svg = make("svg", {
    viewBox: `0 0 ${WIDE} ${TALL}`, tabindex: 0, role: "application",
    "aria-label": `ZF plot of ${panel.name}; left and right arrows choose a row`,
  });
  for (const c of panel.bands) {
    const low = end / Math.sqrt(1 + c), high = c < 1 ? end * Math.sqrt(1 - c) : 0;
    svg.append(
      make("path", {
        class: "band",
        d: `M${x(0)} ${y(0)}L${x(end)} ${y(low)}L${x(end)} ${y(end)}L${x(high)} ${y(end)}Z`,
      }),
      make("text", { x: x(end) + 4, y: y(low) + 4 }, `c = ${c}`),
    );
  }
  for (const [tick, text] of ticks(end)) {
    svg.append(
      make("text", { x: x(tick), y: y(0) + 15, "text-anchor": "middle" }, text),
      make("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, text),
    );
  }
  const dots = Array.from(norm_z, (z, j) =>
    `M${x(z).toFixed(1)} ${y(norm_f[j]).toFixed(1)}h0`);
  const picked = make("circle", { class: "picked", r: 5, visibility: "hidden" });
  svg.append(
    make("path", { class: "diagonal", d: `M${x(0)} ${y(0)}L${x(end)} ${y(end)}` }),
    make("rect", { class: "frame", x: LEFT, y: TOP, width: SIDE, height: SIDE }),
    make("path", { class: "rows", d: dots.join("") }),
    make("text", { x: x(end / 2), y: y(0) + 31, "text-anchor": "middle" }, "‖z‖"),
    make("text", { x: 12, y: y(end / 2), transform: `rotate(-90 12 ${y(end / 2)})` },
      "‖f‖"),
    make("text", { class: "said", x: LEFT + 6, y: TOP + 14 }, "activates too much"),
    make("text", { class: "said", x: x(end) - 6, y: y(0) - 6, "text-anchor": "end" },
      "activates too little"),
    picked,
  );

  let chosen = -1;
  async function choose(j) {
    if (j < 0 || j >= norm_z.length || shown === `${i} ${j}`) return;
    chosen = j;
    shown = `${i} ${j}`;
    picked.setAttribute("cx", x(norm_z[j]));
    picked.setAttribute("cy", y(norm_f[j]));
    picked.setAttribute("visibility", "visible");
    const said = [make("strong", {}, panel.name),
      `: ‖z‖ = ${number(norm_z[j])}, ‖f‖ = ${number(norm_f[j])}, ` +
      `ratio ${number(norm_f[j] / norm_z[j])}`, make("br")];
    if (panel.contexts !== null) {
      const { tokens, width } = await unpack(`contexts${panel.contexts}`);
      said.push(...passage(tokens, width[0], row[j], new Map(), 1, false));
    }
    if (shown !== `${i} ${j}`) return;
    at("zf-row").replaceChildren(...said);
    at("zf-row").className = "chosen";
  }
  function point(event) {
    const box = svg.getBoundingClientRect();
    const scale = WIDE / box.width;
    const [px, py] = [(event.clientX - box.x) * scale, (event.clientY - box.y) * scale];
    let nearest = -1, least = 12 ** 2; // no further than this from the pointer
    for (let j = 0; j < norm_z.length; j++) {
      const distance = (x(norm_z[j]) - px) ** 2 + (y(norm_f[j]) - py) ** 2;
      if (distance < least) [nearest, least] = [j, distance];
    }
    choose(nearest);
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point); // a finger
  svg.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(norm_z.length - 1, chosen + step)));
  });
  const [drawn, outside, all] = [norm_z.length, panel.n_outside, panel.n_rows]
    .map(counted);
  return make("figure", {},
    make("figcaption", {}, make("strong", {}, panel.name), make("br"),
      make("small", {}, `${drawn} of ${all} rows; ${outside} lie outside`)),
    svg);
}

function histogram(counts, highest) {
  const most = Math.max(...counts), wide = 20, tall = 60;
  const svg = make("svg", {
    class: "histogram", viewBox: `0 0 ${counts.length * wide} ${tall + 30}`, role: "img",
    "aria-label": `Histogram of activations from 0 to ${number(highest)}; ` +
      `the fullest of ${counts.length} bins holds ${most} rows`,
  });
  counts.forEach((count, i) => {
    const height = tall * count / most;
    const [low, high] = [i, i + 1].map(k => number(highest * k / counts.length));
    svg.append(make("rect", {
      x: i * wide + 1, y: 14 + tall - height, width: wide - 2, height,
    }, make("title", {}, `${low} to ${high}: ${count} rows`)));
  });
  const end = counts.length * wide, under = tall + 27;
  svg.append(make("text", { x: 0, y: 10 }, `rows, up to ${counted(most)}`),
    make("text", { x: 0, y: under }, "0"),
    make("text", { x: end / 2, y: under, "text-anchor": "middle" }, "activation"),
    make("text", { x: end, y: under, "text-anchor": "end" }, number(highest)));
  return svg;
}
