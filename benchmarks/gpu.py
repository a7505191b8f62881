"""GPT-2 124M on a GPU, with random weights: greedy text, and steps of training.

    python benchmarks/gpu.py                 both
    python benchmarks/gpu.py write --json benchmarks/results/gpu.json

Text: `GPT.generate`, `fast` with 16 bits, the step of chapter 09 recorded as a CUDA graph, and
Hugging Face's `generate`, on the same weights, taking turns in one process. Training: tokens per
second of a compiled step in bfloat16, and the share of what the GPU could do (`mfu`).
"""

import copy
import statistics
import time

import torch
from common import OURS, alternate, main, ratios
from generate import GPT2, HF, make
from train import trainer

from mingpt_nb.gpt2 import to_hf
from mingpt_nb.scaling import speed
from mingpt_nb.speed import StaticStep, fast, write_static


def finished(job):
    "The job, and then all that it has started on the GPU."

    def run():
        out = job()
        torch.cuda.synchronize()
        return out

    return run


def write(args):
    full = make(GPT2).cuda()
    for dtype in torch.float32, torch.bfloat16:
        ours = copy.deepcopy(full).to(dtype)
        theirs = to_hf(full).eval().to(dtype).cuda()
        for batch in 1, 8:
            prompt = torch.randint(50257, (batch, 16), generator=torch.Generator().manual_seed(1))
            prompt, n = prompt.cuda(), args.new
            step = StaticStep(ours, batch, 16 + n)
            how = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
            how['attention_mask'] = torch.ones_like(prompt)
            quick = fast(ours)
            with torch.inference_mode():
                step.record()
                jobs = {
                    OURS: lambda: ours.generate(prompt, n),
                    'graph': lambda: write_static(step, prompt, n),
                    'fast': lambda: quick.generate(prompt, n),
                    HF: lambda: theirs.generate(prompt, **how),
                }
                texts = {name: job() for name, job in jobs.items()}
                times = alternate({k: finished(f) for k, f in jobs.items()}, args.rounds)
            what = f'124M {str(dtype)[6:]}, batch {batch}'
            for mine in OURS, 'fast', 'graph':
                yield from ratios(
                    f'{"generate" if mine == OURS else mine}, {what}',
                    {OURS: times[mine], HF: times[HF]},
                    per=n * 1e-3,
                    unit='ms/token',
                    same_tokens=(texts[mine] == texts[HF])[:, 16:].float().mean().item(),
                    device=torch.cuda.get_device_name(),
                )


def train(args):
    sizes = GPT2 | dict(vocab_size=50304, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    for compiled in False, True:
        t = trainer(sizes, 16, device='cuda', compile=compiled)
        t.prepare()
        batches, took = iter(t.batches()), []
        for _ in range(5 + args.rounds * 4):
            x, y = (z.to(t.device) for z in next(batches))
            torch.cuda.synchronize()
            start = time.perf_counter()
            t.step(x, y)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        t.iter_dt = statistics.median(took[5:])
        what = f'124M, 16 x 1024 tokens, bfloat16{", compiled" if compiled else ""}'
        memory = torch.cuda.max_memory_allocated() / 2**30
        name = torch.cuda.get_device_name()
        yield dict(what=what, **speed(t), peak_gib=memory, dtype=str(t.engine.dtype), device=name)


def both(args):
    yield from write(args)
    yield from train(args)


if __name__ == '__main__':
    main(__doc__, dict(both=both, write=write, train=train), new=(64, 'tokens to write'))
