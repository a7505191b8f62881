"""What to expect of the training of chapter 13: seconds, bits per pixel and accuracy, for each
order in which the pixels can be read, with several seeds.

    # 2 seeds, one thread, about six minutes
    python benchmarks/pixels.py --json benchmarks/results/pixels-PROCESSOR.json
    python benchmarks/pixels.py --only raster --seeds 5

`so_far` is what the first 1, 2, .. 64 pixels of a test picture cost together, in bits.
"""

import math
import time

import torch
from common import main
from torch.nn import functional as F

from mingpt_nb import pixels
from mingpt_nb.book import cpu_name

ORDERS = 'raster', 'spiral', 'random'


def train(order, seed, tiny):
    "The trainer, after its run, as in the chapter."
    c = pixels.get_config()
    c.data.order, c.system.seed = order, seed
    c.trainer.merge_from_dict(dict(max_iters=400, device='cpu', progress=False, eval_every=None))
    if tiny:
        c.model.merge_from_dict(dict(n_layer=1, n_embd=16))
        c.trainer.max_iters = 3
    trainer = pixels.build(c)
    trainer.run()
    return trainer


@torch.no_grad()
def cost(model, data):
    "Bits of the first 1, 2, .. 64 pixels, on average: a list."
    logits = model.eval()(data.rows[:, :-1])[0]
    each = F.cross_entropy(logits.transpose(1, 2), data.rows[:, 1:], reduction='none')  # (N, 64)
    return [round(v, 3) for v in (each.mean(0).cumsum(0) / math.log(2)).tolist()]


def rows(args):
    for seed in range(args.seeds):
        for order in (o for o in ORDERS if args.only in o):
            wall, cpu = time.perf_counter(), time.process_time()
            trainer = train(order, seed, args.tiny)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            test = pixels.DigitImages(trainer.train_dataset.config, 'test')
            so_far = cost(trainer.model, test)
            p = pixels.recognise(trainer.model, test.pixels)
            yield dict(
                what=order,
                seed=seed,
                cpu=cpu_name(),
                steps=trainer.iter_num,
                wall_s=wall,
                cpu_s=cpu,
                bits=so_far[-1] / 64,
                right=(p.argmax(1) == test.digits).float().mean().item(),
                linear=pixels.logistic_regression(trainer.train_dataset, test),
                so_far=so_far,
            )


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        threads=1,
        only=('', 'part of an order: ' + ', '.join(ORDERS)),
        seeds=(2, 'runs of each'),
    )
