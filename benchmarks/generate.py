"""Time per token of greedy text, of ours and of other programs, on the same random weights, taking
turns in one process.

    # GPT-2 124M in fp32 and bf16, a 6-layer 192-wide model, batches of 1 and 8
    python benchmarks/generate.py
    python benchmarks/generate.py --only small --rounds 9
    # with llama.cpp, if llama-cpp-python is installed, on a file of the same size
    python benchmarks/generate.py --only 124M --gguf gpt2-f32.gguf

Ours are `GPT.generate`, and `fast` of chapter 09 with the model's own weights, with 16 and with 8
bits. The others are Hugging Face's `generate`, in fp32 or bf16 as the model, and CTranslate2, if it
is installed, which is written in C++ for this one purpose. At batch 1 in float32 one more takes
part, which computes all positions again for each token, as minGPT does. Beside them stands the time
that reading all weights once takes on this machine, which no decoder that uses each weight for each
token can beat.
"""

import copy
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from common import OURS, alternate, main, ratios, seconds

from mingpt_nb.gpt2 import to_hf
from mingpt_nb.model import GPT
from mingpt_nb.speed import fast
from mingpt_nb.utils import need

GPT2 = dict(model_type='gpt2', vocab_size=50257, block_size=1024, tie_weights=True)
SMALL = dict(model_type='gpt-mini', vocab_size=65, block_size=256)
SHAPES = {
    '124M float32': (GPT2, torch.float32),
    '124M bfloat16': (GPT2, torch.bfloat16),
    'small float32': (SMALL, torch.float32),
}
TINY = {'tiny float32': (dict(model_type='gpt-nano', vocab_size=65, block_size=64), torch.float32)}
# (ours, peer): {start of the name: goal}; the first that fits counts
HF, CT2, CT2_INT8 = 'transformers', 'CTranslate2', 'CTranslate2 int8'
GOALS = {
    (OURS, HF): {'': 0.95},
    ('fast', HF): {
        'small float32, batch 1': 2.5,
        'small float32, batch 8': 1.6,
        '124M float32, batch 1': 1.3,
        '124M float32, batch 8': 1.15,
        '124M bfloat16, batch 1': 1.5,
    },
    ('fast', CT2): {'124M': 0.95},
    ('fast, 8 bits', HF): {'124M float32, batch 1': 2.5},
    ('fast, 8 bits', CT2_INT8): {'124M': 0.7},
}
PAIRS = [
    (OURS, (HF, 'minGPT-style')),
    ('fast', (HF, CT2, 'llama.cpp')),
    ('fast, 16 bits', (HF,)),
    ('fast, 8 bits', (HF, CT2_INT8)),
]


def make(sizes):
    config = GPT.get_default_config()
    config.merge_from_dict(sizes)
    torch.manual_seed(0)
    ours = GPT(config).eval()
    for p in ours.parameters():
        p.data.mul_(3)  # as sharp as a trained model, so that greedy text does not hang on rounding
    return ours


def naive(model, idx, n):
    "Greedy text with no cache."
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(-1)), dim=1)
    return idx


def ctranslate2(model, kind, threads):
    "A function (prompt, n) -> tokens of CTranslate2 on the same weights, or None without it."
    try:
        from ctranslate2 import Generator
        from ctranslate2.converters.transformers import GPT2Loader
    except ImportError:
        return None
    theirs = copy.deepcopy(to_hf(model))  # it changes the model that it converts
    names = {f't{i}': i for i in range(model.config.vocab_size)}
    ends = dict(unk_token='t0', bos_token='t0', eos_token='t0')
    spec = GPT2Loader()(theirs, SimpleNamespace(get_vocab=lambda: names, **ends))
    spec.validate()
    spec.optimize(quantization=kind)
    folder = tempfile.TemporaryDirectory()
    spec.save(folder.name)
    how = dict(compute_type=kind, intra_threads=threads, inter_threads=1)
    generator = Generator(folder.name, device='cpu', **how)

    def write(prompt, n):
        texts = [[f't{i}' for i in row] for row in prompt.tolist()]
        how = dict(max_length=n, min_length=n, beam_size=1, sampling_topk=1)
        found = generator.generate_batch(texts, include_prompt_in_result=False, **how)
        new = [f.sequences_ids[0] for f in found]
        return torch.cat((prompt, torch.tensor(new)), dim=1)

    write.folder = folder  # as long as the function lives
    return write


