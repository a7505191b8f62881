"""Token files: what a notebook cell cannot show. Gigabytes, limits on memory, processes that die,
files of all kinds."""

import json
import os
import random
import sys

import numpy as np
import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mingpt_nb.bpe import CharTokenizer, get_encoder
from mingpt_nb.data import (
    FORMAT,
    HEADER,
    TokenDataset,
    TokenFile,
    _cut,
    english,
    fingerprint,
    split,
    write_tokens,
)
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer

GPT2 = get_encoder()
linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


def run(code, cwd, code_expected=0):
    (cwd / 'script.py').write_text(code, encoding='utf-8')
    return processes.run('script.py', cwd=cwd, code=code_expected, plain=True)


def make_file(path, count):
    "A token file of `count` made-up ids; the id at place i is i % 49999."
    head = dict(
        format=FORMAT,
        dtype='<u2',
        count=count,
        vocab_size=GPT2.vocab_size,
        tokenizer=fingerprint(GPT2),
    )
    turn = np.arange(49999).astype('<u2').tobytes()
    with open(path, 'wb') as f:
        f.write(json.dumps(head).encode().ljust(HEADER - 1) + b'\n')
        for start in range(0, count, 49999):
            f.write(turn[: 2 * (count - start)])


TRAIN = '''
import re, resource, sys
from pathlib import Path
import numpy as np
from mingpt_nb.data import TokenDataset, TokenFile, split
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
def held(pid='self'):
    return int(re.search(r'VmRSS:\\s+(\\d+)', Path(f'/proc/{pid}/status').read_text())[1]) >> 10
def children():
    tasks = Path('/proc/self/task').glob('*/children')
    return [int(p) for task in tasks for p in task.read_text().split()]
def trained(train, valid, workers):
    "MiB of the largest worker, once torch has its buffers and the file is open."
    m, c = GPT.get_default_config(), Trainer.get_default_config()
    m.merge_from_dict(dict(model_type=None, n_layer=1, n_head=1, n_embd=4))
    m.merge_from_dict(dict(vocab_size=train.get_vocab_size(), block_size=64))
    c.merge_from_dict(dict(max_iters=15, batch_size=8, device='cpu', seed=1, num_workers=workers))
    c.merge_from_dict(dict(eval_every=5, eval_batches=1))
    trainer = Trainer(c, GPT(m), train, valid)
    peak = []
    def watch(t):
        if t.iter_num > 4: peak.append(max([0, *map(held, children())]))
    trainer.add_callback('on_batch_end', watch)
    trainer.run()
    return max(peak)
def main():
    train, valid = (TokenDataset(part, 64) for part in split(TokenFile('ids.bin'), (9, 1)))
    alone, of_worker = (trained(train, valid, workers) for workers in (0, 2))
    rng, before = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    for _ in range(500):  # and now touch most of the file, as a long run would
        starts = rng.integers(len(train), size=256).tolist()
        x, y = train.__getitems__(starts)
        assert x[0, 0] == starts[0] % 49999 and y[-1, -1] == (starts[-1] + 64) % 49999
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(len(train), after - before, alone, of_worker)
if __name__ == '__main__': main()
'''


@linux
def test_memory_stays_bounded_while_training_on_half_a_gigabyte(tmp_path):
    make_file(tmp_path / 'ids.bin', 1 << 28)
    n, grown, alone, of_worker = map(int, run(TRAIN, tmp_path)[0].split())
    (tmp_path / 'ids.bin').unlink()
    assert n == (1 << 28) * 9 // 10 - 64 and alone == 0
    assert grown < 150, f'{grown} MiB more after reading everywhere in a file of 512 MiB'
    assert 0 < of_worker < 700, f'a worker holds {of_worker} MiB'


WRITE = '''
import resource, sys
from mingpt_nb.bpe import get_encoder
from mingpt_nb.data import write_tokens
def main():
    tok = get_encoder()
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = lambda: max(resource.getrusage(who).ru_maxrss for who in whose) >> 10
    def grown(name):
        before = peak()
        write_tokens(name + '.bin', name, tok, processes=PROCESSES)
        return peak() - before
    grown('small.txt')
    print(grown('large.txt'))
if __name__ == '__main__': main()
'''


