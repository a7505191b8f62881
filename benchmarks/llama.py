"""What to expect of SmolLM2-135M on this machine: seconds to load, the memory of the process, and
tokens per second, greedy, in float32 and bfloat16, beside transformers with the same weights.

    make weights && python benchmarks/llama.py
    python benchmarks/llama.py --only bfloat16 --rounds 9

Loading and memory are measured in a process of their own, which loads the file and writes a text;
speed in this one, the two libraries taking turns. A ratio above 1: ours is the faster one.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import OURS, alternate, fresh, main, peak_memory, ratios

from mingpt_nb.data import smollm2
from mingpt_nb.llama import Llama

TYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)


def tiny(folder):
    "A folder with a model of random numbers, for `--tiny`."
    config = Llama.get_default_config()
    config.merge_from_dict(dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=48, tie_weights=True))
    config.merge_from_dict(dict(vocab_size=1000, block_size=128))
    Llama(config).save_pretrained(folder)
    return Path(folder)


def prompt(model):
    g = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, 16), generator=g)


def load_and_write(path, kind, new, threads):
    "(seconds to load, MiB at most) in a process of its own."
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = Llama.from_pretrained(path, dtype=TYPES[kind])
    seconds = time.perf_counter() - start
    model.generate(prompt(model), new)
    return seconds, peak_memory()


def rows(args):
    with tempfile.TemporaryDirectory() as folder:
        path = tiny(folder) if args.tiny else smollm2()
        if path is None:
            raise SystemExit('the weights are not in the cache: make weights')
        name, new = ('tiny', 4) if args.tiny else ('SmolLM2-135M', args.new)
        for kind in TYPES:
            if args.only in kind:
                yield from measure(path, name, kind, new, args)


def measure(path, name, kind, new, args):
    with fresh(['torch', 'mingpt_nb.llama'], args.threads) as pool:
        seconds, mib = pool.apply(load_and_write, (path, kind, new, args.threads))
    ours = Llama.from_pretrained(path, dtype=TYPES[kind])
    theirs, x = ours.to_hf().eval(), prompt(ours)
    greedy = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    jobs = {
        OURS: lambda: ours.generate(x, new),
        'transformers': lambda: theirs.generate(x, attention_mask=torch.ones_like(x), **greedy),
    }
    with torch.inference_mode():
        times = alternate(jobs, args.rounds)
        same = (jobs[OURS]() == jobs['transformers']()).float().mean().item()
    yield from ratios(
        f'{name}, {kind}',
        times,
        per=new * 1e-3,
        unit='ms/token',
        same_tokens=same,
        kind=kind,
        tokens_per_second=new / statistics.median(times[OURS]),
        load_s=seconds,
        memory_mib=mib,
    )


if __name__ == '__main__':
    main(__doc__, rows, only=('', 'part of a type'), new=(64, 'tokens to generate'))
