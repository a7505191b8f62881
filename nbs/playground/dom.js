// Small helpers for making page elements.

// el('p', { class: 'say', onclick: f, style: { '--w': 0.5 } }, 'text', child)
export function el(tag, attributes = {}, ...children) {
  const node = tag === 'svg' || tag === 'path' || tag === 'text' || tag === 'line'
    ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter(c => c != null && c !== false));
  return node;
}

export const by_id = id => document.getElementById(id);
export const percent = p => p > 0 && p < 0.001 ? '< 0.1 %' : `${(100 * p).toFixed(1)} %`;
export const number = n => n.toLocaleString('en');

// A row of a bar chart: a label, a bar as long as the probability, and the number.
export function bar(label, p, chosen = false) {
  return el('li', { class: chosen ? 'pg-bar pg-chosen' : 'pg-bar', style: { '--p': p } },
    el('span', { class: 'pg-bar-label' }, label), el('span', { class: 'pg-bar-track' }, el('span', { class: 'pg-bar-fill' })),
    el('span', { class: 'pg-bar-value' }, percent(p)));
}

// Characters that cannot be seen, made visible.
export const visible = text => text.replaceAll(' ', '·').replaceAll('\n', '↵').replaceAll('\t', '⇥');

// One stop for the Tab key in a group of items; arrow keys, Home and End move inside it. `columns()`: items in a row, for up and down.
export function roving(container, selector, columns = () => Infinity) {
  container.addEventListener('keydown', event => {
    const items = [...container.querySelectorAll(selector)], here = items.indexOf(event.target), n = columns();
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + (n < Infinity ? n : 1), ArrowUp: here - (n < Infinity ? n : 1),
      Home: 0, End: items.length - 1 }[event.key];
    if (here < 0 || to === undefined) return;
    event.preventDefault();
    if (items[to]) { make_stop(container, selector, items[to]); items[to].focus(); }
  });
}

export function make_stop(container, selector, item) {
  for (const other of container.querySelectorAll(selector)) other.tabIndex = other === item ? 0 : -1;
}
