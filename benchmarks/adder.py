"""Time to add: our `mingpt_nb.adder` against the naive loop, to 99% of the held-out 2-digit
problems, in one run.

    python benchmarks/adder.py [--ndigit 2] [--rounds 5] [--threads 1]

The naive version does what a direct implementation does: attention written out with a mask and a
softmax for each head's scores, problems made one by one from text, AdamW with a constant learning
rate of 5e-4, dropout 0.1, batches of 64. Both have the same sizes (gpt-nano), problems and test.
Ours has its default settings. Both are marked every 100 steps, the marking not being timed, until
they reach 99% or give up. The runs take turns, a seed for each round. Each has a process of its
own; the first row counts from the start of that process, imports included, the second the training
alone.
"""

import contextlib
import json
import math
import subprocess
import sys
import time

import torch
from common import OURS, main, ratios
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mingpt_nb.adder import AdditionDataset, accuracy, build, get_config
from mingpt_nb.utils import CfgNode, set_seed


class NaiveBlock(nn.Module):
    def __init__(self, C, n_head, T, drop=0.1):
        super().__init__()
        self.ln_1, self.ln_2, self.n_head = nn.LayerNorm(C), nn.LayerNorm(C), n_head
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.drop_att, self.drop_res = nn.Dropout(drop), nn.Dropout(drop)
        self.register_buffer('mask', torch.ones(T, T).tril().bool())

    def attend(self, x):
        B, T, C = x.shape
        q, k, v = (
            z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1)
        )  # (B, nh, T, hs)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        p = scores.masked_fill(~self.mask[:T, :T], -math.inf).softmax(-1)
        return self.proj((self.drop_att(p) @ v).transpose(1, 2).reshape(B, T, C))

    def gelu(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def forward(self, x):
        x = x + self.drop_res(self.attend(self.ln_1(x)))
        return x + self.drop_res(self.out(self.gelu(self.fc(self.ln_2(x)))))


class NaiveGPT(nn.Module):
    def __init__(self, T, V=10, C=48, n_layer=3, n_head=3):
        super().__init__()
        self.block_size = T
        self.tok, self.pos, self.drop = nn.Embedding(V, C), nn.Embedding(T, C), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[NaiveBlock(C, n_head, T) for _ in range(n_layer)])
        self.ln, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    std=0.02 / math.sqrt(2 * n_layer)
                    if name.endswith(('proj.weight', 'out.weight'))
                    else 0.02,
                )
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx):
        x = self.drop(self.tok(idx) + self.pos(torch.arange(idx.size(1))))
        return self.head(self.ln(self.blocks(x)))

    @torch.no_grad()
    def generate(self, idx, n):
        was_training = self.training
        self.eval()
        for _ in range(n):
            idx = torch.cat((idx, self(idx)[:, -1:].argmax(-1)), dim=1)
        self.train(was_training)
        return idx


class NaiveDataset(Dataset):
    "One problem at a time, by way of text."

    def __init__(self, ndigit, split):
        self.n, self.ixes = ndigit, AdditionDataset(CfgNode(ndigit=ndigit), split).ixes

    def __len__(self):
        return len(self.ixes)

    def __getitem__(self, i):
        a, b = divmod(self.ixes[i].item(), 10**self.n)
        digits = [
            int(d)
            for d in str(a).zfill(self.n)
            + str(b).zfill(self.n)
            + str(a + b).zfill(self.n + 1)[::-1]
        ]
        x, y = torch.tensor(digits[:-1]), torch.tensor(digits[1:])
        y[: 2 * self.n - 1] = -1
        return x, y


