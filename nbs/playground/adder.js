// The second part of the page: the adder of chapter 04. 47 + 38 is the tokens 4 7 3 8, and the answer comes backwards: 5 8 0.
import { head_maps, head_table, mark_head } from './attention.js';
import { bar, by_id, el, percent } from './dom.js';
import { softmax } from './gpt.js';
import { argmax } from './sample.js';

const PLACES = ['a: tens', 'a: units', 'b: tens', 'b: units', 'sum: units', 'sum: tens', 'sum: hundreds'];
const COLUMNS = ['units', 'tens', 'hundreds'];
const UNITS = [1, 3], TENS = [0, 2];                       // where the digits of the two columns stand
const LOOKED_FOR = [[UNITS], [UNITS, TENS], [TENS]];       // what is needed to write units, tens (with the carry), hundreds

// The model's own answer, greedily, with the probabilities of each digit and the attention of every head.
export function add(model, a, b) {
  const digits = [...`${a}`.padStart(2, '0'), ...`${b}`.padStart(2, '0')].map(Number), probs = [];
  for (let i = 0; i < 3; i++) {
    const { logits } = model.forward(digits);
    probs.push(softmax(Float64Array.from(logits.slice(-10))));
    digits.push(argmax(probs[i]));
  }
  const { weights } = model.forward(digits.slice(0, 6));   // the last digit is written, but never read
  return { digits, probs, weights, answer: digits[6] * 100 + digits[5] * 10 + digits[4] };
}

// Of all heads, the one that looks most at both digits of a column; by the smaller of the two weights, as in chapter 04.
export function column_head(weights, position, places, T = 6) {
  let best = { least: -1 };
  weights.forEach((heads, layer) => heads.forEach((w, head) => {
    const two = places.map(p => w[position * T + p]), least = Math.min(...two);
    if (least > best.least) best = { layer, head, least, share: two[0] + two[1], places };
  }));
  return best;
}

// The sum as on paper, with a line from the digit that is written to each digit that a head looks at, as thick as the weight.
const XY = [[110, 42], [170, 42], [110, 96], [170, 96], [170, 162], [110, 162], [50, 162]];
function school_sum(digits, step, lines) {
  const marks = lines.flatMap(({ layer, head, weights, color }) => {
    const [x1, y1] = XY[4 + step];
    return XY.slice(0, 4 + step).map(([x2, y2], s) => {
      const w = weights[layer][head][(3 + step) * 6 + s], bend = color === 'tens' ? -26 : 26;
      if (w < 0.02) return null;
      return el('path', { d: `M${x1} ${y1 - 9} Q${(x1 + x2) / 2 + bend} ${(y1 + y2) / 2 - 9} ${x2} ${y2 - 9}`, class: `pg-line pg-line-${color}`, 'stroke-width': (12 * w).toFixed(2) });
    });
  });
  const texts = digits.slice(0, 5 + step).map((digit, i) => el('text', { x: XY[i][0], y: XY[i][1], class: i === 4 + step ? 'pg-written' : '' }, `${digit}`));
  return el('svg', { viewBox: '10 8 200 168', class: 'pg-paper', role: 'img', 'aria-label': `${digits.slice(0, 2).join('')} plus ${digits.slice(2, 4).join('')} on paper, `
    + `the ${COLUMNS.slice(0, step + 1).join(', ')} written` },
  ...marks.filter(Boolean), el('text', { x: 50, y: 96 }, '+'), el('line', { x1: 28, x2: 192, y1: 116, y2: 116 }), ...texts);
}

