// The fourth part of the page: the upper half of a digit is drawn by hand, the lower half by the model of chapter 13.
// A picture is a text: the token of the digit, 17 to 26, then 64 greys, 0 to 16, row after row.
import { bar, by_id, el, make_stop, percent, roving } from './dom.js';
import { KVCache, softmax } from './gpt.js';
import { draw, next_probs, random_numbers } from './sample.js';

const SIDE = 8, LEVELS = 17, DIGITS = 10, HALF = 32, COPIES = 5;
const FINE = 4;                                            // a pixel's grey counts the dark points of a block of 4 by 4, as in the data
const BRUSH = 2.4;                                         // points from the middle of the pen to its edge
const pause = ms => new Promise(done => setTimeout(done, ms));
const range = n => Array.from({ length: n }, (_, i) => i);

// What the model has after it has read a digit's token and some pixels: log p(pixels | digit), the logits of the next one, keys and values.
export function read(model, digit, pixels) {
  const cache = new KVCache(model.config), V = model.config.vocab_size;
  const { logits } = model.forward([LEVELS + digit, ...pixels], cache);
  let log_p = 0;
  pixels.forEach((grey, t) => {
    const row = Float64Array.from(logits.subarray(t * V, (t + 1) * V)), largest = Math.max(...row);
    log_p += row[grey] - largest - Math.log(row.reduce((sum, v) => sum + Math.exp(v - largest), 0));
  });
  return { log_p, logits: logits.slice(-V), cache };
}

// p(digit | pixels), by Bayes, if all digits are as likely before one looks.
export const believe = readings => softmax(Float64Array.from(readings, r => r.log_p));

// Yields n more pixels, one after the other. Afterwards the cache is as it was.
export function* go_on(model, { logits, cache }, n, random, temperature) {
  const start = cache.length;
  try {
    for (let i = 1; i <= n; i++) {
      const grey = draw(next_probs(logits.slice(0, LEVELS), temperature, 0), random());
      yield grey;
      if (i < n) ({ logits } = model.forward([grey], cache));
    }
  } finally { cache.length = start; }
}

const cell = grey => el('span', { style: { '--g': grey } });
const name_of = (p, d) => `${'8' === `${d}` ? 'an' : 'a'} ${d} (${percent(p[d])})`;

