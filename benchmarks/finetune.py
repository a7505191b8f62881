"""What SmolLM2-135M learns and forgets when it is taught two-digit sums, by rate, share of replay
and what of it learns; and what a step costs.

    make weights && python benchmarks/finetune.py --json benchmarks/results/finetune.json
    python benchmarks/finetune.py costs --json benchmarks/results/finetune-costs.json
    python benchmarks/finetune.py text --steps 40 --json benchmarks/results/finetune-text.json

`forgets`: questions like "What is 47 + 38?" in the model's chat template, with the split of chapter
04, so that no sum of the training is asked later; `--steps` steps of `--batch` rows in float32, one
seed. Measured: the share of `--sums` held-out sums whose answer is right to its end; the loss on
answers that the model itself gave to other questions before; its answers to fixed questions.
Replayed are its answers to questions that are not measured.

`costs`, each in a process of its own: processor seconds of a step of 2 rows of 256 tokens, the
most MiB that the process held, and bytes on the disk of what was learnt and of a checkpoint.

`text`: the command, on the first `--characters` of Python's manual: the losses on the last tenth
before, while and after, seconds from the first step to the last, and samples before and after.
"""

import io
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from common import fresh, main, peak_memory

from mingpt_nb.adder import AdditionDataset
from mingpt_nb.book import cpu_name
from mingpt_nb.data import TokenDataset, smollm2
from mingpt_nb.finetune import (
    END_OF_TURN,
    Mixture,
    Pairs,
    Tuner,
    add_lora,
    bytes_of,
    own_answers,
    question_ids,
)
from mingpt_nb.finetune import main as finetune
from mingpt_nb.llama import load
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed
from mingpt_nb.words import english

REPLAY = """What is the capital of Italy?|What colour is the sky?|Name a fruit.|Who wrote Hamlet?
What is water made of?|How many days has a week?|Name an animal that can fly.|What do bees make?
What is the opposite of hot?|Where do fish live?|What language is spoken in Spain?|Name a planet.
What does a baker do?|What is snow?|Name a musical instrument.|When do we have breakfast?
Say hello to my friend.|What is a triangle?|What is the largest ocean?|Name a tree."""
KEPT = """What is the capital of France?|What is the opposite of big?|What do cows eat?
Name a colour.|Who painted the Mona Lisa?|What is the moon?|How are you?|What is a book?"""
split = lambda text: [q.strip() for q in text.replace('\n', '|').split('|')]
#: what learns (None: all weights), the rate, the share of replay
RUNS = [
    ('all linear layers', 2e-3, 0),
    ('all linear layers', 1e-3, 0.25),
    ('all linear layers', 1e-3, 0),
    ('all linear layers', 2e-3, 0.25),
    ('all weights', 1e-4, 0),
    ('all linear layers', 5e-4, 0),
    ('q_proj, v_proj', 2e-3, 0),
    ('all linear layers', 5e-4, 0.25),
    ('all linear layers', 2e-3, 0.5),
    ('all linear layers', 1e-3, 0.5),
]


def sums(tokenizer, part, n=None):
    "Pairs of ids: what is asked, and the answer."
    end = tokenizer.special_tokens[END_OF_TURN]
    config = AdditionDataset.get_default_config()
    for i in AdditionDataset(config, part).ixes[:n].tolist():
        a, b = divmod(i, 100)
        question = question_ids(tokenizer, f'What is {a} + {b}?')
        yield question, [*tokenizer.encode(str(a + b)), end]


def base():
    path = smollm2()
    if path is None:
        raise SystemExit('the weights are not in the cache: make weights')
    return load(path, 'cpu')


@torch.no_grad()
def right(model, pairs):
    out = model.generate([q for q, _ in pairs], 4, stop_tokens=pairs[0][1][-1])
    return sum(o[len(q) :].tolist()[: len(a)] == a for o, (q, a) in zip(out, pairs)) / len(pairs)


