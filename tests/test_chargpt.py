"""What a cell of chapter 06 cannot show: files of all kinds in a process of its own, bounded
memory, minGPT's program, property tests."""

import os
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LEFT, ROOT, run

from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.chargpt import CharDataset, build, get_config, write_text
from mingpt_nb.data import (
    HEADER,
    TokenFile,
    code_points,
    encode_file,
    encode_text,
    file_characters,
    read_pieces,
)
from mingpt_nb.gpt2 import load
from mingpt_nb.utils import CfgNode

SMALL = [
    '--model.model_type=gpt-nano',
    '--data.block_size=16',
    '--trainer.max_iters=6',
    '--trainer.eval_every=3',
    '--trainer.eval_batches=1',
    '--trainer.batch_size=4',
    '--sample.length=20',
    '--trainer.device=cpu',
    '--system.work_dir=out',
]
TEXT = 'It was the best of times, it was the worst of times. Ça alors! ' * 40


def chargpt(*args, **kw):
    return run('-m', 'mingpt_nb.chargpt', *args, *SMALL, **kw)


def test_command_with_a_file(tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    out, _ = chargpt('input.txt', cwd=tmp_path, plain=True)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == LEFT
    assert (
        'step 3: held-out loss' in out
        and 'lowest held-out loss' in out
        and 'bits per character' in out
    )
    model, tok = load(tmp_path / 'out' / 'model', 'cpu')
    assert tok.chars == sorted(set(TEXT)) and write_text(model, tok, 'It was', 5).startswith(
        'It was'
    )
    again, _ = chargpt('--text.file=input.txt', cwd=tmp_path)
    assert again == out


@pytest.mark.parametrize(
    'content, says',
    [
        (b'', 'input.txt is empty'),
        (b'a', 'a text of length 1 is too short for block_size=16'),
        (b'ab' * 80, 'a text of length 160 is too short'),
        ('Gruß '.encode('latin1') * 90, 'is not UTF-8: byte 0xdf at offset 3'),
        (TEXT.encode('utf-16'), 'iconv -f utf-16 -t utf-8'),
        (TEXT.encode() + b'\xc3', f'at offset {len(TEXT.encode()):,}'),
        (None, 'No such file'),
    ],
)
def test_a_file_that_will_not_do_gets_one_line(content, says, tmp_path):
    if content is not None:
        (tmp_path / 'input.txt').write_bytes(content)
    _, err = chargpt('input.txt', cwd=tmp_path, code=1)
    assert (
        says in err
        and err.startswith('mingpt-nb chargpt: ')
        and 'Traceback' not in err
        and len(err.splitlines()) == 1
    )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arg, says',
    [
        ('--sample.prompt=☃', "'☃' at position 0"),
        ('--trainer.max_iter=5', "did you mean 'trainer.max_iters'?"),
        ('--data.block_size=0', 'block_size must be 1 or more'),
    ],
)
def test_a_setting_that_will_not_do_gets_one_line(arg, says, tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    _, err = run('-m', 'mingpt_nb.chargpt', 'input.txt', *SMALL, arg, cwd=tmp_path, code=1)
    assert says in err and 'Traceback' not in err


def test_without_a_network_it_says_so_and_goes_on(tmp_path):
    out, _ = chargpt(
        cwd=tmp_path,
        env=dict(
            MINGPT_NB_CACHE=str(tmp_path / 'cache'),
            http_proxy='http://127.0.0.1:9',
            https_proxy='http://127.0.0.1:9',
            NO_PROXY='',
        ),
    )
    assert (
        'the manual of Python' in out
        and 'tinyshakespeare.txt' in out
        and 'lowest held-out loss' in out
    )


def test_a_wrong_file_in_the_cache_is_not_trained_on(tmp_path):
    (tmp_path / 'tinyshakespeare.txt').write_text('not Shakespeare')
    _, err = chargpt(cwd=tmp_path, code=1, env=dict(MINGPT_NB_CACHE=str(tmp_path)))
    assert 'delete it to fetch it again' in err and 'Traceback' not in err


def test_command_without_matplotlib(tmp_path):
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib' / '__init__.py').write_text(
        'raise ImportError("hidden for this test")'
    )
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    out, _ = chargpt(
        'input.txt', cwd=tmp_path, env=dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
    )
    assert (
        "pip install 'mingpt-nb[plot]'" in out
        and (tmp_path / 'out' / 'model' / 'vocab.json').exists()
    )


