"""How time and memory grow with each size, and how much of the machine they use.

    python benchmarks/scaling.py [--threads 2] [--only width]

A training step in float32 (forward, backward, AdamW) of a model of 4 layers, width 128, 128 tokens
of context, batches of 8 and 256 tokens of vocabulary, with one of these sizes changed at a time;
and byte-level BPE, learnt from and encoding Python source of growing length. The sizes take turns
in each round. Memory is the peak of a process that does it once, above what it held before, with
all imports done.

`exponent` is the slope of log time over log size, fitted to all sizes; `exponent_end` the slope
between the two largest. For training steps the script counts the arithmetic (2 operations for each
weight and token forward, 4 backward, and the attention) and the least memory traffic: weights read
twice, their gradients written, AdamW reading 4 and writing 3 numbers for each, activations written
and read. What of the two takes longer at the peaks that the same run measures is the bound, and
`share` the part of the time that it explains.
"""

import math
import statistics

import torch
from bpe import source
from common import alternate, fresh, main, peak_memory
from machine import peaks

from mingpt_nb.bpe import get_encoder, train_bpe
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer

BASE = dict(context=128, width=128, depth=4, batch=8, vocabulary=256)
SIZES = dict(
    context=[32, 64, 128, 256, 512, 1024],
    width=[64, 128, 256, 512, 768],
    depth=[1, 2, 4, 8, 16],
    batch=[1, 2, 4, 8, 16, 32],
    vocabulary=[256, 1024, 4096, 16384, 65536],
)
CORPUS = [30_000, 100_000, 300_000, 1_000_000, 3_000_000]


class Step:
    "One training step of the model with these sizes, as a function."

    def __init__(self, context, width, depth, batch, vocabulary):
        c = GPT.get_default_config()
        c.merge_from_dict(
            dict(
                n_layer=depth,
                n_head=max(1, width // 32),
                n_embd=width,
                vocab_size=vocabulary,
                block_size=context,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        self.model = GPT(c)
        self.optimizer = self.model.configure_optimizers(Trainer.get_default_config())
        self.x, self.y = torch.randint(vocabulary, (2, batch, context))
        weights = 12 * depth * width**2 + vocabulary * width  # of matrices that multiply
        self.operations = 3 * batch * context * (2 * weights + 2 * depth * context * width)

    def __call__(self):
        self.optimizer.zero_grad()
        self.model(self.x, self.y)[1].backward()
        self.optimizer.step()

    def traffic(self):
        "Bytes; the activations are what autograd keeps, each counted once."
        own, kept = {p.data_ptr() for p in self.model.parameters()}, {}

        def keep(t):
            if t.data_ptr() not in own:
                kept[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            self.model(self.x, self.y)
        return 40 * sum(p.numel() for p in self.model.parameters()) + 2 * sum(kept.values())


def job(axis, x):
    "The function that is timed for size `x` on this axis."
    if axis == 'BPE, learning 1000 merges':
        text = source(x)
        return lambda: train_bpe(text, 1257)
    if axis == 'BPE, encoding':
        return encoding(source(x))
    return Step(**{**BASE, axis: x})


def encoding(text):
    "A function that encodes `text` with no word cached but those of the vocabulary."
    encoder = get_encoder()
    words = dict(encoder.cache)

    def encode():
        encoder.cache.clear()
        encoder.pieces.clear()
        encoder.cache.update(words)
        encoder.encode(text)

    return encode


def memory(axis, x, threads):
    """MiB that doing it once takes, with the model or the text; to be called in a process of its
    own."""
    torch.set_num_threads(threads)
    Step(**BASE | dict(context=4, depth=1))()  # what torch sets up at its first step does not count
    before = peak_memory()
    job(axis, x)()
    return peak_memory() - before


def slope(xs, ys):
    "Of the straight line through (log x, log y)."
    x, y = ([math.log(v) for v in values] for values in (xs, ys))
    return statistics.linear_regression(x, y).slope


def bound(step, time, peak):
    "Which bound holds for a step, and which share of the time it explains."
    limits = dict(arithmetic=step.operations / peak['fp32'], memory=step.traffic() / peak['read'])
    name = max(limits, key=limits.get)
    return dict(bound=name, share=limits[name] / time, gflops=step.operations / time / 1e9)


def axis_rows(axis, xs, peak, pool, args):
    jobs = {x: job(axis, x) for x in xs}
    times = alternate(jobs, args.rounds)
    middle = [statistics.median(t) for t in times.values()]
    held = [pool.apply(memory, (axis, x, args.threads)) for x in xs]
    for x, t, mib in zip(xs, middle, held):
        yield dict(
            what=f'{axis} {x:,}',
            axis=axis,
            x=x,
            ms=1e3 * t,
            low=1e3 * min(times[x]),
            high=1e3 * max(times[x]),
            mib=mib,
            **bound(jobs[x], t, peak) if isinstance(jobs[x], Step) else {},
        )
    yield dict(
        what=f'{axis}, exponents',
        axis=axis,
        exponent=slope(xs, middle),
        exponent_end=slope(xs[-2:], middle[-2:]),
        **dict(memory_exponent_end=slope(xs[-2:], held[-2:])) if min(held) > 0 else {},
    )


def rows(args):
    axes = {
        k: v
        for k, v in {**SIZES, 'BPE, learning 1000 merges': CORPUS, 'BPE, encoding': CORPUS}.items()
        if args.only in k
    }
    if args.tiny:
        axes = {k: axes[k][:2] for k in list(axes)[-3:]}
        BASE.update(context=16, width=32, depth=1, batch=1)
    peak = {
        name: max(rates) for name, rates in (peaks(2, 256, 16) if args.tiny else peaks()).items()
    }
    yield dict(what='peaks', **{name: rate / 1e9 for name, rate in peak.items()})
    with fresh(['torch', 'mingpt_nb.trainer'], args.threads) as pool:
        for axis, xs in axes.items():
            yield from axis_rows(axis, xs, peak, pool, args)


if __name__ == '__main__':
    main(__doc__, rows, only=('', 'part of the name of an axis'))
