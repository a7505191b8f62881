"""Property tests of mingpt_nb.bpe, against tiktoken and Hugging Face tokenizers where they are
installed."""

import json
import random
import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mingpt_nb import bpe, words
from mingpt_nb.files import TOKENIZER_FILES
from mingpt_nb.words import DATA, SHA256, english, read_data, split_words, unicode_ranges

try:
    import tiktoken
except ImportError:
    tiktoken = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
needs_tiktoken = pytest.mark.skipif(tiktoken is None, reason='tiktoken is not installed')
steady = lambda n: settings(derandomize=True, deadline=None, database=None, max_examples=n)

# every plane (all but the surrogates), and what usually goes wrong
ANY = st.text(st.characters(exclude_categories=['Cs']), max_size=60)
PIECES = [
    *" \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000",
    '\r\n',
    '  ',
    '\n\n',
    '    ',
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "'",
    '’s',
    'a',
    'Z',
    ' the',
    'don',
    'I',
    'é',
    'e\u0301',
    'ñ',
    'ß',
    'İ',
    'ﬁ',
    'ª',
    '中',
    '中文',
    'の',
    'ゴン',
    '한',
    'б',
    'ж',
    'ع',
    'ก็',
    'हि',
    '0',
    '9',
    '42',
    '½',
    'Ⅷ',
    '٣',
    '²',
    '①',
    '🤗',
    '👩‍👩‍👧',
    '👩🏽',
    '❤️',
    '🇫🇷',
    '\u200b',
    '\u200d',
    '\ufeff',
    '\ufffd',
    '\uffff',
    '!',
    '?!',
    '...',
    '$',
    '€',
    '_',
    '-',
    '—',
    '\x00',
    '\x7f',
    '\xad',
    '𝒙',
    '𝟙',
    '𐌰',
    '𠀀',
    '🄂',
    '\U0001f10d',
    '\U0001fbf0',
    '\U000e0041',
    '\U0003d000',
    '\U0010ffff',
    '<|endoftext|>',
    'aaaaaaaa',
    '--------',
    '        ',
]
MIXED = st.lists(st.sampled_from(PIECES), max_size=30).map(''.join)
RUNS = st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 150)), max_size=4).map(
    lambda runs: ''.join(c * n for c, n in runs)
)
TEXT = ANY | MIXED | RUNS


@pytest.fixture(scope='module')
def enc():
    return bpe.get_encoder()


@pytest.fixture(scope='module')
def small(enc):
    "The tokenizer of one screen, with GPT-2's merges."
    order = bpe.bytes_to_unicode()
    byte_of = {c: bytes([b]) for b, c in order.items()}
    merges = [tuple(b''.join(byte_of[c] for c in t) for t in pair) for pair in enc.bpe_ranks]
    return bpe.Tokenizer(merges, order)


@pytest.fixture(scope='module')
def peer(enc):
    ranks = {b: i for i, b in enc.token_bytes.items() if i != 50256}
    return tiktoken.Encoding(
        'gpt2-here', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=enc.special_tokens
    )


@pytest.fixture(scope='module')
def manual():
    return english()


# ---- the same ids as the others ------------------------------------------------------------------


@needs_tiktoken
@steady(3000)
@given(TEXT)
@example('')
@example("x's 'x \x1c's\x85\xa0 ")
def test_ids_are_tiktokens(enc, peer, text):
    assert enc.encode(text) == peer.encode_ordinary(text)
    assert enc.encode_and_show_work(text)['bpe_idx'] == peer.encode_ordinary(text)


@needs_tiktoken
def test_every_code_point_is_of_tiktokens_class(enc, peer):
    """Only what is neither letter nor number nor space keeps an apostrophe from its s. Another
    tiktoken may know newer characters."""
    kinds = {
        chr(c) for ranges in unicode_ranges().values() for a, b in ranges for c in range(a, b + 1)
    }
    for start in [*range(0, 0x34000, 0x400), 0x3D000, 0xE0000, 0xF0000, 0x10FC00]:
        chars = [chr(c) for c in range(start, start + 0x400) if not 0xD800 <= c < 0xE000]
        text = ''.join(f"{c}'s\n" for c in chars)
        if enc.encode(text) == peer.encode_ordinary(text):
            continue
        wrong = [c for c in chars if enc.encode(f"{c}'s") != peer.encode_ordinary(f"{c}'s")]
        assert wrong and not kinds & set(wrong), f'{[hex(ord(c)) for c in wrong]}'


