// Starts the four parts of the page, each as soon as its files are there. All files lie beside this one; nothing is asked of any other place.
import { adder_view } from './adder.js';
import { Encoder } from './bpe.js';
import { by_id } from './dom.js';
import { GPT } from './gpt.js';
import { pixels_view } from './pixels.js';
import { tokenizer_view } from './tokens.js';
import { CharTokenizer, writer_view } from './writer.js';

const here = new URL('.', import.meta.url).href.replace(/\/$/, '');

async function vocabulary(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return new CharTokenizer(await response.json());
}

// The part is an example until its files have come; then its controls are switched on. If they do not come, it stays one, and says why.
async function start(id, load) {
  const part = by_id(id), status = part.querySelector('.pg-status');
  try {
    await load();
    for (const control of part.querySelectorAll(':disabled')) control.disabled = false;
    status.remove();
    part.dataset.ready = 'true';
  } catch (error) {
    status.className = 'pg-status pg-error';
    status.textContent = `This part could not start, and shows an example that was computed before. What went wrong: ${error.message}`;
    part.dataset.ready = 'false';
  }
}

start('pg-tokens', async () => tokenizer_view(await Encoder.load(`${here}/gpt2-vocab.bpe`, `${here}/unicode-16.txt`)));
start('pg-adder', async () => adder_view(await GPT.load(`${here}/adder`)));
start('pg-writer', async () => writer_view(...await Promise.all([GPT.load(`${here}/chargpt`), vocabulary(`${here}/chargpt/vocab.json`)])));
start('pg-pixels', async () => pixels_view(await GPT.load(`${here}/pixels`)));