@linux
@pytest.mark.parametrize('processes', [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path, processes):
    words = [w[1:] for w in GPT2.encoder if w[0] == 'Ġ' and len(w) > 12 and w[1:].isalpha()]
    text = ' '.join(
        random.Random(0).choices(words, k=30_000)
    )  # a token for each long word: bytes are what counts
    for name, times in ('small.txt', 8), ('large.txt', 120):
        with open(tmp_path / name, 'w', encoding='utf-8') as f:
            for _ in range(times):
                f.write(text + '\n')
    grown = int(run(WRITE.replace('PROCESSES', str(processes)), tmp_path)[0])
    assert grown < 30, (
        f'{grown} MiB more for {os.path.getsize(tmp_path / "large.txt") >> 20} MiB '
        'than for a fifteenth of them'
    )
    once = GPT2.encode(text + '\n')
    ids = TokenFile(tmp_path / 'large.txt.bin', GPT2)
    assert len(ids) == 120 * len(once) and ids[-len(once) :][:].__array__().tolist() == once


def trained(data, held, workers):
    m, c = GPT.get_default_config(), Trainer.get_default_config()
    m.merge_from_dict(
        dict(
            model_type=None,
            n_layer=1,
            n_head=1,
            n_embd=8,
            vocab_size=data.get_vocab_size(),
            block_size=data.get_block_size(),
        )
    )
    c.merge_from_dict(
        dict(max_iters=5, batch_size=4, device='cpu', seed=1, num_workers=workers, eval_every=5)
    )
    torch.manual_seed(0)
    trainer = Trainer(c, GPT(m), data, held)
    trainer.run()
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_the_trainer_gives_the_same_weights_from_file_memory_and_workers(tmp_path):
    tok = CharTokenizer('abcdefgh ')
    text = ''.join(random.Random(0).choices(tok.chars, k=400))
    ids = write_tokens(tmp_path / 'ids', [text], tok)
    results = [
        trained(*(TokenDataset(part, 16) for part in split(ids, (3, 1))), workers)
        for workers in (0, 2)
    ]
    results.append(
        trained(
            *(TokenDataset(part, 16, tok) for part in split(np.array(tok.encode(text)), (3, 1))), 0
        )
    )
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_a_worker_of_a_spawned_loader_opens_the_file_itself(tmp_path):
    data = TokenDataset(write_tokens(tmp_path / 'ids', ['abc' * 99], CharTokenizer('abc')), 8)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=1, multiprocessing_context='spawn'
    )
    assert next(iter(loader))[0].tolist() == [data[i][0].tolist() for i in range(4)]


def test_a_script_without_a_guard_is_told_so(tmp_path):
    code = (
        "from mingpt_nb.bpe import CharTokenizer\nfrom mingpt_nb.data import write_tokens\n"
        "write_tokens('ids', ['abc'], CharTokenizer('abc'), processes=2)\n"
    )
    _, err = run(code, tmp_path, 1)
    assert "if __name__ == '__main__'" in err and not (tmp_path / 'ids').exists()


@pytest.mark.parametrize(
    'damage, says',
    [
        (lambda b: b[:-1], 'write it again'),
        (lambda b: b + b'\0', 'write it again'),
        (lambda b: b[: HEADER - 1], 'write it again'),
        (lambda b: b[:100], 'is not a token file'),
        (lambda b: b' ' * HEADER + b[HEADER:], 'is not a token file'),
        (lambda b: b[HEADER:], 'is not a token file'),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage, says):
    path = write_tokens(tmp_path / 'ids', [english()[:5000]], GPT2).path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=says):
        TokenDataset(path, 8)


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    write_tokens(tmp_path / 'ids', ['old'], GPT2)
    code = (
        "import os, signal\nfrom mingpt_nb.bpe import get_encoder\n"
        "from mingpt_nb.data import write_tokens\n"
        "def texts():\n    yield 'new ' * 10**6\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_tokens('ids', texts(), get_encoder())\n"
    )
    run(code, tmp_path, -9)
    assert (
        np.array_equal(TokenFile(tmp_path / 'ids', GPT2), GPT2.encode('old'))
        and (tmp_path / 'ids.part').stat().st_size >= HEADER
    )
    assert (
        np.array_equal(write_tokens(tmp_path / 'ids', ['newer'], GPT2), GPT2.encode('newer'))
        and not (tmp_path / 'ids.part').exists()
    )


@given(st.lists(st.text(st.sampled_from('ab \n\t\u3000é中1.\'')), max_size=4), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_cutting_changes_no_id(tmp_path_factory, texts, size):
    pieces, found = list(_cut(texts, size)), []
    for text in texts:
        i = pieces.index(None)
        found.append([id for piece in pieces[:i] for id in GPT2.encode(piece)])
        assert ''.join(pieces[:i]) == text
        del pieces[: i + 1]
    assert found == [GPT2.encode(text) for text in texts] and not pieces
    path = tmp_path_factory.getbasetemp() / 'cut.txt'
    path.write_text(joined := ''.join(texts), encoding='utf-8')
    assert [id for piece in _cut(path, size) if piece for id in GPT2.encode(piece)] == GPT2.encode(
        joined
    )


def test_a_file_that_is_replaced_under_a_data_set_is_noticed(tmp_path):
    one, other = CharTokenizer('abcdefgh'), CharTokenizer('Zabcdefgh')
    data = TokenDataset(write_tokens(tmp_path / 'ids', ['abcdefgh' * 9], one), 8)
    before, part = data[0][0].tolist(), split(data.ids, (1, 1))[1]
    os.utime(tmp_path / 'ids', ns=(0, 0))  # so that the clock of the disk is fine enough
    data = TokenDataset(tmp_path / 'ids', 8)
    held = split(data.ids, (1, 1))[1]
    write_tokens(tmp_path / 'ids', ['abcdefgh' * 9], other)  # as many bytes, and other ids
    for read in (
        lambda: data[0],
        lambda: data.__getitems__([1, 2]),
        lambda: held[0],
        lambda: part[:4].tolist(),
    ):
        with pytest.raises(
            ValueError, match='ids was written anew while it was in use: open it again'
        ):
            read()
    assert TokenDataset(tmp_path / 'ids', 8)[0][0].tolist() == [i + 1 for i in before]