@needs_tiktoken
@steady(300)
@given(
    st.lists(
        st.sampled_from(['<|endoftext|>', '<|endoftext', '|>', ' ', 'a', '\n', "'s", '中']),
        max_size=12,
    ).map(''.join)
)
def test_special_tokens_are_tiktokens(enc, peer, text):
    assert enc.encode(text) == peer.encode(text, disallowed_special=())
    for allowed in 'all', {'<|endoftext|>'}:
        assert enc.encode(text, allowed) == peer.encode(text, allowed_special=allowed)


@needs_tiktoken
def test_real_text(enc, peer, manual):
    for text in (
        manual,
        ' '.join(manual.split()),
        manual.replace(' ', '\u3000'),
        manual.replace('e', 'é'),
        manual.replace('. ', '.🤗 '),
    ):
        assert enc.encode(text) == peer.encode_ordinary(text)


@pytest.mark.skipif(tokenizers is None, reason='tokenizers is not installed')
def test_hugging_face_reads_what_we_save(enc, manual, tmp_path):
    own = bpe.train_bpe(manual[:100_000], 800)
    for ours in enc, own:
        ours.save(tmp_path)
        theirs = tokenizers.ByteLevelBPETokenizer.from_file(
            str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt')
        )
        assert theirs.encode(manual[:200_000]).ids == ours.encode(manual[:200_000])


# ---- there and back ------------------------------------------------------------------------------


@steady(1000)
@given(TEXT)
def test_round_trip(enc, text):
    assert enc.decode(enc.encode(text)) == text
    assert ''.join(split_words(text)) == text
    assert b''.join(enc.token_bytes[i] for i in enc.encode(text)) == text.encode()


@steady(500)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_decode(enc, ids):
    assert enc.decode(ids) == b''.join(enc.token_bytes[i] for i in ids).decode(
        'utf-8', errors='replace'
    )


@pytest.mark.parametrize(
    'ids, place', [([50257], 0), ([0, -1], 1), ([1, 2, 10**9], 2), ([None], 0), (['a'], 0)]
)
def test_ids_that_do_not_exist(enc, ids, place):
    with pytest.raises(ValueError, match=f'at place {place}'):
        enc.decode(ids)


@steady(300)
@given(
    st.text(st.sampled_from(['a', ' ', '中', '\ud800', '\udbff', '\udc00', '\udfff']), max_size=12)
)
def test_lone_surrogates(enc, text):
    replaced = ''.join('\ufffd' if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    assert enc.encode(text, errors='replace') == enc.encode(replaced)
    if replaced == text:
        return
    with pytest.raises(
        ValueError, match=f'at position {next(i for i, c in enumerate(text) if c != replaced[i])}:'
    ):
        enc.encode(text)


@pytest.mark.parametrize('text', [b'bytes', None, 3, ['a']])
def test_what_is_no_text(enc, text):
    with pytest.raises(TypeError, match='expected text'):
        enc.encode(text)


# ---- size ----------------------------------------------------------------------------------------


def seconds(f):
    start = time.process_time()
    f()
    return time.process_time() - start


@pytest.mark.parametrize(
    'alphabet', ['etaoinshrdlu', 'a', '中文字', '🤗😀', '!?', '0123456789', 'ab']
)
def test_long_words_take_linear_time(alphabet):
    word = lambda n: ''.join(random.Random(0).choices(alphabet, k=n))
    fresh = bpe.get_encoder()
    short, long = (
        min(seconds(lambda: fresh.encode(word(n))) for _ in range(3)) for n in (5_000, 50_000)
    )
    assert long < 30 * short + 0.05  # ten times the letters; n * n would be a hundred times
    assert fresh.decode(fresh.encode(word(50_000))) == word(50_000)


def test_the_cache_is_bounded():
    fresh = bpe.get_encoder()
    fresh.cache.limit = fresh.pieces.limit = 3000
    rng = random.Random(0)
    for _ in range(20):
        words = [f'{rng.getrandbits(60):x}' for _ in range(1000)] + [
            chr(rng.randrange(0x4E00, 0x9FFF)) * 3 for _ in range(1000)
        ]
        fresh.encode(' '.join(words))
        fresh.encode('中' * 1000 + 'a' * 1000)
        assert len(fresh.cache) <= 3000 and len(fresh.pieces) <= 3000
        assert (
            max(map(len, fresh.cache)) <= fresh.cache.longest
            and max(map(len, fresh.pieces)) <= fresh.pieces.longest
        )


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(SHA256))
@pytest.mark.parametrize(
    'damage',
    [
        lambda raw: raw[:-1],
        lambda raw: b'',
        lambda raw: raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:],
        lambda raw: b'<html>503</html>',
    ],
)
def test_damaged_data(name, damage, tmp_path):
    raw = (DATA / name).read_bytes()
    (tmp_path / name).write_bytes(raw)
    assert read_data(name, tmp_path) == read_data(name)
    (tmp_path / name).write_bytes(damage(raw))
    with pytest.raises(ValueError, match=f'checksum mismatch, {name}'):
        read_data(name, tmp_path)


