// From logits to one token. Chapter 02 has the same in PyTorch.
import { softmax } from './gpt.js';

// Logits divided by the temperature, with -Infinity for all but the k best (and what equals the last of them). top_k 0: all stay.
export function filter_logits(logits, temperature, top_k) {
  const scaled = Float64Array.from(logits, v => v / temperature);
  if (!top_k || top_k >= scaled.length) return scaled;
  const kth = scaled.slice().sort().at(-top_k);      // typed arrays sort by size
  return scaled.map(v => v < kth ? -Infinity : v);
}

export const argmax = x => x.reduce((best, v, i) => v > x[best] ? i : best, 0);

// The probabilities from which the next token is drawn. Temperature 0 means: always the best.
export function next_probs(logits, temperature, top_k) {
  if (temperature > 0) return softmax(filter_logits(logits, temperature, top_k));
  const best = argmax(logits);
  return Float64Array.from(logits, (_, i) => Number(i === best));
}

// Walk along the probabilities until `r`, a random number from 0 to 1, is used up.
export function draw(probs, r) {
  let last = 0;
  for (let i = 0; i < probs.length; i++) {
    if (!probs[i]) continue;
    last = i;
    if ((r -= probs[i]) < 0) return i;
  }
  return last;                                  // rounding has left a rest
}

// Random numbers from a seed, so that the same seed writes the same text (Mulberry32, by Tommy Ettinger; Math.random has no seed).
export function random_numbers(seed) {
  let a = seed >>> 0;
  return () => {
    a = a + 0x6D2B79F5 | 0;
    let t = Math.imul(a ^ a >>> 15, 1 | a);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}
