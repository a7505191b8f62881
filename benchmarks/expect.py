"""What to expect of the trainings of chapters 03 and 04: time, losses and answers with several
seeds, one after the other.

    # 3 seeds, one thread, about five minutes
    python benchmarks/expect.py --json benchmarks/results/expect.json
    python benchmarks/expect.py --only sorting --seeds 5

The sorter is made by the cells of chapter 03 themselves, the adders by `mingpt_nb.adder` with its
own settings.
"""

import json
import time
import zlib
from pathlib import Path

import torch
from common import main

from mingpt_nb import adder
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed

CHAPTER = Path(__file__).parent.parent / 'nbs' / '03_trainer.ipynb'
CELLS = (
    'class SortDataset:',
    'train, test = SortDataset(',
    'def new_model(',
    'c = Trainer.get_default_config()\nc.merge_from_dict(dict(max_iters=1000',
)


def sorting(seed, steps):
    "Run the cells of chapter 03 that train its sorter, with another seed."

    class Seeded(Trainer):
        get_default_config = staticmethod(lambda: settings(Trainer.get_default_config(), seed=seed))

        def run(self):
            settings(self.config, max_iters=steps or self.config.max_iters)
            super().run()

    sources = [
        ''.join(c['source'])
        for c in json.loads(CHAPTER.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code'
    ]
    names = dict(
        GPT=GPT,
        Trainer=Seeded,
        torch=torch,
        zlib=zlib,
        set_seed=lambda _: set_seed(seed),
        print=lambda *args: None,
    )
    for start in CELLS:
        if 'SortDataset' in names:
            names['SortDataset'].__getitems__ = names[
                'SortDataset'
            ].__getitem__  # as the chapter has it by then
        exec(next(s for s in sources if s.startswith(start)), names)
    model, seqs = names['model'], names['test'].seqs
    right = (model.generate(seqs[:, :6], 6)[:, 6:] == seqs[:, 6:]).all(1).float().mean().item()
    return (
        names['trainer'],
        right,
        ' '.join(map(str, model.generate(torch.tensor([[2, 0, 1, 0, 2, 1]]), 6)[0, 6:].tolist())),
    )


def settings(config, **new):
    config.merge_from_dict(dict(progress=False, device='cpu') | new)
    return config


def adding(ndigit, a, b):
    def run(seed, steps):
        c = adder.get_config()
        c.merge_from_dict(
            dict(
                data=dict(ndigit=ndigit),
                system=dict(seed=seed),
                trainer=dict(progress=False, device='cpu', max_iters=steps),
            )
        )
        trainer = adder.build(c)
        trainer.run()
        return (
            trainer,
            adder.accuracy(trainer.model, trainer.eval_dataset),
            f'{a} + {b} = {adder.add(trainer.model, a, b)}',
        )

    return run


KINDS = {'sorting': sorting, '2 digits': adding(2, 47, 38), '3 digits': adding(3, 987, 45)}


def rows(args):
    for what, run in KINDS.items():
        if args.only not in what:
            continue
        for seed in range(args.seeds):
            start = time.perf_counter()
            trainer, right, text = run(seed, 5 if args.tiny else None)
            wall = time.perf_counter() - start
            losses, held = (
                [r[k] for r in trainer.history if k in r] for k in ('loss', 'eval_loss')
            )
            yield dict(
                what=what,
                seed=seed,
                steps=trainer.config.max_iters,
                batch_size=trainer.config.batch_size,
                wall_s=wall,
                first_loss=losses[0],
                last_loss=(held or losses)[-1],
                right=right,
                text=text,
            )


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        threads=1,
        only=('', 'part of a name: ' + ', '.join(KINDS)),
        seeds=(3, 'runs of each'),
    )