def test_get_encoder_refuses_a_damaged_vocabulary(monkeypatch, tmp_path):
    (tmp_path / 'gpt2-vocab.bpe.bz2').write_bytes(b'not the vocabulary')
    monkeypatch.setattr(words, 'read_data', lambda name: read_data(name, tmp_path))
    with pytest.raises(ValueError, match='checksum mismatch'):
        bpe.get_encoder()


TRAINING = st.lists(
    st.sampled_from(['the cat ', 'that ', 'at ', 'aaaa ', 'é中 ', '🤗', '\n', '  ', 'bab']),
    min_size=1,
    max_size=40,
).map(''.join)


@steady(100)
@given(
    TRAINING, st.integers(0, 40), st.lists(st.sampled_from(['<a>', '<b c>', '<é>']), unique=True)
)
def test_save_and_load(tmp_path_factory, text, n_merges, special):
    ours = bpe.train_bpe(text, 256 + len(special) + n_merges, special)
    folder = tmp_path_factory.mktemp('tok')
    ours.save(folder)
    again = bpe.load_tokenizer(folder)
    assert (again.encoder, again.special_tokens, again.bpe_ranks) == (
        ours.encoder,
        ours.special_tokens,
        ours.bpe_ranks,
    )
    text += ''.join(special)
    assert again.encode(text, 'all') == ours.encode(text, 'all')
    assert again.decode(again.encode(text, 'all')) == text


@steady(100)
@given(st.text(min_size=1, max_size=40))
def test_characters_save_and_load(tmp_path_factory, text):
    tok = bpe.CharTokenizer.from_text(text)
    folder = tmp_path_factory.mktemp('chars')
    tok.save(folder)
    again = bpe.load_tokenizer(folder)
    assert again.stoi == tok.stoi and again.decode(again.encode(text)) == text


def test_half_a_tokenizer(enc, tmp_path):
    enc.save(tmp_path)
    (tmp_path / 'merges.txt').unlink()
    with pytest.raises(ValueError, match='is not one character'):
        bpe.load_tokenizer(tmp_path)
    enc.save(tmp_path)
    (tmp_path / 'vocab.json').write_text('{"a": 0, "b"')
    with pytest.raises(ValueError):
        bpe.load_tokenizer(tmp_path)
    (tmp_path / 'vocab.json').write_text(
        json.dumps({t: i for t, i in enc.encoder.items() if i < 50000}), encoding='utf-8'
    )
    with pytest.raises(ValueError, match='which the vocabulary lacks'):
        bpe.load_tokenizer(tmp_path)


def test_what_was_saved_last_is_loaded(enc, tmp_path):
    chars = bpe.CharTokenizer('abc')
    for old in TOKENIZER_FILES:
        for ours, files in (enc, ['merges.txt', 'vocab.json']), (chars, ['vocab.json']):
            (tmp_path / old).write_text('of an older tokenizer')
            for name in 'encoder.json', 'vocab.bpe':
                (tmp_path / name).write_text('')
            ours.save(tmp_path)
            assert sorted(p.name for p in tmp_path.iterdir()) == files
            assert type(bpe.load_tokenizer(tmp_path)) is type(ours)


