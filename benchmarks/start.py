"""What it takes until the first token: installed size, imports, tokenizers, and 124M weights from a
folder.

    python benchmarks/start.py

Every measurement has a process of its own, and peers take turns. Importing: seconds inside Python,
without its own start. First word: import, load the vocabulary from a file and encode one word.
Loading: the same random GPT-2 124M, read from the folder until one token has gone through it, with
imports done before; memory is the peak above what the process held then. The files are in the page
cache.
"""

import os
import re
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections import defaultdict
from importlib import metadata
from importlib.util import find_spec

from common import OURS, fresh, main, peak_memory, ratios, seconds

IMPORTS = {
    'import mingpt_nb.bpe': {
        OURS: 'mingpt_nb.bpe',
        'tiktoken': 'tiktoken',
        'tokenizers': 'tokenizers',
        'transformers': 'transformers',
    },
    'import a GPT': {
        OURS: 'mingpt_nb.model',
        'torch alone': 'torch',
        'transformers': 'transformers.models.gpt2.modeling_gpt2',
    },
}
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FIRST_WORD = {
    OURS: 'from mingpt_nb.bpe import get_encoder; ids = get_encoder().encode(" word")',
    'tiktoken': f'''import tiktoken; from tiktoken.load import load_tiktoken_bpe
ranks = load_tiktoken_bpe(sys.argv[1])
special = {{"<|endoftext|>": 50256}}
e = tiktoken.Encoding("gpt2", pat_str={PATTERN!r}, mergeable_ranks=ranks, special_tokens=special)
ids = e.encode_ordinary(" word")''',
    'tokenizers': 'from tokenizers import Tokenizer; '
    'ids = Tokenizer.from_file(sys.argv[2]).encode(" word").ids',
}


def timed(code, *argv):
    "A function that runs `code` in a new process and returns the seconds it took there."
    script = (
        f'import sys, time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)'
    )
    return lambda: float(
        subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', script, *argv],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
    )


def in_turns(jobs, rounds):
    "As `alternate`, for functions that return the seconds themselves."
    for f in jobs.values():
        f()
    times = [[f() for f in jobs.values()] for _ in range(rounds)]
    return dict(zip(jobs, map(list, zip(*times))))


def needed(name, seen):
    "The installed distributions that `pip install name` brings, itself included."
    from packaging.requirements import Requirement

    name = re.sub('[-_.]+', '-', name).lower()
    if name in seen:
        return seen
    try:
        dist = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return seen
    seen[name] = dist
    for r in map(Requirement, dist.requires or []):
        if not r.marker or r.marker.evaluate({'extra': ''}):
            needed(r.name, seen)
    return seen


def size(dist):
    "MiB of the files that a distribution has installed."
    paths = (f.locate() for f in dist.files or [])
    return sum(os.path.getsize(p) for p in paths if os.path.exists(p)) / 2**20


def sizes():
    "The package itself counts as its folder, since here it may be installed from the source tree."
    own = os.path.dirname(find_spec('mingpt_nb').origin)
    own = (
        sum(
            os.path.getsize(os.path.join(d, f))
            for d, _, files in os.walk(own)
            for f in files
            if '__pycache__' not in d
        )
        / 2**20
    )
    mine, theirs = needed('mingpt-nb', {}), needed('torch', needed('transformers', {}))
    shared = {n for n in needed('torch', needed('numpy', {}))}
    for what, left_out in (
        ('installed, MiB', set()),
        ('installed without torch and numpy, MiB', shared),
    ):
        a, b = (
            sum(size(d) for n, d in dists.items() if n not in left_out and n != 'mingpt-nb')
            for dists in (mine, theirs)
        )
        yield dict(
            what=what,
            peer='transformers',
            unit='MiB',
            ours=own + a,
            theirs=b,
            ratio=b / (own + a),
            low=b / (own + a),
            high=b / (own + a),
            rounds=1,
            packages=len(mine),
            packages_theirs=len(theirs),
            goal=None,
        )


def load(peer, folder):
    "(seconds to load, seconds until one token has gone through, MiB above what was held before)"
    import torch

    if peer == OURS:
        from mingpt_nb.model import GPT as Model
    else:
        from transformers import GPT2LMHeadModel as Model
    before, got = peak_memory(), []
    read = seconds(lambda: got.append(Model.from_pretrained(folder)))
    with torch.inference_mode():
        first = seconds(lambda: got[0](torch.tensor([[1]])))
    return read, read + first, peak_memory() - before


def rows(args):
    if args.tiny:
        args.rounds = 1
    yield from sizes()
    for what, modules in IMPORTS.items():
        if args.tiny and what != 'import mingpt_nb.bpe':
            continue
        times = in_turns({peer: timed(f'import {m}') for peer, m in modules.items()}, args.rounds)
        yield from ratios(what, times, goal_s=0.3 if what.endswith('bpe') else None)
    with tempfile.TemporaryDirectory() as folder:
        yield from first_word(folder, args)
        yield from loading(folder, args)


def first_word(folder, args):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mingpt_nb.bpe import get_encoder

    ours, ranks, vocab = get_encoder(), f'{folder}/gpt2.tiktoken', f'{folder}/tokenizer.json'
    with open(ranks, 'wb') as f:
        for i, b in ours.token_bytes.items():
            if i not in ours.special_tokens.values():
                f.write(b64encode(b) + b' %d\n' % i)
    theirs = Tokenizer(models.BPE(ours.encoder, list(ours.bpe_ranks)))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(vocab)
    yield from ratios(
        'first word, tokenizer',
        in_turns(
            {peer: timed(code, ranks, vocab) for peer, code in FIRST_WORD.items()}, args.rounds
        ),
    )


def loading(folder, args):
    from mingpt_nb.model import GPT

    config = GPT.get_default_config()
    config.merge_from_dict(
        dict(
            model_type='gpt-nano' if args.tiny else 'gpt2',
            vocab_size=100 if args.tiny else 50257,
            block_size=1024,
            tie_weights=True,
        )
    )
    GPT(config).save_pretrained(folder)
    measured = defaultdict(list)
    with fresh(
        ['torch', 'mingpt_nb.gpt2', 'transformers.models.gpt2.modeling_gpt2'], args.threads
    ) as pool:
        for i in range(args.rounds + 1):
            for peer in OURS, 'transformers':
                result = pool.apply(load, (peer, folder))
                if i:
                    measured[peer].append(result)
    read, first, memory = (
        {peer: [m[i] for m in got] for peer, got in measured.items()} for i in range(3)
    )
    yield from ratios('from_pretrained', read)
    yield from ratios('from_pretrained, first token', first)
    if min(memory[OURS]) > 0:
        yield from ratios('memory of from_pretrained, MiB', memory, per=1, unit='MiB')


if __name__ == '__main__':
    main(__doc__, rows, rounds=7)
