"""SmolLM2-135M learns to call a tool, and what that costs: sums in words before and after, what it
knew before, and whether its answers end. LoRA of chapter 11, on conversations of chapter 12.

    make weights && python benchmarks/chat.py --json benchmarks/results/chat-PROCESSOR.json

A part of each batch replays the model's own earlier answers, so that it keeps what it knew; half of
its questions are held out, and the loss on its own answers to these says what was forgotten.
"""

import random
import time
from functools import partial
from pathlib import Path

import torch
from common import main, peak_memory
from torch.utils.data import Dataset

from mingpt_nb.adder import add
from mingpt_nb.book import cpu_name
from mingpt_nb.chat import (
    ASK,
    SMALL_TALK,
    ChatDataset,
    chat_tokenizer,
    fill_up,
    made_up,
    rate,
    reply,
    says,
    split_sums,
    sum_talk,
)
from mingpt_nb.data import smollm2
from mingpt_nb.finetune import add_lora
from mingpt_nb.llama import Llama, load
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed

COUNTRIES = 'France Italy Spain Portugal Germany Poland Austria Norway Sweden Finland Denmark'
COUNTRIES += ' Ireland Greece Turkey Egypt Kenya India China Japan Korea Brazil Chile Peru Mexico'
THINGS = (
    'bread snow rain wind gold glass coffee honey bees cats dogs whales trees rivers books music'
)


def questions():
    "Questions of everyday kinds, in a fixed random order."
    found = [f'What is the capital of {c}?' for c in COUNTRIES.split()]
    found += [f'Write one sentence about {t}.' for t in THINGS.split()]
    random.Random(0).shuffle(found)
    return found


def lessons(pairs):
    "A conversation for each pair: a sum, asked in several ways; each eighth is small talk instead."
    rng, found = random.Random(0), []
    for k, pair in enumerate(pairs):
        asked, said = rng.choice(list(SMALL_TALK.items()))
        small = [says('user', asked), says('assistant', said)]
        found.append(small if k % 8 == 3 else sum_talk(*pair, rng.choice(ASK)))
    return found


def own_answers(model, tokenizer, asked, longest):
    "Conversations of one question and what the model says to it, if it comes to an end."
    told = reply(model, tokenizer, [[says('user', q)] for q in asked], longest)
    return [
        [says('user', q), says('assistant', text)]
        for q, (text, ended) in zip(asked, told)
        if ended and text
    ]


def kept(model, data):
    "Mean loss in nats for each token of the answers in a data set."
    total = count = 0
    with torch.no_grad():
        for x, y in data.rows:
            n = int((y != -1).sum())
            total += model(x[None], y[None])[1].item() * n
            count += n
    return total / count


class Mixed(Dataset):
    "Two data sets as one: in a batch, each `every`-th row is of the second."

    def __init__(self, new, replay, every):
        self.new, self.replay, self.every = new, replay, every
        self.tokenizer = new.tokenizer

    def __len__(self):
        return len(self.new)

    def __getitem__(self, i):
        return self.new[i]

    def row(self, place, i):
        if self.every and place % self.every == 0:
            return self.replay.rows[i % len(self.replay)]
        return self.new.rows[i]

    def __getitems__(self, ids):
        xs, ys = zip(*(self.row(place, i) for place, i in enumerate(ids)))
        width = max(map(len, xs))
        return fill_up(xs, 0, width), fill_up(ys, -1, width)


def tiny():
    "A model of random numbers, and a tokenizer, for `--tiny`."
    tokenizer = chat_tokenizer(made_up(split_sums()[0][:50]), 50)
    config = Llama.get_default_config()
    config.merge_from_dict(dict(n_layer=2, n_head=2, n_embd=32, block_size=256))
    config.vocab_size = max(tokenizer.decoder) + 1
    return Llama(config), tokenizer


def adapted(model, data, args):
    "Train in place, with LoRA; seconds, and the losses on the way."
    add_lora(model, r=args.rank, alpha=2 * args.rank)
    options = Trainer.get_default_config()
    options.merge_from_dict(dict(max_iters=args.steps, batch_size=8, learning_rate=args.rate))
    options.merge_from_dict(dict(lr_schedule='cosine', warmup_iters=5, device='cpu', seed=1))
    options.merge_from_dict(dict(weight_decay=0.0, log_every=5, dtype=args.dtype))
    trainer, start = Trainer(options, model, data), time.perf_counter()
    trainer.run()
    losses = [[row['iter'], round(row['loss'], 3)] for row in trainer.history if 'loss' in row]
    return time.perf_counter() - start, losses


def state(when, model, tokenizer, pairs, tools, own, prompts):
    "What the model can do, as a row."
    start = time.perf_counter()
    found = rate(model, tokenizer, pairs, tools, longest=20)
    told = reply(model, tokenizer, [[says('user', q)] for q in prompts], 32)
    said = {q: text for q, (text, _) in zip(prompts, told)}
    ended = sum(end for _, end in told) / len(told)
    return dict(
        what=when,
        **found,
        everyday_stopped=ended,
        kept_nats=kept(model, own),
        said=said,
        seconds=time.perf_counter() - start,
    )


PROMPTS = 'Who are you?', 'What is the capital of Italy?', 'What is 47 plus 38?', 'Thank you.'
PROMPTS += 'Name two colours.', 'Write one sentence about the sea.'


def rows(args):
    if args.tiny:
        (model, tokenizer), args.steps, args.sums = tiny(), 2, 4
    elif smollm2() is None:
        raise SystemExit('the weights are not in the cache: make weights')
    else:
        model, tokenizer = load(smollm2(), 'cpu')
    set_seed(1)
    folder = Path(__file__).parents[1] / 'nbs/playground/adder'
    tools = dict(add=partial(add, GPT.from_pretrained(folder)))
    train, test = split_sums(args.sums)
    asked = questions()[: 8 if args.tiny else None]
    own = own_answers(model, tokenizer, asked, 32)
    if args.tiny:  # it never ends
        own = [[says('user', q), says('assistant', 'x')] for q in asked]
    own = ChatDataset(own[::2], tokenizer), ChatDataset(own[1::2], tokenizer)
    yield dict(what='data', cpu=cpu_name(), replayed=len(own[0]), held_out=len(own[1]))
    if args.part != 'after':
        yield state('before', model, tokenizer, test, tools, own[1], PROMPTS)
    if args.part == 'before':
        return

    new = ChatDataset(lessons(train[: 8 * args.steps]), tokenizer)
    data = Mixed(new, own[0], args.every)
    tokens = sum(len(x) for x, _ in new.rows) / len(new)
    seconds, losses = adapted(model, data, args)
    how = dict(steps=args.steps, rank=args.rank, rate=args.rate, every=args.every)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield dict(
        what='training',
        **how,
        numbers=numbers,
        tokens_in_a_row=tokens,
        losses=losses,
        seconds=seconds,
        memory_mib=peak_memory(),
    )
    yield state('after', model, tokenizer, test, tools, own[1], PROMPTS)


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        steps=(16, 'of training, 8 conversations each'),
        sums=(200, 'held-out sums'),
        rank=(8, 'of LoRA'),
        rate=(2e-3, 'the learning rate'),
        part=('all', "'before' or 'after': half of it, in a process of its own"),
        every=(4, 'each so many-th row replays; 0: none'),
        dtype=('float32', 'of products, as for the trainer'),
    )
