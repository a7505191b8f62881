// A GPT-2 in plain JavaScript. All tensors are flat Float32Arrays, row after row; T tokens, C channels, hs channels per head.
// Chapters 01 and 02 build the same thing in PyTorch, with the same names, and the tests compare the logits of both.
import { read_safetensors } from './safetensors.js';

// A matrix (n_in, n_out), as GPT-2's files hold it, as (n_out, n_in), in which each output has its numbers side by side.
export function turned({ shape: [n_in, n_out], data }) {
  const out = new Float32Array(data.length);
  for (let i = 0; i < n_in; i++) for (let o = 0; o < n_out; o++) out[o * n_in + i] = data[i * n_out + o];
  return { shape: [n_out, n_in], data: out };
}

// y = x W^T + b for each of T rows: (T, n_in) -> (T, n_out). Nearly all of the time is spent here.
export function linear(x, { weight, bias }, T) {
  const [n_out, n_in] = weight.shape, W = weight.data, y = new Float32Array(T * n_out);
  for (let o = 0; o < n_out; o++) {
    const w = o * n_in, b = bias ? bias.data[o] : 0;
    for (let t = 0; t < T; t++) {
      const row = t * n_in;
      let s0 = b, s1 = 0, s2 = 0, s3 = 0, i = 0;              // four sums at a time: none has to wait for the one before
      for (; i + 3 < n_in; i += 4) {
        s0 += x[row + i] * W[w + i]; s1 += x[row + i + 1] * W[w + i + 1];
        s2 += x[row + i + 2] * W[w + i + 2]; s3 += x[row + i + 3] * W[w + i + 3];
      }
      for (; i < n_in; i++) s0 += x[row + i] * W[w + i];
      y[t * n_out + o] = s0 + s1 + s2 + s3;
    }
  }
  return y;
}

// Each row to mean 0 and variance 1, then stretched and shifted as training found useful.
export function layer_norm(x, { weight, bias }, T, eps) {
  const C = weight.data.length, y = new Float32Array(T * C);
  for (let t = 0; t < T; t++) {
    let mean = 0, variance = 0;
    for (let i = 0; i < C; i++) mean += x[t * C + i] / C;
    for (let i = 0; i < C; i++) variance += (x[t * C + i] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < C; i++) y[t * C + i] = (x[t * C + i] - mean) * scale * weight.data[i] + bias.data[i];
  }
  return y;
}

// The bend between the two layers of the MLP, in the tanh approximation that GPT-2 was trained with.
export const gelu = x => x.map(v => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v))));

export function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b), -Infinity);   // subtracted, so that exp cannot overflow
  const e = x.map(v => Math.exp(v - largest)), total = e.reduce((a, b) => a + b, 0);
  return e.map(v => v / total);
}

// Keys and values of the tokens that have been read. The next token needs them, and they do not change.
export class KVCache {
  constructor({ n_layer, n_embd, block_size }) {
    this.k = Array.from({ length: n_layer }, () => new Float32Array(block_size * n_embd));
    this.v = Array.from({ length: n_layer }, () => new Float32Array(block_size * n_embd));
    this.length = 0;
  }
}

// Every query looks at the keys up to its own place, and takes the values there in proportion. q holds T rows of queries,
// keys, values side by side, (T, 3C); k and v hold S = past + T rows. Returns y (T, C) and, per head, the weights (T, S).
function attend(qkv, k, v, T, past, { n_embd: C, n_head }) {
  const S = past + T, hs = C / n_head, y = new Float32Array(T * C), weights = [];
  for (let h = 0; h < n_head; h++) {
    const head_weights = new Float32Array(T * S);                  // 0 for what is in the future
    for (let t = 0; t < T; t++) {
      const q = t * 3 * C + h * hs, scores = new Float64Array(past + t + 1);
      for (let s = 0; s < scores.length; s++) {
        for (let i = 0; i < hs; i++) scores[s] += qkv[q + i] * k[s * C + h * hs + i];
        scores[s] /= Math.sqrt(hs);
      }
      const w = softmax(scores);
      head_weights.set(w, t * S);
      for (let s = 0; s < w.length; s++)
        for (let i = 0; i < hs; i++) y[t * C + h * hs + i] += w[s] * v[s * C + h * hs + i];
    }
    weights.push(head_weights);
  }
  return { y, weights };
}