def test_what_an_editor_does_to_a_file(enc, tmp_path):
    enc.save(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    assert bpe.load_tokenizer(tmp_path).encode('Hello world') == [15496, 995]


@pytest.mark.parametrize(
    'name, damage, message',
    [
        ('vocab.json', lambda raw: raw[:5000], 'vocab.json is not JSON'),
        ('vocab.json', lambda raw: b'[1, 2]', 'vocab.json should hold a JSON dict, not list'),
        ('vocab.json', lambda raw: b'{"a": "0"}', "vocab.json: the id of 'a' should be an integer"),
        (
            'vocab.json',
            lambda raw: b'{"a": 0, "b": 0, "ab": 1}',
            'vocab.json with merges.txt: two tokens of the vocabulary have the same id',
        ),
        (
            'merges.txt',
            lambda raw: b'\n'.join(raw.split(b'\n')[:20_000]),
            "vocab.json with merges.txt: no merge makes 'Ġ",
        ),
        ('merges.txt', lambda raw: b'a b\nab', 'merges.txt: line 2 of the merges'),
        ('merges.txt', lambda raw: b'a b\n\xff', 'merges.txt is not UTF-8'),
        (
            'merges.txt',
            lambda raw: b'<html> <head>\n',
            "vocab.json with merges.txt: merge 0 uses '<html>'",
        ),
    ],
)
def test_damaged_tokenizers(enc, tmp_path, name, damage, message):
    enc.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        bpe.load_tokenizer(tmp_path)
    assert f'{tmp_path}/{message}'.replace('\\', '/') in str(error.value).replace('\\', '/')


def test_characters_out_of_order(tmp_path):
    for text, message in (
        ('{"b": 0, "a": 1}', 'it does not number its characters in their order'),
        ('{"ab": 0}', "'ab' is not one character"),
    ):
        (tmp_path / 'vocab.json').write_text(text)
        with pytest.raises(ValueError, match=f'vocab.json: {message}'):
            bpe.load_tokenizer(tmp_path)


def test_openais_names(enc, tmp_path):
    enc.save(tmp_path)
    (tmp_path / 'merges.txt').rename(tmp_path / 'vocab.bpe')
    (tmp_path / 'vocab.json').rename(tmp_path / 'encoder.json')
    assert bpe.load_tokenizer(tmp_path).encode('Hello world') == [15496, 995]


def test_an_added_word_that_is_an_ordinary_token(enc):
    "It is cut out of words, wherever it stands."
    vocab, merges = enc.encoder, list(enc.bpe_ranks)
    hello = bpe.Encoder(vocab, merges, ['Hello'])
    assert hello.encode('OHello') == [*enc.encode('O'), 15496]
    assert hello.decode(hello.encode('OHello é')) == 'OHello é'


@steady(300)
@given(TEXT)
def test_the_small_tokenizer_gives_the_same_ids(enc, small, text):
    assert small.encode(text) == enc.encode(text)


# ---- training ------------------------------------------------------------------------------------


def learn_naive(counts, n_merges):
    words, merges = {tuple(w): n for w, n in counts.items()}, []
    for _ in range(n_merges):
        pairs = {}
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs or max(pairs.values()) < 2:
            break
        merges.append(min(pairs, key=lambda p: (-pairs[p], p)))
        words = {bpe.merge_pair(word, merges[-1]): n for word, n in words.items()}
    return merges


@steady(300)
@given(
    st.dictionaries(st.text('abc', min_size=1, max_size=14), st.integers(1, 9), max_size=12),
    st.integers(0, 40),
)
def test_training_counts_right(counts, n_merges):
    assert bpe.learn_merges(counts, n_merges) == learn_naive(counts, n_merges)


@steady(100)
@given(TRAINING)
def test_learned_tokens_are_words_of_their_own(text):
    ours = bpe.train_bpe(text, 320, ())
    for i in range(256, ours.vocab_size):
        assert list(ours.merge_bytes(ours.token_bytes[i])) == [i]


@steady(200)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12),
    st.text('abc', max_size=150),
)
def test_hand_made_merges(picks, word):
    "Any list whose merges come after their parts gives what merging in order of rank gives."
    tokens, merges = ['a', 'b', 'c'], []
    for a, b in picks:
        pair = tokens[a % len(tokens)], tokens[b % len(tokens)]
        if ''.join(pair) not in tokens:
            merges.append(pair)
            tokens.append(''.join(pair))
    ours = bpe.Encoder({t: i for i, t in enumerate(tokens)}, merges)
    expected = tuple(word)
    for pair in merges:
        expected = bpe.merge_pair(expected, pair)
    assert [ours.decoder[i] for i in ours.merge_bytes(word.encode())] == list(expected)
    assert tuple(ours.bpe(word).split()) == expected


# ---- importing -----------------------------------------------------------------------------------


def test_import_brings_no_torch():
    code = (
        "import sys, mingpt_nb.bpe as bpe\n"
        "assert bpe.get_encoder().encode('naïve 🤗') == [2616, 38776, 12520, 97, 245]\n"
        "heavy = {'torch', 'numpy', 'requests', 'matplotlib', 'mingpt_nb.utils'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
