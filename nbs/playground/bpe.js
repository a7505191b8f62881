// GPT-2's tokenizer: text -> words -> bytes -> merges -> ids. Chapter 00 explains each step; the names are the same there.

// A visible character for each byte, so that a merge list can be a text file: a space is written Ġ.
// The order matters: GPT-2 numbers its bytes 0 to 255 in the order of this list.
export function bytes_to_unicode() {
  const range = (a, b) => Array.from({ length: b - a + 1 }, (_, i) => a + i);
  const visible = [...range(0x21, 0x7e), ...range(0xa1, 0xac), ...range(0xae, 0xff)];
  const hidden = range(0, 255).filter(b => !visible.includes(b));
  return new Map([...visible.map(b => [b, String.fromCodePoint(b)]), ...hidden.map((b, i) => [b, String.fromCodePoint(256 + i)])]);
}

export function read_merges(text) {
  return text.split('\n').filter(line => line && !line.startsWith('#version')).map(line => line.split(' '));
}

// The pattern that cuts text into words. JavaScript's own \p{L} and \s would not do: browsers differ in their version of Unicode,
// and \s here includes U+FEFF but not U+0085. So the classes are spelt out, from the same table as in Python:
// three lines of hexadecimal ranges, 'L 41-5a 61-7a ...' letters, 'N ...' numbers, 'S ...' white space.
export function splitter(table) {
  const classes = {};
  for (const line of table.trim().split('\n')) {
    const [kind, ...ranges] = line.split(' ');
    classes[kind] = ranges.map(r => r.split('-').map(hex => `\\u{${hex}}`).join('-')).join('');
  }
  const { L, N, S } = classes;
  return new RegExp(`'(?:[stmd]|re|ve|ll)| ?[${L}]+| ?[${N}]+| ?[^${S}${L}${N}]+|[${S}]+(?![^${S}])|[${S}]+`, 'gu');
}

const pair_key = (a, b) => a * 65536 + b;      // one number for two ids, since there are fewer than 65,536

export class Encoder {
  constructor(merges_text, unicode_table) {
    this.pattern = splitter(unicode_table);
    this.byte_ids = new Map();                  // byte -> id
    this.token_bytes = [];                      // id -> bytes
    const encoder = new Map();                  // token, in visible characters -> id
    for (const [byte, char] of bytes_to_unicode()) {
      const id = this.token_bytes.push([byte]) - 1;
      this.byte_ids.set(byte, id);
      encoder.set(char, id);
    }
    this.ranks = new Map();                     // pair of ids -> rank; rank r makes the token 256 + r
    read_merges(merges_text).forEach(([a, b], rank) => {
      const [i, j] = [encoder.get(a), encoder.get(b)];
      this.ranks.set(pair_key(i, j), rank);
      encoder.set(a + b, this.token_bytes.push([...this.token_bytes[i], ...this.token_bytes[j]]) - 1);
    });
    this.cache = new Map();
  }

  split_words(text) {
    return text.replace(/[\ud800-\udfff]/gu, '\ufffd').match(this.pattern) ?? [];     // half of a surrogate pair is no character
  }

  // Join the pair of lowest rank, wherever it stands, until no pair has a rank. `steps` receives what happened, to be shown.
  merge_word(word, steps = []) {
    let ids = Array.from(new TextEncoder().encode(word), byte => this.byte_ids.get(byte));
    steps.push({ ids });
    for (;;) {
      let rank = Infinity, a, b;
      for (let i = 0; i + 1 < ids.length; i++) {
        const r = this.ranks.get(pair_key(ids[i], ids[i + 1]));
        if (r < rank) [rank, a, b] = [r, ids[i], ids[i + 1]];
      }
      if (rank === Infinity) return ids;
      const merged = [];
      for (let i = 0; i < ids.length; i++) {
        if (ids[i] === a && ids[i + 1] === b) { merged.push(256 + rank); i++; }
        else merged.push(ids[i]);
      }
      ids = merged;
      steps.push({ ids, rank, pair: [a, b] });
    }
  }

  encode_word(word) {
    if (this.cache.size > 50000) this.cache.clear();
    if (!this.cache.has(word)) this.cache.set(word, this.merge_word(word));
    return this.cache.get(word);
  }

  encode(text) { return this.split_words(text).flatMap(word => this.encode_word(word)); }

  decode(ids) { return new TextDecoder('utf-8', { ignoreBOM: true }).decode(new Uint8Array(ids.flatMap(id => this.token_bytes[id]))); }

  static async load(merges_url, table_url) {
    const text = async url => {
      const response = await fetch(url);
      if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
      return response.text();
    };
    return new Encoder(...await Promise.all([text(merges_url), text(table_url)]));
  }
}
