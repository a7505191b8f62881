// Reads a .safetensors file: 8 bytes that say how long the header is, a header in JSON, then all numbers, one tensor after the other.

export function read_safetensors(buffer) {
  const header_length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, header_length)));
  const tensors = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const raw = buffer.slice(8 + header_length + start, 8 + header_length + end);     // a copy, since views must be aligned
    if (dtype === 'F32') tensors[name] = { shape, data: new Float32Array(raw) };
    else if (dtype === 'F16') tensors[name] = { shape, data: Float32Array.from(new Uint16Array(raw), half_to_number) };
    else throw new Error(`${name} is stored as ${dtype}; only F32 and F16 are read here`);
  }
  return tensors;
}

// Half precision: 1 bit of sign, 5 of exponent, 10 of fraction (IEEE 754). An exponent of 0 means a very small number.
export function half_to_number(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