LARGE = '''
import resource, sys
from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.chargpt import CharDataset
from mingpt_nb.data import encode_file, file_characters
from mingpt_nb.utils import CfgNode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tok = CharTokenizer(file_characters('large.txt'))
ids = encode_file('large.txt', tok, 'ids.bin')
data = CharDataset(CfgNode(block_size=128), ids, tok)
x, y = data.__getitems__(range(0, len(data), len(data) // 50))
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
again = tok.encode(tok.decode(ids[3 * (len(data) // 50):][:20].tolist()))
print(len(ids), tok.vocab_size, peak, x[3, :20].tolist() == again)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in kilobytes on Linux')
def test_memory_does_not_grow_with_the_file(tmp_path):
    with open(tmp_path / 'large.txt', 'w', encoding='utf-8') as f:
        for _ in range(100):
            f.write(TEXT * 400)  # 100 MB
    n, vocab, peak, right = run('-c', LARGE, cwd=tmp_path, plain=True)[0].split()
    assert int(n) == 100 * 400 * len(TEXT) and int(vocab) == len(set(TEXT)) and right == 'True'
    assert int(peak) < 80, (
        f'{peak} MiB for a file of {os.path.getsize(tmp_path / "large.txt") >> 20} MiB'
    )
    assert os.path.getsize(tmp_path / 'ids.bin') == HEADER + int(n) and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ['ids.bin', 'large.txt']


def test_a_mapped_text_gives_the_same_batches(tmp_path):
    (tmp_path / 't').write_text(TEXT, encoding='utf-8')
    runs = []
    for limit in 10, 10**9:
        c = get_config()
        c.merge_from_dict(
            dict(
                text=dict(file=str(tmp_path / 't'), map_above=limit),
                data=dict(block_size=8),
                model=dict(model_type='gpt-nano'),
                system=dict(work_dir=str(tmp_path / 'out')),
                trainer=dict(max_iters=3, batch_size=4, device='cpu', eval_every=None),
            )
        )
        runs.append(build(c))
    assert isinstance(runs[0].train_dataset.ids, TokenFile) and isinstance(
        runs[1].train_dataset.ids, np.ndarray
    )
    for (x, y), (x2, y2), _ in zip(runs[0].batches(), runs[1].batches(), range(5)):
        assert torch.equal(x, x2) and torch.equal(y, y2)


MINGPT_STYLE = '''
import os, torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import DataLoader
from mingpt_nb.chargpt import CharDataset
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed, setup_logging, CfgNode as CN
set_seed(1337)
data = CN(); data.block_size = 16
train_dataset = CharDataset(data, open('input.txt', encoding='utf-8').read())
model_config = GPT.get_default_config()
model_config.model_type = 'gpt-nano'
model_config.vocab_size = train_dataset.get_vocab_size()
model_config.block_size = train_dataset.get_block_size()
model = GPT(model_config)
train_config = Trainer.get_default_config()
train_config.learning_rate, train_config.max_iters = 5e-4, 3
trainer = Trainer(train_config, model, train_dataset)
said = []
def batch_end_callback(trainer):
    model.eval()
    x = torch.tensor([train_dataset.stoi[s] for s in 'It was'], dtype=torch.long)[None, ...]
    x = x.to(trainer.device)
    y = model.generate(x, 10, temperature=1.0, do_sample=True, top_k=10)[0]
    said.append(''.join([train_dataset.itos[int(i)] for i in y]))
    model.train()
trainer.set_callback('on_batch_end', batch_end_callback)
trainer.run()
assert len(said) == 3 and said[0].startswith('It was') and len(said[0]) == 16
x, y = train_dataset[5]
assert x.dtype == torch.long and x.shape == (16,) and (x[1:] == y[:-1]).all()
assert len(train_dataset) == len(train_dataset.data) - 16
loader = DataLoader(train_dataset, shuffle=True, batch_size=4, num_workers=0)
assert next(iter(loader))[0].shape == (4, 16)
'''


def test_a_program_in_the_manner_of_mingpt(tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    run('-c', MINGPT_STYLE, cwd=tmp_path)


texts = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=300)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_encode_text_is_the_tokenizers_encode(text):
    tok = CharTokenizer.from_text(text)
    assert encode_text(text, tok).tolist() == tok.encode(text) and code_points(text).tolist() == [
        ord(c) for c in text
    ]


@pytest.mark.filterwarnings('ignore:.*are NUL')
@given(texts, st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_a_file_is_read_as_open_reads_it(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / 'any.txt'
    path.write_bytes(text.encode())
    want = path.read_text(encoding='utf-8-sig')
    assert ''.join(read_pieces(path, size)) == want
    if want:
        tok = CharTokenizer(file_characters(path))
        assert tok.decode(encode_file(path, tok).tolist()) == want


@pytest.mark.filterwarnings('ignore:.*are NUL')
@given(st.binary(min_size=1, max_size=60), st.integers(0, 30_000))
@settings(max_examples=150, deadline=None)
def test_the_first_wrong_byte_is_named(tmp_path_factory, junk, n):
    path = tmp_path_factory.getbasetemp() / 'junk.txt'
    path.write_bytes(content := b'\xc3\xa9 ' * n + junk)
    try:
        content.decode()
    except UnicodeDecodeError as e:
        with pytest.raises(
            ValueError, match=f'byte 0x{content[e.start]:02x} at offset {e.start:,}\\.'
        ):
            list(read_pieces(path))
    else:
        list(read_pieces(path))


@given(st.integers(1, 40), st.integers(2, 300), st.data())
@settings(max_examples=100, deadline=None)
def test_items_are_windows(block_size, n, data):
    text = ''.join(random.Random(n).choices('abcdé', k=block_size + n))
    d = CharDataset(CfgNode(block_size=block_size), text)
    i = data.draw(st.integers(0, len(d) - 1))
    x, y = d[i]
    assert (
        len(d) == n
        and ''.join(d.itos[c] for c in [*x.tolist(), y[-1].item()]) == text[i : i + block_size + 1]
        and torch.equal(x[1:], y[:-1])
    )
