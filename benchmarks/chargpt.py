"""Time to a held-out loss of 1.88 on tiny Shakespeare: our `mingpt_nb.chargpt` against a plain loop
with nanoGPT's CPU settings, in one run.

    python benchmarks/chargpt.py steps  [--threads 1]  s per step, one change added at a time
    python benchmarks/chargpt.py losses [--threads 1]  held-out loss after training, the same
    python benchmarks/chargpt.py sizes  [--threads 1]  loss, time, text of three model sizes
    python benchmarks/chargpt.py files  [--mb 200]     MB/s, peak memory of reading a large file

All models of `steps` and `losses` have 4 layers, 4 heads, width 128, windows of 64, batches of 12,
tied embeddings, no dropout. The plain loop: windows cut one by one and stacked, linear layers and
norms without biases, AdamW as torch makes it without being asked (a loop over the parameters), rate
1e-3 after 100 steps of warm-up, cosine to 1e-4 over 2000 steps, betas 0.9 and 0.99, clipping at 1,
the loss read at every step. Times are CPU time of the process (equal to elapsed time on an idle
machine with one thread) and elapsed time; medians. The loss is measured at 4800 windows spread
evenly over the last tenth of the text, not timed.
"""

import math
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from common import OURS, alternate, main, ratios
from torch import nn
from torch.nn import functional as F

from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.chargpt import CharDataset, build, get_config, muon_optimizer, write_text
from mingpt_nb.data import encode_file, english, fetch, file_characters, split
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.trainer import lr_at
from mingpt_nb.utils import CfgNode, set_seed

T, B = 64, 12


class PlainNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class PlainBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        lin = lambda a, b: nn.Linear(a, b, bias=False)
        self.n_head, self.ln_1, self.ln_2 = n_head, PlainNorm(C), PlainNorm(C)
        self.qkv, self.proj, self.fc, self.out = (
            lin(C, 3 * C),
            lin(C, C),
            lin(C, 4 * C),
            lin(4 * C, C),
        )

    def forward(self, x):
        q, k, v = (
            z.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for z in self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).flatten(-2))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, V, C=128, n_layer=4, n_head=4):
        super().__init__()
        self.wte, self.wpe, self.ln, self.head = (
            nn.Embedding(V, C),
            nn.Embedding(T, C),
            PlainNorm(C),
            nn.Linear(C, V, bias=False),
        )
        self.blocks = nn.Sequential(*[PlainBlock(C, n_head) for _ in range(n_layer)])
        self.wte.weight = self.head.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    std=0.02 / math.sqrt(2 * n_layer)
                    if name.endswith(('proj.weight', 'out.weight'))
                    else 0.02,
                )

    def forward(self, idx, targets):
        logits = self.head(
            self.ln(self.blocks(self.wte(idx) + self.wpe(torch.arange(idx.size(1)))))
        )
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def shakespeare():
    path = fetch('tinyshakespeare')
    tok = CharTokenizer(file_characters(path))
    return [
        CharDataset(CfgNode(block_size=T), part, tok)
        for part in split(encode_file(path, tok), (9, 1))
    ]


PLAIN = dict(
    learning_rate=1e-3,
    min_lr=1e-4,
    warmup_iters=100,
    max_iters=2000,
    lr_schedule='cosine',
    betas=(0.9, 0.99),
    weight_decay=0.1,
)
TUNED = dict(
    learning_rate=6e-3,
    min_lr=0.0,
    warmup_iters=20,
    max_iters=700,
    lr_schedule='cosine',
    betas=(0.9, 0.95),
    weight_decay=0.1,
)
RUNGS = [
    'plain loop',
    'one index for a batch',
    'fused AdamW',
    'our model and trainer',
    'dtype auto',
    'Muon',
]


