// The third part of the page: the character model of chapter 06 writes, one character at a time.
import { bar, by_id, el, number, visible } from './dom.js';
import { KVCache } from './gpt.js';
import { draw, next_probs, random_numbers } from './sample.js';

const LONGEST = 500;                                       // characters, then it stops by itself
const pause = ms => new Promise(done => setTimeout(done, ms));

// A character for each id, and back. chapter 06: the sorted different characters of the text.
export class CharTokenizer {
  constructor(stoi) { this.stoi = stoi; this.itos = Object.keys(stoi).reduce((list, c) => { list[stoi[c]] = c; return list; }, []); }
  encode(text) {
    const unknown = [...text].find(c => !Object.hasOwn(this.stoi, c));
    if (unknown !== undefined) throw new Error(`The model has never seen the character ${visible(unknown)}; it knows ${this.itos.length} others.`);
    return [...text].map(c => this.stoi[c]);
  }
  decode(ids) { return ids.map(id => this.itos[id]).join(''); }
}

// Yields { id, logits, probs, computed, ms } for one new character after the other; `settings()` is asked each time, so sliders work at once.
export function* write(model, ids, seed, settings) {
  const random = random_numbers(seed), cache = new KVCache(model.config);
  ids = [...ids];
  for (;;) {
    const start = performance.now(), { logits, computed } = model.next_logits(ids, cache), ms = performance.now() - start;
    const { temperature, top_k } = settings(), id = draw(next_probs(logits, temperature, top_k), random());
    ids.push(id);
    yield { id, logits, computed, ms };
  }
}

export function writer_view(model, tok) {
  const [prompt, seed, go, out, say, bars, which] = ['prompt', 'seed', 'go', 'out', 'write-say', 'next', 'which'].map(name => by_id(`pg-${name}`));
  const temperature = by_id('pg-temperature'), top_k = by_id('pg-top-k'), { block_size, vocab_size } = model.config;
  let running = false, wanted = false, written = [], last;      // last: the step to show where none was written yet
  top_k.max = vocab_size;
  const settings = () => ({ temperature: Number(temperature.value), top_k: top_k.value === top_k.max ? 0 : Number(top_k.value) });

  function show_settings() {
    const s = settings();
    by_id('pg-temperature-value').textContent = s.temperature.toFixed(2);
    by_id('pg-top-k-value').textContent = s.top_k ? `the best ${s.top_k}` : `all ${vocab_size}`;
    top_k.setAttribute('aria-valuetext', by_id('pg-top-k-value').textContent);
    show_next();
  }

  // What the model expected at the character that is looked at, as the sliders stand now.
  function show_next() {
    const step = written[which.value - 1] ?? last;
    const { temperature, top_k } = settings(), probs = next_probs(step.logits, temperature, top_k);
    const best = Array.from(probs.keys()).sort((i, j) => probs[j] - probs[i]).slice(0, 12);
    bars.replaceChildren(...best.map(id => bar(visible(tok.itos[id]), probs[id], id === step.id)));
    out.querySelector('.pg-looked')?.classList.remove('pg-looked');
    step.node?.classList.add('pg-looked');
    by_id('pg-which-value').textContent = step.node ? `${which.value} of ${written.length}: ${visible(tok.itos[step.id])}` : 'after the example';
  }

  function tell({ computed, ms }, n) {
    const took = `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
    say.textContent = n <= block_size
      ? `${n} characters read, the last ${computed === 1 ? 'one' : computed} just now, in ${took}; keys and values of all of them are kept.`
      : `More than ${block_size} characters: the oldest is forgotten, the others move up one place, and all ${computed} are computed again, in ${took}.`;
  }

  async function start() {
    let ids;
    try { ids = tok.encode(prompt.value || '\n'); }
    catch (error) { say.textContent = error.message; return; }
    running = wanted = true;
    written = [];
    out.replaceChildren(el('span', { class: 'pg-prompt' }, tok.decode(ids)));
    go.textContent = 'Stop';
    for (const step of write(model, ids, Number(seed.value), settings)) {
      step.node = el('span', { 'data-n': written.length + 1 }, tok.itos[step.id]);
      written.push(step);
      out.append(step.node);
      out.scrollTop = out.scrollHeight;
      which.max = written.length;
      which.value = written.length;
      show_next();
      tell(step, ids.length + written.length - 1);
      await pause(15);                                     // lets the page draw, and the reader read
      if (!wanted || written.length >= LONGEST) break;
    }
    running = false;
    go.textContent = 'Write';
    say.textContent += ` Stopped after ${number(written.length)} characters.`;
  }

  go.addEventListener('click', () => { if (running) wanted = false; else start(); });
  prompt.addEventListener('keydown', event => { if (event.key === 'Enter' && !running) start(); });
  for (const slider of [temperature, top_k]) slider.addEventListener('input', show_settings);
  which.addEventListener('input', show_next);
  out.addEventListener('pointerover', ({ target }) => {
    if (!target.dataset.n || running) return;
    which.value = target.dataset.n;
    show_next();
  });
  last = model.next_logits(tok.encode(out.textContent), new KVCache(model.config));    // what comes after the example on the page
  show_settings();
}