def llama_cpp(path, threads):
    "The same with llama.cpp and the weights of a file, or None without either; batch 1 only."
    try:
        llama = need('llama_cpp', 'llama-cpp-python') if path else None
        model = llama and llama.Llama(path, n_threads=threads, verbose=False)
    except (ImportError, ValueError, OSError):
        return None

    def write(prompt, n):
        steps = model.generate(prompt[0].tolist(), temp=0.0, reset=True)
        return torch.tensor([[*prompt[0].tolist(), *(next(steps) for _ in range(n))]])

    return write if model else None


def read_once(model, rounds=5):
    "Seconds to read every weight once: the sum of a tensor as large as the model, in float32."
    block = torch.ones(sum(p.numel() * p.element_size() for p in model.parameters()) // 4)
    return statistics.median(seconds(block.sum) for _ in range(rounds))


def programs(full, dtype, batch, args):
    "{name: function (prompt, n) -> tokens} of all that take part."
    ours = copy.deepcopy(full).to(dtype)
    theirs = to_hf(full).eval().to(dtype)

    def hf(prompt, n):
        how = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)

    found = {OURS: ours.generate, HF: hf}
    if dtype != torch.float32:
        return ours, found | {'fast': fast(full, bits=16).generate}
    found['fast'] = fast(full).generate
    if full.config.n_embd >= 256:
        found['fast, 16 bits'] = fast(full, bits=16).generate
        found['fast, 8 bits'] = fast(full, bits=8).generate
    if batch == 1:
        found['minGPT-style'] = lambda prompt, n: naive(ours, prompt, n)
        found['llama.cpp'] = llama_cpp(args.gguf, args.threads)
    found[CT2] = ctranslate2(full, 'float32', args.threads)
    if full.config.n_embd >= 256:
        found[CT2_INT8] = ctranslate2(full, 'int8', args.threads)
    return ours, {name: f for name, f in found.items() if f}


def compare(name, full, dtype, batch, new, args):
    draws = torch.Generator().manual_seed(1)
    prompt = torch.randint(full.config.vocab_size, (batch, 16), generator=draws)
    ours, found = programs(full, dtype, batch, args)
    start = time.perf_counter()
    with torch.inference_mode():
        fast_first = {n: f(prompt, 1) for n, f in found.items() if 'fast' in n}  # it chooses now
        chosen = time.perf_counter() - start if fast_first else 0
        times = alternate({n: lambda f=f: f(prompt, new) for n, f in found.items()}, args.rounds)
        texts = {n: f(prompt, new) for n, f in found.items()}
    once, what = read_once(ours), f'{name}, batch {batch}'
    for mine, peers in PAIRS:
        for peer in peers if mine in times else ():
            if peer not in times:
                continue
            goals = GOALS.get((mine, peer), {})
            goal = next((g for start, g in goals.items() if what.startswith(start)), None)
            yield from ratios(
                f'{"generate" if mine == OURS else mine}, {what}',
                {OURS: times[mine], peer: times[peer]},
                per=new * 1e-3,
                unit='ms/token',
                goal={peer: goal},
                same_tokens=(texts[mine] == texts[peer])[:, 16:].float().mean().item(),
                read_once_ms=1e3 * once,
                share_of_limit=once * new / statistics.median(times[mine]),
                seconds_to_choose=chosen,
            )


def rows(args):
    models = {}
    for name, (sizes, dtype) in (TINY if args.tiny else SHAPES).items():
        if args.only not in name:
            continue
        key = sizes['model_type']
        models = {key: models.get(key) or make(sizes)}  # one at a time
        for batch in map(int, args.batches.split(',')):
            new = 4 if args.tiny else args.new
            yield from compare(name, models[key], dtype, batch, new, args)


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        only=('', 'part of a model name'),
        batches=('1,8', 'sizes, with commas between'),
        new=(32, 'tokens to generate'),
        gguf=('', 'a GGUF file of the 124M model, for llama.cpp'),
    )