export class GPT {
  constructor(config, tensors) {
    const { activation_function: act, n_positions: block_size } = config;    // as transformers names them
    if (!['gelu_new', 'gelu_pytorch_tanh'].includes(act)) throw new Error(`activation ${act} is not written here`);
    this.config = { ...config, block_size };
    const layer = name => ({ weight: tensors[`${name}.weight`], bias: tensors[`${name}.bias`] });
    const conv1d = name => ({ ...layer(name), weight: turned(tensors[`${name}.weight`]) });   // stored as (in, out)
    this.wte = tensors['transformer.wte.weight'];                   // what each token means
    this.wpe = tensors['transformer.wpe.weight'];                   // what each position means
    this.blocks = Array.from({ length: config.n_layer }, (_, l) => Object.fromEntries(
      ['ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'].map(
        name => [name, (name.startsWith('ln') ? layer : conv1d)(`transformer.h.${l}.${name}`)])));
    this.ln_f = layer('transformer.ln_f');
    this.lm_head = { weight: tensors['lm_head.weight'] ?? this.wte };   // left out of the file where the two are one matrix
    this.n_params = Object.values(tensors).reduce((n, t) => n + t.data.length, 0);
  }

  // ids of T tokens that follow those in `cache` -> logits (T, vocab_size), and weights[layer][head] (T, S).
  forward(ids, cache = new KVCache(this.config)) {
    const { n_embd: C, block_size, vocab_size, layer_norm_epsilon: eps } = this.config, T = ids.length, past = cache.length;
    if (past + T > block_size) throw new Error(`a sequence of ${past + T} tokens does not fit block_size=${block_size}`);
    if (ids.some(id => !(id >= 0 && id < vocab_size))) throw new Error(`token ids must lie in [0, ${vocab_size})`);
    const add = (x, y) => x.map((v, i) => v + y[i]);
    let x = Float32Array.from({ length: T * C }, (_, i) => {
      const t = Math.floor(i / C), c = i % C;
      return this.wte.data[ids[t] * C + c] + this.wpe.data[(past + t) * C + c];
    });
    const all_weights = this.blocks.map((block, l) => {
      const qkv = linear(layer_norm(x, block.ln_1, T, eps), block['attn.c_attn'], T);         // (T, 3C)
      for (let t = 0; t < T; t++) {
        cache.k[l].set(qkv.subarray((3 * t + 1) * C, (3 * t + 2) * C), (past + t) * C);
        cache.v[l].set(qkv.subarray((3 * t + 2) * C, (3 * t + 3) * C), (past + t) * C);
      }
      const { y, weights } = attend(qkv, cache.k[l], cache.v[l], T, past, this.config);
      x = add(x, linear(y, block['attn.c_proj'], T));
      const inside = gelu(linear(layer_norm(x, block.ln_2, T, eps), block['mlp.c_fc'], T));   // (T, 4C)
      x = add(x, linear(inside, block['mlp.c_proj'], T));
      return weights;
    });
    cache.length += T;
    return { logits: linear(layer_norm(x, this.ln_f, T, eps), this.lm_head, T), weights: all_weights };
  }

  // Logits (vocab_size,) for the token after `ids`, of which the last block_size are seen, and how many positions were computed.
  // While all fit, the cache holds what was read. Then the window moves, every token gets a new position, and all is computed again.
  next_logits(ids, cache) {
    const { block_size, vocab_size } = this.config;
    const fits = ids.length <= block_size, todo = fits ? ids.slice(cache.length) : ids.slice(-block_size);
    const { logits } = this.forward(todo, fits ? cache : undefined);
    return { logits: logits.slice(-vocab_size), computed: todo.length };
  }

  static async load(folder) {
    const get = async name => {
      const response = await fetch(`${folder}/${name}`);
      if (!response.ok) throw new Error(`${folder}/${name}: ${response.status} ${response.statusText}`);
      return response;
    };
    const [config, weights] = await Promise.all([get('config.json'), get('model.safetensors')]);
    return new GPT(await config.json(), read_safetensors(await weights.arrayBuffer()));
  }
}