def naive(ndigit, seed, target, max_steps):
    """Seconds of training and steps until `target` of the held-out problems are right, and the
    accuracy reached."""
    set_seed(seed)
    data, test = NaiveDataset(ndigit, 'train'), AdditionDataset(CfgNode(ndigit=ndigit), 'test')
    model = NaiveGPT(3 * ndigit).train()
    decay = [
        p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(('tok', 'pos'))
    ]
    rest = [p for p in model.parameters() if all(p is not d for d in decay)]
    opt = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)],
        lr=5e-4,
        betas=(0.9, 0.95),
    )
    loader, seconds, start = (
        DataLoader(
            data, sampler=RandomSampler(data, replacement=True, num_samples=10**9), batch_size=64
        ),
        0.0,
        time.perf_counter(),
    )
    for step, (x, y) in enumerate(loader, 1):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 100 == 0 or step == max_steps:
            seconds += time.perf_counter() - start
            right = accuracy(model, test)
            if right >= target or step >= max_steps:
                return seconds, step, right
            start = time.perf_counter()


class Reached(Exception):
    "Enough problems are right."


def ours(ndigit, seed, target, max_steps):
    "The same of `mingpt_nb.adder` with its default settings."
    config = get_config()
    config.merge_from_dict(
        dict(
            system=dict(seed=seed),
            data=dict(ndigit=ndigit),
            trainer=dict(progress=False, device='cpu'),
        )
    )
    if max_steps < 800:
        config.trainer.max_iters = max_steps
    trainer, clock = build(config), dict(seconds=0.0, start=0.0)

    def mark(trainer):
        if (trainer.iter_num + 1) % 100 and trainer.iter_num + 1 < trainer.config.max_iters:
            return
        clock['seconds'] += time.perf_counter() - clock['start']
        clock.update(
            steps=trainer.iter_num + 1, right=accuracy(trainer.model, trainer.eval_dataset)
        )
        if clock['right'] >= target:
            raise Reached
        clock['start'] = time.perf_counter()

    trainer.add_callback('on_batch_end', mark)
    clock['start'] = time.perf_counter()
    with contextlib.suppress(Reached):
        trainer.run()
    return clock['seconds'], clock['steps'], clock['right']


def in_own_process(name, seed, args):
    """(seconds from its start, seconds of training, steps, share of the held-out problems that are
    right)"""
    start = time.perf_counter()
    argv = [
        sys.executable,
        __file__,
        '--only',
        name,
        '--seed',
        seed,
        *(f'--{k}={getattr(args, k)}' for k in ('threads', 'ndigit', 'target', 'max_steps')),
    ]
    out = subprocess.run(
        [str(a).replace('max_steps', 'max-steps') for a in argv],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    result = json.loads(out.splitlines()[-1])
    return time.perf_counter() - start - result.pop('marking'), *result.values()


def one(args):
    "Train once, and print what `in_own_process` wants to know."
    start = time.perf_counter()
    train, steps, right = (
        naive(args.ndigit, args.seed, args.target, args.max_steps)
        if args.only == 'naive'
        else ours(args.ndigit, args.seed, args.target, args.max_steps)
    )
    print(
        json.dumps(
            dict(marking=time.perf_counter() - start - train, train=train, steps=steps, right=right)
        )
    )


def rows(args):
    if args.only:
        return one(args)
    if args.tiny:
        args.max_steps, args.ndigit, args.rounds = 20, 1, 1
    runs = {'naive': [], OURS: []}
    for seed in range(args.rounds):
        for name in runs:
            runs[name].append(in_own_process(name, seed, args))
            print(
                'seed {}, {:9} {:5.1f} s from the start, {:5.1f} s training, {} steps, '
                '{:.1%} right'.format(seed, name, *runs[name][-1]),
                flush=True,
            )
    for i, what in enumerate(['adder to 99%, from process start', 'adder to 99%, training alone']):
        yield from ratios(
            what,
            {name: [r[i] for r in got] for name, got in runs.items()},
            per=1,
            unit='s',
            goal={'naive': 3.0} if i == 0 else None,
            steps=[r[2] for r in runs[OURS]],
            steps_theirs=[r[2] for r in runs['naive']],
            right=[r[3] for r in runs[OURS]],
            right_theirs=[r[3] for r in runs['naive']],
        )


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        threads=1,
        ndigit=(2, 'digits of each number'),
        target=(0.99, 'where both stop'),
        max_steps=(10000, 'where it gives up'),
        only=('', 'one of the two, for one seed'),
        seed=(0, 'with --only'),
    )
