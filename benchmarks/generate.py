"""Tokens per second of our `generate` and of Hugging Face's, greedy, on the same random weights, alternating in one process.

    python benchmarks/generate.py                # GPT-2 124M in fp32 and bf16, a 6-layer 192-wide model, batches of 1 and 8
    python benchmarks/generate.py --only small --rounds 9

Prints medians and ratios, and beside them the time that reading all weights once takes on this machine, which no decoder
that uses each weight for each token can beat.
"""
import argparse
import json
import statistics
import time

import torch

from mingpt_nb.gpt2 import to_hf
from mingpt_nb.model import GPT

SHAPES = {
    '124M fp32': (dict(model_type='gpt2', vocab_size=50257, block_size=1024, tie_weights=True), torch.float32),
    '124M bf16': (dict(model_type='gpt2', vocab_size=50257, block_size=1024, tie_weights=True), torch.bfloat16),
    'small fp32': (dict(model_type='gpt-mini', vocab_size=65, block_size=256), torch.float32),
}


def make(sizes, dtype):
    config = GPT.get_default_config()
    config.merge_from_dict(sizes)
    torch.manual_seed(0)
    ours = GPT(config).eval()
    for p in ours.parameters():                # as sharp as a trained model, so that greedy text does not hang on rounding
        p.data.mul_(3)
    theirs = to_hf(ours).eval()
    return ours.to(dtype), theirs.to(dtype)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def alternate(functions, rounds):
    "Median and spread of each function's time, all functions in turn in each round."
    for f in functions:
        f()
    times = [[seconds(f) for f in functions] for _ in range(rounds)]
    return [(statistics.median(t), min(t), max(t)) for t in zip(*times)]


def read_once(model, rounds=5):
    "Seconds to read every weight once: the sum of a tensor as large as the model, in float32."
    n = sum(p.numel() * p.element_size() for p in model.parameters()) // 4
    block = torch.ones(n)
    return statistics.median(seconds(block.sum) for _ in range(rounds))


def compare(name, batch, new, rounds):
    sizes, dtype = SHAPES[name]
    ours, theirs = make(sizes, dtype)
    prompt = torch.randint(ours.config.vocab_size, (batch, 16), generator=torch.Generator().manual_seed(1))
    hf = lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                                 do_sample=False, pad_token_id=0)
    nb = lambda: ours.generate(prompt, new)
    with torch.inference_mode():
        (t_nb, *spread_nb), (t_hf, *spread_hf) = alternate([nb, hf], rounds)
        same = (nb()[:, 16:] == hf()[:, 16:]).float().mean().item()
    once = read_once(ours)
    row = dict(model=name, batch=batch, new_tokens=new, ms_per_token=1e3 * t_nb / new, ms_per_token_hf=1e3 * t_hf / new,
               ratio=t_hf / t_nb, spread=[t_hf / s for s in spread_nb], same_tokens=same, read_once_ms=1e3 * once,
               share_of_limit=once / (t_nb / new))
    print(f"{name:10}  batch {batch}  ours {row['ms_per_token']:7.2f} ms/token  Hugging Face {row['ms_per_token_hf']:7.2f}  "
          f"ratio {row['ratio']:.2f}  weights read once {row['read_once_ms']:.2f} ms = {row['share_of_limit']:.0%}  "
          f"same tokens {same:.0%}", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='part of a model name')
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--new', type=int, default=32, help='tokens to generate')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', help='write the rows to this file')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(name, b, args.new, args.rounds) for name in SHAPES if args.only in name for b in args.batches]
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(rows, f, indent=1)


if __name__ == '__main__':
    main()
