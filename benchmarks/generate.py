"""Time per token of our `generate` and of Hugging Face's, greedy, on the same random weights,
taking turns in one process.

    # GPT-2 124M in fp32 and bf16, a 6-layer 192-wide model, batches of 1 and 8
    python benchmarks/generate.py
    python benchmarks/generate.py --only small --rounds 9

At batch 1 in float32 a third one takes part, which computes all positions again for each token, as
minGPT does. Beside them the time that reading all weights once takes on this machine, which no
decoder that uses each weight for each token can beat.
"""

import statistics

import torch
from common import OURS, alternate, main, ratios, seconds

from mingpt_nb.gpt2 import to_hf
from mingpt_nb.model import GPT

GPT2 = dict(model_type='gpt2', vocab_size=50257, block_size=1024, tie_weights=True)
SHAPES = {
    '124M float32': (GPT2, torch.float32),
    '124M bfloat16': (GPT2, torch.bfloat16),
    'small float32': (dict(model_type='gpt-mini', vocab_size=65, block_size=256), torch.float32),
}
GOALS = {('small float32', 1): 2.0}  # times Hugging Face; for all others 1.3
TINY = {'tiny float32': (dict(model_type='gpt-nano', vocab_size=65, block_size=64), torch.float32)}


def make(sizes, dtype):
    config = GPT.get_default_config()
    config.merge_from_dict(sizes)
    torch.manual_seed(0)
    ours = GPT(config).eval()
    for p in ours.parameters():
        p.data.mul_(3)  # as sharp as a trained model, so that greedy text does not hang on rounding
    return ours.to(dtype), to_hf(ours).eval().to(dtype)


def naive(model, idx, n):
    "Greedy text with no cache."
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(-1)), dim=1)
    return idx


def read_once(model, rounds=5):
    "Seconds to read every weight once: the sum of a tensor as large as the model, in float32."
    block = torch.ones(sum(p.numel() * p.element_size() for p in model.parameters()) // 4)
    return statistics.median(seconds(block.sum) for _ in range(rounds))


def compare(name, ours, theirs, batch, new, rounds):
    prompt = torch.randint(
        ours.config.vocab_size, (batch, 16), generator=torch.Generator().manual_seed(1)
    )
    greedy = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    jobs = {
        OURS: lambda: ours.generate(prompt, new),
        'transformers': lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), **greedy
        ),
    }
    if batch == 1 and 'float32' in name:
        jobs['minGPT-style'] = lambda: naive(ours, prompt, new)
    with torch.inference_mode():
        times = alternate(jobs, rounds)
        same = (jobs[OURS]() == jobs['transformers']()).float().mean().item()
    once = read_once(ours)
    yield from ratios(
        f'generate, {name}, batch {batch}',
        times,
        per=new * 1e-3,
        unit='ms/token',
        goal={'transformers': GOALS.get((name, batch), 1.3)},
        same_tokens=same,
        read_once_ms=1e3 * once,
        share_of_limit=once * new / statistics.median(times[OURS]),
        share_goal=0.6 if (name, batch) == ('124M float32', 1) else None,
    )


def rows(args):
    for name, shape in (TINY if args.tiny else SHAPES).items():
        if args.only not in name:
            continue
        models = make(*shape)
        for batch in map(int, args.batches.split(',')):
            yield from compare(name, *models, batch, 4 if args.tiny else args.new, args.rounds)


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        only=('', 'part of a model name'),
        batches=('1,8', 'sizes, with commas between'),
        new=(32, 'tokens to generate'),
    )