export function pixels_view(model) {
  const [pad, rest, say, guess, more, again, clear] = ['pad', 'rest', 'pixels-say', 'guess', 'more', 'again', 'clear'].map(name => by_id(`pg-${name}`));
  const temperature = by_id('pg-heat'), cells = [...pad.children], ink = new Uint8Array(HALF * FINE * FINE), width = SIDE * FINE;
  let round = 0, seed = 1, at = null;                      // of several rounds of computing the newest counts; `at`: where the pen is

  const block = i => range(FINE * FINE).map(k => (Math.floor(i / SIDE) * FINE + Math.floor(k / FINE)) * width + i % SIDE * FINE + k % FINE);
  const blocks = range(HALF).map(block);
  const greys = () => blocks.map(points => points.reduce((sum, point) => sum + ink[point], 0));
  const fill = (i, grey) => blocks[i].forEach((point, k) => { ink[point] = Number(k < grey); });

  function show_pad(pixels) {
    cells.forEach((button, i) => {
      button.style.setProperty('--g', pixels[i]);
      button.setAttribute('aria-label', `row ${Math.floor(i / SIDE) + 1}, column ${i % SIDE + 1}: ${pixels[i]} of 16`);
    });
  }

  function show_rest(pixels) {
    rest.replaceChildren(...range(HALF).map(i => cell(pixels[i] ?? 0)));
  }

  // Read the half as each of the ten digits, then complete it five times; pauses let the page draw, and the pen go on.
  async function update() {
    const mine = ++round, pixels = greys(), random = random_numbers(seed), readings = [];
    show_pad(pixels);
    if (!pixels.some(Boolean)) {
      say.textContent = 'The paper is empty. Draw the upper half of a digit, large, from the top edge to the line.';
      show_rest([]);
      guess.replaceChildren();
      more.replaceChildren();
      return;
    }
    for (const digit of range(DIGITS)) {
      readings.push(read(model, digit, pixels));
      await pause(0);
      if (mine !== round) return;
    }
    const p = believe(readings), best = range(DIGITS).sort((a, b) => p[b] - p[a]);
    guess.replaceChildren(...range(DIGITS).map(d => bar(`${d}`, p[d], d === best[0])));
    const pictures = range(COPIES - 1).map(() => el('div', { class: 'pg-picture' }, pixels.map(cell)));
    more.replaceChildren(...pictures.map(picture => el('div', {}, picture, el('small', {}))));
    const meant = [];
    for (const k of range(COPIES)) {
      const digit = draw(p, random()), drawn = [];
      meant.push(digit);
      for (const grey of go_on(model, readings[digit], HALF, random, Number(temperature.value))) {
        drawn.push(grey);
        if (k) pictures[k - 1].append(cell(grey));
        if (drawn.length % SIDE) continue;
        if (!k) show_rest(drawn);
        await pause(0);
        if (mine !== round) return;
      }
      if (k) more.children[k - 1].lastChild.textContent = `as ${digit}`;
    }
    pictures.forEach((picture, k) => { picture.setAttribute('role', 'img'); picture.setAttribute('aria-label', `your half, completed as ${meant[k + 1]}`); });
    rest.setAttribute('aria-label', `The lower half, drawn as that of a ${meant[0]}`);
    say.textContent = `It takes this for ${name_of(p, best[0])}${p[best[1]] < 0.05 ? '' : ` or ${name_of(p, best[1])}`}. Under your half it has drawn that of a ${meant[0]}.`;
  }

  // A line of dark points from where the pen was to where it is.
  function stroke({ clientX, clientY }) {
    const box = pad.getBoundingClientRect(), here = [(clientX - box.left) / box.width * width, (clientY - box.top) / box.height * width / 2];
    const from = at ?? here, steps = Math.ceil(Math.hypot(here[0] - from[0], here[1] - from[1])) + 1;
    for (const s of range(steps + 1)) {
      const [x, y] = [0, 1].map(i => from[i] + (here[i] - from[i]) * s / steps);
      for (let i = 0; i < ink.length; i++)
        if (Math.hypot(i % width + 0.5 - x, Math.floor(i / width) + 0.5 - y) < BRUSH) ink[i] = 1;
    }
    at = here;
    update();
  }

  pad.addEventListener('pointerdown', event => {
    if (event.button || pad.querySelector(':disabled')) return;
    pad.setPointerCapture(event.pointerId);
    at = null;
    stroke(event);
  });
  pad.addEventListener('pointermove', event => { if (pad.hasPointerCapture(event.pointerId)) stroke(event); });
  // Enter and Space make the pixel black, then grey, then white; a click of the mouse has a detail, and has drawn already.
  pad.addEventListener('click', event => {
    const i = cells.indexOf(event.target);
    if (event.detail || i < 0) return;
    const grey = greys()[i];
    fill(i, grey === 0 ? 16 : grey > 8 ? 8 : 0);
    update();
  });
  roving(pad, 'button', () => SIDE);
  make_stop(pad, 'button', cells[0]);
  temperature.addEventListener('input', () => { by_id('pg-heat-value').textContent = Number(temperature.value).toFixed(2); update(); });
  again.addEventListener('click', () => { seed++; update(); });
  clear.addEventListener('click', () => { ink.fill(0); update(); });
  for (const button of document.querySelectorAll('[data-pg-half]')) button.addEventListener('click', () => {
    [...button.dataset.pgHalf].forEach((letter, i) => fill(i, parseInt(letter, LEVELS)));
    update();
  });
  [...document.querySelector('[data-pg-half]').dataset.pgHalf].forEach((letter, i) => fill(i, parseInt(letter, LEVELS)));
  return update();
}
