// Attention as heat maps: a small one for each head, and a table with the numbers of one of them.
import { el, make_stop, percent, roving } from './dom.js';

// A cell whose colour is as deep as its weight. `strong` turns the writing on it.
const cell = (tag, w, attributes, ...children) =>
  el(tag, { ...attributes, class: `pg-cell${w > 0.6 ? ' pg-strong' : ''} ${attributes.class ?? ''}`, style: { '--w': w.toFixed(3) } }, ...children);

// One button per head. weights[layer][head]: Float32Array (T, T); the first `rows` rows are known so far, `row` is marked.
// Pointing shows a head for as long as one points, a click or the focus chooses it.
export function head_maps(container, { weights, T, rows, row, chosen, on_show, on_choose }) {
  container.replaceChildren(...weights.flatMap((heads, layer) => heads.map((w, head) => {
    const marked = chosen && chosen[0] === layer && chosen[1] === head;
    const cells = Array.from({ length: T * T }, (_, i) => {
      const [t, s] = [Math.floor(i / T), i % T];
      if (s > t || t >= rows) return el('span', { class: 'pg-cell pg-none' });
      return cell('span', w[i], { class: t === row ? 'pg-row' : '' });
    });
    return el('button', { type: 'button', class: 'pg-head', 'aria-pressed': String(Boolean(marked)), 'aria-label': `layer ${layer}, head ${head}`,
      onclick: () => on_choose(layer, head), onfocus: () => on_choose(layer, head), onpointerenter: () => on_show(layer, head) },
    el('span', { class: 'pg-map', style: { '--T': T } }, cells), el('span', { class: 'pg-head-name' }, `layer ${layer}, head ${head}`));
  })));
}

// Only what depends on which head is chosen, so that the buttons stay and keep the focus.
export function mark_head(container, layer, head, n_head) {
  [...container.children].forEach((button, i) => button.setAttribute('aria-pressed', String(i === layer * n_head + head)));
}

// The numbers of one head. labels[t]: [digit, name of its place]; on_inspect(t, s, weight) when a cell is pointed at or has the focus.
export function head_table(container, { title, w, T, rows, row, labels, on_inspect }) {
  const label = ([digit, place]) => [el('b', {}, digit), ' ', el('span', { class: 'pg-place' }, place)];
  const table = el('table', { class: 'pg-weights' },
    el('caption', {}, title),
    el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, el('span', { class: 'pg-place' }, 'at \\ looks at')),
      labels.slice(0, rows).map(l => el('th', { scope: 'col' }, label(l))))),
    el('tbody', {}, Array.from({ length: rows }, (_, t) => el('tr', { class: t === row ? 'pg-row' : '' }, el('th', { scope: 'row' }, label(labels[t])),
      Array.from({ length: rows }, (_, s) => s > t ? el('td', { class: 'pg-none' })
        : cell('td', w[t * T + s], { tabindex: -1, 'data-t': t, 'data-s': s }, `${Math.round(100 * w[t * T + s])}`))))));
  make_stop(table, '.pg-cell', table.querySelector(`[data-t="${row}"]`));
  roving(table, '.pg-cell');
  for (const kind of ['pointerover', 'focusin']) table.addEventListener(kind, ({ target }) => {
    if (target.dataset.t) on_inspect(Number(target.dataset.t), Number(target.dataset.s), percent(w[target.dataset.t * T + Number(target.dataset.s)]));
  });
  container.replaceChildren(table);
}
