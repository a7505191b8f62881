// The first part of the page: what the tokenizer makes of the text that is typed, and how.
import { by_id, el, make_stop, number, roving, visible } from './dom.js';

const bytes_of = text => new TextEncoder().encode(text);

// The bytes of a token as text; those that are only a part of a character as hexadecimal numbers.
function show(bytes) {
  try { return visible(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes))); }
  catch { return bytes.map(b => b < 128 ? visible(String.fromCharCode(b)) : `\\x${b.toString(16)}`).join(''); }
}

export function tokenizer_view(encoder) {
  const text = by_id('pg-text'), chips = by_id('pg-chips'), ids = by_id('pg-ids'), merges = by_id('pg-merges'), say = by_id('pg-tokens-say');
  let tokens = [];                                       // { id, bytes, start, word, at }: start in the text, at in its word, in bytes

  function update() {
    tokens = [];
    let start = 0;
    for (const word of encoder.split_words(text.value)) {
      let at = 0;
      for (const id of encoder.encode_word(word)) {
        const bytes = encoder.token_bytes[id];
        tokens.push({ id, bytes, start, word, at });
        at += bytes.length;
        start += bytes.length;
      }
    }
    chips.replaceChildren(...tokens.map((token, i) => el('span',
      { class: `pg-chip pg-c${i % 5}`, role: 'option', 'aria-selected': 'false', tabindex: -1 },
      el('span', { class: 'pg-chip-text' }, show(token.bytes)), el('span', { class: 'pg-chip-id' }, `${token.id}`))));
    ids.textContent = `[${tokens.map(t => t.id).join(', ')}]`;
    const characters = [...text.value].length;
    say.textContent = `${number(characters)} ${characters === 1 ? 'character' : 'characters'}, ${number(start)} bytes, `
      + `${number(tokens.length)} ${tokens.length === 1 ? 'token' : 'tokens'}.`;
    at_caret();
  }

  // The token in which the text cursor stands, or which ends there.
  function at_caret() {
    const caret = bytes_of(text.value.slice(0, text.selectionStart)).length;
    const i = tokens.findIndex(t => t.start + t.bytes.length >= caret);
    select(Math.max(0, i));
  }

  // To begin with, the token that has most to show.
  function select_longest() { select(tokens.reduce((best, t, i) => t.bytes.length > tokens[best].bytes.length ? i : best, 0)); }

  function select(i) {
    chips.querySelector('[aria-selected=true]')?.setAttribute('aria-selected', 'false');
    const token = tokens[i];
    if (!token) return merges.replaceChildren(el('p', {}, 'Nothing to merge: type something.'));
    chips.children[i].setAttribute('aria-selected', 'true');
    make_stop(chips, '.pg-chip', chips.children[i]);
    show_merges(token);
  }

  function show_merges(token) {
    const steps = [];
    encoder.merge_word(token.word, steps);
    const last = steps.at(-1).ids, n_bytes = bytes_of(token.word).length;
    const piece = (id, at, fresh) => {
      const mine = at >= token.at && at < token.at + token.bytes.length;
      return el('span', { class: `pg-piece${mine ? ' pg-mine' : ''}${fresh ? ' pg-new' : ''}` }, show(encoder.token_bytes[id]));
    };
    const row = ({ ids, rank, pair }) => {
      let at = 0;
      const pieces = ids.map(id => {
        const p = piece(id, at, id === 256 + rank);
        at += encoder.token_bytes[id].length;
        return p;
      });
      return el('tr', {}, el('td', { class: 'pg-rank' }, pair ? number(rank) : 'bytes'), el('td', { class: 'pg-pieces' }, pieces));
    };
    const same = steps.length - 1, said = [el('code', {}, visible(token.word)), ` is ${n_bytes} ${n_bytes === 1 ? 'byte' : 'bytes'}. `];
    said.push(same === 0 ? 'No pair in it is in the merge list.' : `${same} ${same === 1 ? 'merge makes' : 'merges make'} ${last.length} `
      + `${last.length === 1 ? 'token' : 'tokens'} of them; at each step the pair with the lowest rank is joined.`);
    merges.replaceChildren(
      el('p', {}, 'Token ', el('b', {}, `${token.id}`), ' is ', el('code', {}, show(token.bytes)), '. The word ', said),
      el('div', { class: 'pg-scroll', tabindex: 0, role: 'region', 'aria-label': 'Merges, step by step' }, el('table', { class: 'pg-steps' },
        el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Rank'), el('th', { scope: 'col' }, 'The word after this merge'))),
        el('tbody', {}, steps.map(row)))));
  }

  roving(chips, '.pg-chip');
  const index = event => [...chips.children].indexOf(event.target.closest('.pg-chip'));
  for (const kind of ['pointerover', 'focusin', 'click']) chips.addEventListener(kind, event => { if (index(event) >= 0) select(index(event)); });
  text.addEventListener('input', update);
  for (const kind of ['keyup', 'click']) text.addEventListener(kind, at_caret);
  for (const button of document.querySelectorAll('[data-pg-example]'))
    button.addEventListener('click', () => { text.value = button.dataset.pgExample; update(); select_longest(); });
  update();
  select_longest();
}
