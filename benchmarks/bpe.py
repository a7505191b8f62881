"""Speed of mingpt_nb.bpe against tiktoken and Hugging Face tokenizers: the same text, one process,
one thread, cold caches.

    # ten MB of English from the docstrings of the installed packages
    python benchmarks/bpe.py
    python benchmarks/bpe.py --file book.txt   # the first ten MB of a UTF-8 text of yours
    python benchmarks/bpe.py --load            # count the making of each encoder too

Each round makes a new encoder, so no cache survives; the encoders take turns. The seconds are those
of the processor (time.process_time), all threads together, so that other programs on the machine
disturb less. The ids must be equal, or the script fails. Without --file the English text is the
manual behind help() and the docstrings of the standard library and of site-packages, each docstring
once: technical prose, rich in names, which is harder on a cache than novels are. Its characters are
ASCII in the first row, as they come in the second. Decoding is of the ids of the second text.
"""

import ast
import os
import random
import sysconfig
import time
import warnings

os.environ.update(TOKENIZERS_PARALLELISM='false', RAYON_NUM_THREADS='1')
from array import array
from pathlib import Path

from common import OURS, main, ratios, seconds

from mingpt_nb.bpe import get_encoder

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def docstrings(path):
    "The docstrings of one Python file that are longer than a line."
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 100:
                yield doc


def english(size):
    "About `size` characters of English, no docstring twice."
    from pydoc_data.topics import topics

    texts, seen, n = list(topics.values()), set(), 0
    folders = [Path(sysconfig.get_path('stdlib')), Path(sysconfig.get_path('purelib'))]
    files = [
        f
        for folder in folders
        for f in sorted(folder.rglob('*.py'))
        if folder == folders[1] or 'site-packages' not in f.parts
    ]
    for doc in (doc for f in files for doc in docstrings(f)):
        if doc in seen:
            continue
        seen.add(doc)
        texts.append(doc)
        n += len(doc)
        if n > size:
            break
    return '\n\n'.join(texts)[:size]


def source(size):
    "Python source of the standard library."
    texts, n = [], 0
    for f in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py')):
        texts.append(f.read_text(encoding='utf-8', errors='replace'))
        n += len(texts[-1])
        if n > size:
            break
    return '\n'.join(texts)[:size]


def made_up(size, seed=0):
    "{name: text} for what is not English; words of each text follow Zipf's law."
    rng = random.Random(seed)

    def text(alphabet, length, joiner, end, n_words=20000):
        words = [''.join(rng.choices(alphabet, k=rng.randint(*length))) for _ in range(n_words)]
        picked = rng.choices(
            words, [1 / (i + 1) for i in range(n_words)], k=size // (sum(length) // 2 + len(joiner))
        )
        return joiner.join(w + (rng.choice(end) if rng.random() < 0.1 else '') for w in picked)[
            :size
        ]

    han = [chr(c) for c in range(0x4E00, 0x4E00 + 3000)]
    emoji = ['😀', '🤗', '🎉', '❤️', '👩‍👩‍👧', '👍🏽', '🇫🇷', '✨', 'ok', 'so ']
    return {
        'Chinese': text(han, (1, 3), '', '，。、\n'),
        'Russian': text('абвгдежзиклмнопрстуфхцчшыьэюя', (2, 9), ' ', ',.\n'),
        'emoji': text(emoji, (1, 3), ' ', '!\n'),
        'all different': ' '.join(f'{rng.getrandbits(40):x}' for _ in range(size // 11)),
        'one long word': ''.join(rng.choices('etaoinshrdlucmfwyp', k=size // 10)),
        'rare letters': text([chr(c) for c in range(0x10400, 0x10450)], (2, 9), ' ', '.\n'),
    }


def makers():
    """{name: function that makes a new encoder and returns (encode, how to read the ids from what
    it returns, decode)}"""
    ours = get_encoder()
    ranks = {b: i for i, b in ours.token_bytes.items() if i not in ours.special_tokens.values()}
    merges = list(ours.bpe_ranks)

    def mingpt_nb():
        enc = get_encoder()
        return enc.encode, list, enc.decode

    made = {OURS: mingpt_nb}
    try:
        import tiktoken

        def openai():
            enc = tiktoken.Encoding(
                'gpt2', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ours.special_tokens
            )
            return enc.encode_ordinary, list, enc.decode

        made['tiktoken'] = openai
    except ImportError:
        print('tiktoken is not installed')
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        def hugging_face():
            tok = Tokenizer(models.BPE(ours.encoder, merges))
            tok.pre_tokenizer, tok.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
            return tok.encode, lambda encoding: encoding.ids, tok.decode

        made['tokenizers'] = hugging_face
    except ImportError:
        print('tokenizers is not installed')
    return made


def encoding(text, makers, args):
    "{name: [seconds]}, taking turns, a new encoder each time; fails where the ids differ."
    times, expected = {name: [] for name in makers}, None
    for counts in [False] + [True] * args.rounds:  # patterns are compiled in the first round
        for name, make in makers.items():
            start = time.process_time()
            encode, read, _ = make()
            if not args.load:
                start = time.process_time()
            result = encode(text)
            if counts:
                times[name].append(time.process_time() - start)
            found = array('I', read(result))
            expected = expected or found
            if found != expected:
                raise SystemExit(f'{name} gives other ids')
            del encode, result, read
    return times


def decoding(text, makers, args):
    "The same for decoding the ids of `text`."
    ids, times = get_encoder().encode(text), {name: [] for name in makers}
    for _ in range(args.rounds):
        for name, make in makers.items():
            decode, found = make()[2], []
            times[name].append(seconds(lambda: found.append(decode(ids)), time.process_time))
            if found[0] != text:
                raise SystemExit(f'{name} gives another text')
    return times


def rows(args):
    warnings.simplefilter('ignore')  # of the sources that are read
    size, all_makers = min(args.size, 20_000) if args.tiny else args.size, makers()
    if args.file:
        texts = {Path(args.file).name[:16]: Path(args.file).read_text(encoding='utf-8')[:size]}
    else:
        text = english(int(size * 1.01))
        texts = {
            'English, ASCII': text.encode('ascii', 'ignore').decode()[:size],
            'English': text[:size],
        }
        if args.tiny:
            texts = dict(list(texts.items())[1:])
        elif not args.english_only:
            texts |= {'Python source': source(size // 10)} | made_up(size // 10)
    for name, text in texts.items():
        mb, times = len(text.encode()) / 1e6, encoding(text, all_makers, args)
        yield from ratios(
            f'encode, {name}',
            times,
            goal={'tiktoken': 1.0 if name.startswith('English') else 0.5},
            mb=mb,
        )
    for name in list(texts)[-1:] if len(texts) == 1 else ['English']:
        yield from ratios(
            f'decode, {name}',
            decoding(texts[name], all_makers, args),
            mb=len(texts[name].encode()) / 1e6,
        )


if __name__ == '__main__':
    main(
        __doc__,
        rows,
        threads=1,
        file=('', 'a UTF-8 text to measure on instead'),
        size=(10_000_000, 'characters of English (10 million); a tenth of it for the others'),
        load=(False, 'count the making of each encoder'),
        english_only=(False, 'no other texts'),
    )