class Loop:
    "The training loop with the first `rung` changes of RUNGS made; `step()` takes one step."

    def __init__(self, rung, data, seed=1337, **schedule):
        set_seed(seed)
        self.rung, self.data, self.i = rung, data, 0
        self.c = Trainer.get_default_config()
        self.c.merge_from_dict(
            dict(device='cpu', batch_size=B, seed=seed, progress=False)
            | (TUNED if rung == 5 else PLAIN)
            | schedule
        )
        if rung < 3:
            self.ids = data.ids.astype(np.int64) if rung else data.ids
            self.model, self.gen = PlainGPT(data.vocab_size), torch.Generator().manual_seed(seed)
            two = [
                [p for p in self.model.parameters() if (p.dim() == 2) is d] for d in (True, False)
            ]
            self.opt = torch.optim.AdamW(
                [dict(params=two[0], weight_decay=0.1), dict(params=two[1], weight_decay=0.0)],
                lr=1e-3,
                betas=self.c.betas,
                fused=True if rung == 2 else None,
            )
        else:
            conf = GPT.get_default_config()
            conf.merge_from_dict(
                dict(
                    model_type='gpt-micro',
                    vocab_size=data.vocab_size,
                    block_size=T,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    resid_pdrop=0.0,
                    tie_weights=True,
                )
            )
            if rung == 3:
                self.c.dtype = 'float32'
            self.trainer = Trainer(self.c, GPT(conf), data)
            self.model = self.trainer.model
            self.trainer.optimizer = (
                muon_optimizer(self.model, self.c)
                if rung > 4
                else self.model.configure_optimizers(self.c)
            )
            self.batches = iter(self.trainer.batches())

    def batch(self):
        starts = torch.randint(len(self.data), (B,), generator=self.gen)
        if self.rung:
            x, y = self.data.__getitems__(starts.numpy())
            return x, y
        x = torch.stack([torch.from_numpy(self.ids[i : i + T].astype(np.int64)) for i in starts])
        return x, torch.stack(
            [torch.from_numpy(self.ids[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )

    def step(self):
        if self.rung > 2:
            self.trainer.step(*next(self.batches))
            self.trainer.iter_num += 1
            return
        for g in self.opt.param_groups:
            g['lr'] = lr_at(self.i, self.c)
        loss = self.model(*self.batch())[1]
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        loss.item()
        self.i += 1


@torch.no_grad()
def held_loss(model, held, n=4800):
    starts = np.linspace(0, len(held) - 1, n).round().astype(int)
    model.eval()
    total = sum(
        model(*held.__getitems__(starts[i : i + 120]))[1].item() for i in range(0, n, 120)
    ) / (n // 120)
    model.train()
    return total


def clock(f):
    "Seconds of CPU time and of elapsed time that f() takes."
    cpu, wall = time.process_time(), time.perf_counter()
    f()
    return time.process_time() - cpu, time.perf_counter() - wall


def steps(args):
    """On CPython's help texts, which need no download: which text it is makes no difference to the
    time."""
    data, n = CharDataset(CfgNode(block_size=T), english()), 1 if args.tiny else 5
    loops = {rung: Loop(i, data) for i, rung in enumerate(RUNGS)}
    times = alternate(
        {rung: lambda loop=loop: [loop.step() for _ in range(n)] for rung, loop in loops.items()},
        args.rounds,
        time.process_time,
    )
    for rung in RUNGS[1:]:
        yield from ratios(
            f'character step, {rung}', {OURS: times[rung], RUNGS[0]: times[RUNGS[0]]}, per=n * 1e-3
        )


def losses(args):
    data, held = shakespeare()
    for rung, schedule in ((0, {}), (5, {}), (2, TUNED))[args.skip : args.skip + args.runs]:
        for seed in range(1337, 1337 + args.seeds):
            loop = Loop(rung, data, seed, **schedule)
            cpu, wall = clock(lambda: [loop.step() for _ in range(loop.c.max_iters)])
            yield dict(
                what=RUNGS[rung],
                seed=seed,
                steps=loop.c.max_iters,
                lr=loop.c.learning_rate,
                cpu_s=cpu,
                wall_s=wall,
                held_loss=held_loss(loop.model, held),
            )


def sizes(args):
    for name, block, batch, iters in (
        ('gpt-nano', 64, 12, 400),
        ('gpt-micro', 64, 12, 400),
        ('gpt-mini', 64, 12, 400),
    )[args.skip : args.skip + args.runs]:
        c = get_config()
        c.merge_from_dict(
            dict(
                data=dict(block_size=block),
                system=dict(work_dir=tempfile.mkdtemp()),
                model=dict(model_type=name, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
                trainer=dict(
                    device='cpu', batch_size=batch, max_iters=iters, progress=False, eval_every=None
                ),
            )
        )
        trainer = build(c)
        cpu, wall = clock(trainer.run)
        yield dict(
            what=name,
            params=sum(p.numel() for p in trainer.model.parameters()),
            block_size=block,
            batch_size=batch,
            steps=iters,
            cpu_s=cpu,
            wall_s=wall,
            held_loss=held_loss(trainer.model, trainer.eval_dataset),
            text=write_text(
                trainer.model, trainer.train_dataset.tokenizer, 'ROMEO:', 160, temperature=0.8
            ),
        )


def files(args):
    "Each file in a process of its own, so that its peak of memory is its own."
    code = (
        'import resource, sys, time; from mingpt_nb.chargpt import *; '
        'from mingpt_nb.bpe import CharTokenizer; '
        'from mingpt_nb.data import encode_file, file_characters; '
        'from mingpt_nb.utils import CfgNode; '
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; '
        'a = peak(); t = time.process_time(); '
        'tok = CharTokenizer(file_characters(sys.argv[1])); u = time.process_time(); '
        'ids = encode_file(sys.argv[1], tok, sys.argv[2]); v = time.process_time(); '
        'd = CharDataset(CfgNode(block_size=128), ids, tok); '
        'd.__getitems__(range(0, len(d), len(d) // 64)); '
        'print(u - t, v - u, (peak() - a) / 1024, len(d))'
    )
    english, mixed = (
        fetch('tinyshakespeare').read_bytes(),
        'Größe, цена, 価格, 🤗 and a price. '.encode(),
    )
    with tempfile.TemporaryDirectory() as d:
        for what, unit in ('ASCII', english), ('four alphabets', mixed * 20_000):
            with open(f'{d}/t', 'wb') as f:
                while f.tell() < args.mb * 1e6:
                    f.write(unit)
            mb = os.path.getsize(f'{d}/t') / 1e6
            chars, ids, mib, _ = map(
                float,
                subprocess.run(
                    [sys.executable, '-c', code, f'{d}/t', f'{d}/ids.bin'],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout.split(),
            )
            yield dict(
                what=what,
                mb=mb,
                cpu_s=chars + ids,
                mb_per_cpu_s=mb / (chars + ids),
                peak_mib_beyond_imports=mib,
            )


if __name__ == '__main__':
    main(
        __doc__,
        dict(steps=steps, losses=losses, sizes=sizes, files=files),
        threads=1,
        rounds=20,
        runs=(9, 'of losses and sizes'),
        skip=(0, 'so many of them'),
        seeds=(1, 'of losses'),
        mb=(200, 'of each file'),
    )