def learners(model, what):
    "Let that part of the model learn; how many numbers that are."
    if what != 'all weights':
        targets = None if what.startswith('all') else what.split(', ')
        add_lora(model, r=8, alpha=16, targets=targets)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def forgets(args):
    model, tok = base()
    replay = own_answers(model, tok, split(REPLAY), 10)
    kept = Pairs(own_answers(model, tok, split(KEPT), 16))
    test, train = list(sums(tok, 'test', args.sums)), list(sums(tok, 'train'))
    c = settings(max_iters=1, batch_size=8)
    look = Trainer(c, model, kept)

    def after(trainer):
        said = own_answers(trainer.model, tok, split(KEPT)[:4], 12)
        end = f'{END_OF_TURN}'
        return dict(
            right=right(trainer.model, test),
            kept=trainer.eval(kept),
            says=[tok.decode(a).replace(end, '') for _, a in said],
        )

    yield dict(what='before', cpu=cpu_name(), questions=split(KEPT)[:4], **after(look))
    runs = [r for r in RUNS if args.only in r[0]]
    for what, rate, share in runs[args.skip :][: args.runs]:
        model, tok = base()
        set_seed(1)
        learn = learners(model, what)
        length = max(len(q) + len(a) for q, a in train + (replay if share else [])) - 1
        data = Mixture(Pairs(train, length), Pairs(replay, length) if share else [], share)
        c = settings(max_iters=args.steps, batch_size=args.batch, learning_rate=rate)
        trainer, start = Trainer(c, model, data), time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - start
        yield dict(
            what=what,
            rate=rate,
            share=share,
            learn=learn,
            steps=args.steps,
            batch=args.batch,
            length=length,
            seconds=seconds,
            loss=[r['loss'] for r in trainer.history if 'loss' in r],
            **after(trainer),
        )


COSTS = {  # what learns: (rank, work blocks out again?)
    'all weights': (0, False),
    'LoRA, r = 8': (8, False),
    'LoRA, r = 8, blocks again': (8, True),
}


def costs(args):
    for what in COSTS:
        with fresh(['torch', 'mingpt_nb.finetune'], args.threads) as pool:
            row = pool.apply(cost, (what, args.threads))
        yield dict(what=what, cpu=cpu_name(), rows=2, tokens=256, **row)


def cost(what, threads):
    "Three steps; the first is not timed."
    torch.set_num_threads(threads)
    (r, again), (model, tok) = COSTS[what], base()
    loaded, times = peak_memory(), []
    if r:
        add_lora(model, r=r, alpha=16)
    ids = np.random.default_rng(0).integers(49152, size=5000).astype(np.uint16)
    trainer = Tuner(settings(max_iters=3, batch_size=2), model, TokenDataset(ids, 256, tok))
    trainer.recompute = again
    trainer.add_callback('on_step_end', lambda t: times.append(time.process_time()))
    trainer.run()
    memory = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        place = trainer.save_checkpoint(Path(folder, 'checkpoint'))
        checkpoint = sum(f.stat().st_size for f in place.iterdir())
        learnt = (place / 'model.safetensors').stat().st_size
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = (times[-1] - times[0]) / 2
    return dict(
        learn=learn, step=step, loaded=loaded, memory=memory, learnt=learnt, checkpoint=checkpoint
    )


def text(args):
    with tempfile.TemporaryDirectory() as folder:
        file, out, at = Path(folder, 'text.txt'), io.StringIO(), []
        file.write_text(english()[: args.characters], encoding='utf-8')
        options = [f'--system.work_dir={folder}/run', '--trainer.progress=false']
        options += [f'--trainer.max_iters={args.steps}', '--trainer.dtype=float32']
        options += [
            f'--system.threads={args.threads}',
            '--trainer.log_every=1',
            '--sample.length=24',
        ]
        run = Tuner.run

        def timed(trainer):
            trainer.add_callback('on_step_end', lambda t: at.append(time.perf_counter()))
            at.append(time.perf_counter())
            run(trainer)

        Tuner.run = timed
        with redirect_stdout(out):
            trainer = finetune([str(file), '--trainer.device=cpu', *options])
        held = trainer.eval_dataset
        size = len(held.ids), bytes_of(held.tokenizer, held.ids)
    says = [line[3:-1] for line in out.getvalue().splitlines() if line[:3] in ("  '", '  "')]
    yield dict(
        what='the manual of Python',
        cpu=cpu_name(),
        threads=args.threads,
        characters=args.characters,
        steps=args.steps,
        tokens=args.steps * trainer.config.batch_size * held.block_size,
        learn=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        before=trainer.history[0]['before'],
        evals=[(r['iter'] + 1, r['eval_loss']) for r in trainer.history if 'eval_loss' in r],
        held=size,
        seconds=at[-1] - at[0],
        says=says,
    )


def settings(**more):
    c = Trainer.get_default_config()
    c.merge_from_dict(dict(device='cpu', dtype='float32', seed=1, weight_decay=0.0, log_every=1))
    c.merge_from_dict(dict(lr_schedule='cosine', warmup_iters=3, progress=False) | more)
    return c


if __name__ == '__main__':
    main(
        __doc__,
        dict(forgets=forgets, costs=costs, text=text),
        steps=(30, 'steps of each run'),
        batch=(12, 'rows in a step'),
        sums=(60, 'held-out sums that are asked'),
        only=('', 'part of what learns'),
        skip=(0, 'so many runs'),
        runs=(99, 'so many runs after them'),
        characters=(200_000, 'of `text`'),
    )
