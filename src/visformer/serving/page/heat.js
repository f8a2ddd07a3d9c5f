// Draws a heat map: a small grid of numbers from -1 to 1 over the part of the image that the model saw.

const FINENESS = 12; // pixels drawn for each cell along an axis
const WARM = [[205, 20, 70], [255, 90, 10], [255, 214, 40]];
const COLD = [[90, 140, 255], [30, 90, 250], [0, 40, 200]];

// The least value and the greatest, and that without a colour: 0, or where all are on one side of it, the nearest to it.
// (Attention carries what the model found to every place, so that an activation may differ little from place to place.)
export function range(heat) {
  const flat = heat.values.flat();
  const low = Math.min(...flat), high = Math.max(...flat), plain = low > 0 ? low : high < 0 ? high : 0;
  return { low, high, plain, full: Math.max(high - plain, plain - low) || 1 };
}

export function draw(canvas, heat, strength) {
  const rows = heat.values.length, columns = heat.values[0].length;
  const { plain, full } = range(heat);
  canvas.width = columns * FINENESS;
  canvas.height = rows * FINENESS;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y += 1) {
    for (let x = 0; x < canvas.width; x += 1) {
      const value = between(heat.values, (y + 0.5) / FINENESS - 0.5, (x + 0.5) / FINENESS - 0.5);
      image.data.set(colour((value - plain) / full, strength), 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(image, 0, 0);
}

// The colours from the least value to the greatest, as one line of pixels.
export function drawScale(canvas, heat) {
  const { low, high, plain, full } = range(heat);
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, 1);
  for (let x = 0; x < canvas.width; x += 1) {
    const value = low + ((high - low) * x) / (canvas.width - 1);
    image.data.set(colour((value - plain) / full, 1), 4 * x);
  }
  context.putImageData(image, 0, 0);
}

// "strongest at the upper left": for those who do not see it.
export function describe(heat) {
  const { low, high } = range(heat);
  const where = (value) => {
    const row = heat.values.findIndex((cells) => cells.includes(value)), column = heat.values[row].indexOf(value);
    const third = (place, count, names) => names[Math.min(2, Math.floor((3 * (place + 0.5)) / count))];
    const rows = third(row, heat.values.length, ["upper", "middle", "lower"]);
    const columns = third(column, heat.values[0].length, ["left", "middle", "right"]);
    return rows === columns ? "in the middle" : `at the ${rows} ${columns}`;
  };
  const against = low < 0 && heat.method !== "attention" ? `, most against it ${where(low)}` : "";
  return high <= 0 ? `nothing speaks for it${against}` : `strongest ${where(high)}${against}`;
}

function colour(value, strength) {
  const amount = Math.min(1, Math.abs(value)), ramp = value < 0 ? COLD : WARM;
  const place = amount * (ramp.length - 1), index = Math.min(ramp.length - 2, Math.floor(place)), part = place - index;
  const mixed = ramp[index].map((start, i) => start + (ramp[index + 1][i] - start) * part);
  return [...mixed, 255 * strength * amount];
}

// Catmull-Rom between the centres of the cells; beyond the outermost centres, their value.
function between(values, y, x) {
  const column = (row) => spline(values[clamp(row, values.length)], x);
  return spline([-1, 0, 1, 2].map((step) => column(Math.floor(y) + step)), y - Math.floor(y) + 1);
}

function spline(line, x) {
  const base = Math.floor(x), t = x - base;
  const [a, b, c, d] = [-1, 0, 1, 2].map((step) => line[clamp(base + step, line.length)]);
  return b + (t / 2) * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)));
}

const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));