export function adder_view(model) {
  const form = by_id('pg-sum'), paper = by_id('pg-paper'), bars = by_id('pg-digits'), say = by_id('pg-sum-say'), why = by_id('pg-sum-why');
  const maps = by_id('pg-maps'), table = by_id('pg-weights'), cell_say = by_id('pg-cell-say'), row = by_id('pg-row');
  const radios = [...document.querySelectorAll('input[name=pg-step]')], { n_head } = model.config, T = 6;
  let sum, step = 0, timer, chosen, peeking = false;           // chosen: shows the head that was chosen

  function show_step(k) {
    step = k;
    radios.forEach((radio, i) => { radio.checked = i === k; });
    const { digits, probs, weights } = sum, position = 3 + k, written = digits[4 + k];
    row.replaceChildren(...digits.slice(0, 5 + k).map((d, i) => el('span', { class: `pg-digit${i === position ? ' pg-here' : ''}${i === position + 1 ? ' pg-written' : ''}` },
      el('b', {}, `${d}`), el('small', {}, PLACES[i]))));
    bars.replaceChildren(...Array.from(probs[k], (p, d) => bar(`${d}`, p, d === written)));
    say.replaceChildren(`The model has read ${digits.slice(0, 4 + k).join(' ')}. Next come the ${COLUMNS[k]}: `, el('b', {}, `${written}`), `, ${percent(probs[k][written])} sure.`,
      k < 2 ? '' : ` Read backwards, ${digits.slice(4).join(' ')} is ${sum.answer}: ${sum.answer === sum.a + sum.b ? 'right' : `wrong, it is ${sum.a + sum.b}`}.`);
    const heads = LOOKED_FOR[k].map(places => ({ ...column_head(weights, position, places), weights, color: places === UNITS ? 'units' : 'tens' }));
    why.replaceChildren(...heads.flatMap(explain));
    head_maps(maps, { weights, T, rows: 4 + k, row: position, chosen: [heads[0].layer, heads[0].head],
      on_show: (layer, head) => { show_one(layer, head); peeking = true; }, on_choose: choose });
    chosen = () => show_head(heads[0].layer, heads[0].head, heads);
    chosen();
  }

  const show_one = (layer, head) => show_head(layer, head, [{ layer, head, weights: sum.weights, color: 'one' }]);

  function choose(layer, head) {
    chosen = () => show_one(layer, head);
    chosen();
  }

  // One sentence for each head that was looked for.
  function explain({ layer, head, share, places, color }) {
    const [x, y] = places.map(p => sum.digits[p]), carry = step === 1 && places === UNITS;
    const name = el('button', { type: 'button', class: `pg-link pg-line-${color}`, onclick: () => choose(layer, head) }, `Head ${head} of layer ${layer}`);
    return [name, ` puts ${percent(share)} of its attention on the ${places === UNITS ? 'units' : 'tens'}, ${x} and ${y}`,
      carry ? `, although they are written already: ${x} + ${y} = ${x + y}, and ${x + y > 9 ? 'there is a carry' : 'nothing is carried'}. ` : '. '];
  }

  // The numbers of a head, and on paper the lines of one head or of several.
  function show_head(layer, head, lines) {
    const { digits, weights } = sum;
    peeking = false;
    mark_head(maps, layer, head, n_head);
    paper.replaceChildren(school_sum(digits, step, lines));
    head_table(table, { title: `Layer ${layer}, head ${head}: attention in %. Each row sums to 100.`, w: weights[layer][head], T, rows: 4 + step, row: 3 + step,
      labels: digits.map((d, i) => [`${d}`, PLACES[i]]), on_inspect: inspect });
    cell_say.textContent = 'Point at a number, or go there with Tab and the arrow keys.';
    function inspect(t, s, share) {
      const writes = t < 3 ? '' : `, where it writes the ${COLUMNS[t - 3]},`;
      cell_say.textContent = `At the ${digits[t]} (${PLACES[t]})${writes} head ${head} of layer ${layer} puts ${share} of its attention on the ${digits[s]} (${PLACES[s]}).`;
    }
  }

  // Compute everything at once, then show it digit by digit, since a computer adds too fast to be watched.
  function run(slowly) {
    clearTimeout(timer);
    const [a, b] = ['pg-a', 'pg-b'].map(id => by_id(id).value.trim());
    if (![a, b].every(v => /^[0-9]{1,2}$/.test(v))) {
      say.textContent = `It has learned numbers of two digits, 0 to 99, and no others; not ${[a, b].find(v => !/^[0-9]{1,2}$/.test(v)) || 'an empty field'}.`;
      return;
    }
    sum = { ...add(model, Number(a), Number(b)), a: Number(a), b: Number(b) };
    const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
    const next = k => { show_step(k); if (k < 2) timer = setTimeout(next, 900, k + 1); };
    if (slowly && !calm) next(0);
    else show_step(1);
  }

  maps.addEventListener('pointerleave', () => { if (peeking) chosen(); });
  form.addEventListener('submit', event => { event.preventDefault(); run(true); });
  radios.forEach((radio, k) => radio.addEventListener('change', () => { clearTimeout(timer); show_step(k); }));
  for (const button of document.querySelectorAll('[data-pg-sum]')) button.addEventListener('click', () => {
    [by_id('pg-a').value, by_id('pg-b').value] = button.dataset.pgSum.split('+');
    run(true);
  });
  run(false);
}
