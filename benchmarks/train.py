"""Seconds per training step, ours against Hugging Face's `GPT2LMHeadModel` and a plain minGPT,
taking turns in one process.

    python benchmarks/train.py steps   [--threads 2] [--rounds 7]     two shapes, all variants
    python benchmarks/train.py processes [--rounds 5]   6 layers, one process and more
    python benchmarks/train.py widths [--threads 1]     where bfloat16 pays: `choose_dtype`
    python benchmarks/train.py losses [--steps 500]     curves of float32 and of bfloat16
    python benchmarks/train.py cuda                     GPT-2 124M, compiled: tokens per second

Shapes of `steps`: 6 layers, 6 heads, 192 wide, context 128, batch 64, dropout 0.1; and GPT-2 124M,
context 256, batch 1. A step is forward, backward, clipping at 1 and AdamW. Hugging Face as it comes
(sdpa attention, torch's AdamW), float32. `steps` is elapsed time, `widths` processor time.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
from common import OURS, alternate, main, ratios
from reference import ReferenceGPT

from mingpt_nb.gpt2 import to_hf
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer, speed
from mingpt_nb.utils import set_seed

SHAPES = {
    '6 layers, 192 wide': (dict(model_type='gpt-mini', vocab_size=65, block_size=128), 64),
    '124M': (dict(model_type='gpt2', vocab_size=50257, block_size=256, tie_weights=True), 1),
}
TINY = {'tiny': (dict(model_type='gpt-nano', vocab_size=65, block_size=16), 4)}
GOALS = {'6 layers, 192 wide': 2.2, '124M': 1.2}  # times Hugging Face


class Tokens:
    def __init__(self, V, T):
        self.V, self.T = V, T

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        s = torch.arange(i, i + self.T + 1) * 7919 % self.V
        return s[:-1], s[1:]


def trainer(sizes, batch, **kw):
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    c.merge_from_dict(sizes)
    t.merge_from_dict(dict(device='cpu', batch_size=batch, progress=False, seed=1) | kw)
    set_seed(0)
    model = Trainer(t, GPT(c), Tokens(c.vocab_size, c.block_size))
    model.optimizer = model.model.configure_optimizers(t)
    model.model.train()
    return model


def plain(model, loss):
    "The step of a plain loop."
    groups = (
        model.configure_optimizers(Trainer.get_default_config())
        if hasattr(model, 'configure_optimizers')
        else torch.optim.AdamW(model.parameters(), lr=3e-4)
    )
    model.train()

    def step(x, y):
        groups.zero_grad()
        loss(model, x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        groups.step()

    return step


def compare(name, sizes, batch, rounds):
    fast = trainer(sizes, batch)
    x, y = next(iter(fast.batches()))
    steps = {
        OURS: fast.step,
        'ours, float32': trainer(sizes, batch, dtype='float32').step,
        'transformers': plain(to_hf(fast.model), lambda m, x, y: m(x, labels=y).loss),
    }
    if batch > 1:
        steps['minGPT-style'] = plain(ReferenceGPT(fast.model.config), lambda m, x, y: m(x, y)[1])
    times = alternate({what: lambda step=step: step(x, y) for what, step in steps.items()}, rounds)
    yield from ratios(
        f'training step, {name}',
        times,
        goal={'transformers': GOALS.get(name)},
        dtype=str(fast.engine.dtype),
    )


def steps(args):
    for name, shape in (TINY if args.tiny else SHAPES).items():
        if args.only in name:
            yield from compare(name, *shape, args.rounds)


def widths(args):
    for width, dropout in [(w, d) for w in (48, 64, 96, 128, 192, 256) for d in (0.0, 0.1)]:
        sizes = dict(
            model_type=None,
            n_layer=4,
            n_head=4,
            n_embd=width,
            vocab_size=65,
            block_size=64,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
        )
        slow, fast = (trainer(sizes, 12, dtype=d) for d in ('float32', 'bfloat16'))
        x, y = next(iter(slow.batches()))
        times = alternate(
            {OURS: lambda: fast.step(x, y), 'ours, float32': lambda: slow.step(x, y)},
            3 * args.rounds,
            time.process_time,
        )
        yield from ratios(f'bfloat16, width {width}, dropout {dropout}', times)


def losses(args):
    from mingpt_nb.chargpt import CharDataset
    from mingpt_nb.data import english
    from mingpt_nb.utils import CfgNode

    steps, data = args.steps, CharDataset(CfgNode(block_size=64), english())
    curves = {}
    for dtype, seed in ('float32', 1), ('float32', 2), ('bfloat16', 1):
        t = trainer(
            dict(model_type='gpt-micro', vocab_size=data.vocab_size, block_size=64),
            16,
            dtype=dtype,
            seed=seed,
            max_iters=steps,
            log_every=1,
            learning_rate=1e-3,
        )
        t.train_dataset = data
        t.run()
        curves[f'{dtype}, seed {seed}'] = np.array([r['loss'] for r in t.history])
    for k, v in curves.items():
        yield dict(what=k, losses=v.reshape(-1, steps // 10).mean(1).round(3).tolist())


def worker(args):
    "One of several processes, each with one thread: the first prints the seconds of a step."
    t = trainer(*(TINY['tiny'] if args.tiny else SHAPES['6 layers, 192 wide']))
    x, y = next(iter(t.batches()))
    times = alternate({OURS: lambda: t.step(x, y)}, 1 if args.tiny else 3)[OURS]
    if t.engine.rank == 0:
        print(statistics.median(times))
    t.engine.close()
    return ()


def processes(args):
    "The same global batch in one process and in more, up to one per core, each with one thread."
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    script = [__file__, 'worker', '--threads', '1', *['--tiny'] * args.tiny]
    counts, times = [n for n in (1, 2, 4, 8, 16) if n <= max(2, os.cpu_count())], {}
    for _ in range(1 if args.tiny else args.rounds):
        for n in counts:
            out = subprocess.run(
                [*launch, f'--nproc-per-node={n}', *script],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            times.setdefault(n, []).append(float(out.split()[-1]))
    for n in counts[1:]:
        yield from ratios(f'training step, {n} processes', {OURS: times[n], '1 process': times[1]})


def cuda(args):
    t = trainer(
        dict(
            model_type='gpt2',
            vocab_size=50304,
            block_size=1024,
            tie_weights=True,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        16,
        device='cuda',
        compile=True,
    )
    x, y = next(iter(t.batches()))
    for _ in range(5):
        t.step(x, y)
    t.iter_dt = statistics.median(alternate({OURS: lambda: t.step(x, y)}, args.rounds)[OURS])
    yield dict(what='124M, context 1024, compiled', **speed(t))


if __name__ == '__main__':
    main(
        __doc__,
        dict(
            steps=steps, processes=processes, worker=worker, widths=widths, losses=losses, cuda=cuda
        ),
        rounds=7,
        steps=(500, 'of losses'),
        only=('', 'part of the name of a shape'),
    )
