"""What a cell of chapter 04 cannot show: the command in a process of its own, the same problems in
every process, property tests."""

import json
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LEFT, ROOT, run
from torch.utils.data import DataLoader

from mingpt_nb.adder import AdditionDataset, add, add_columns, draw_questions, is_test
from mingpt_nb.model import GPT
from mingpt_nb.utils import CfgNode


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    out, _ = run(
        '-m',
        'mingpt_nb.adder',
        '--data.ndigit=1',
        '--trainer.max_iters=60',
        '--system.work_dir',
        str(folder / 'out'),
        cwd=folder,
        plain=True,
    )
    return folder / 'out', out


def test_command_trains_and_writes(short_run):
    folder, out = short_run
    assert sorted(p.name for p in folder.iterdir()) == LEFT
    assert (
        'of 20 held-out problems right' in out and out.count(' right\n') + out.count('WRONG') == 10
    )
    assert (folder / 'training.png').read_bytes()[:4] == b'\x89PNG'
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert losses[-1] < losses[0] - 0.5


def test_command_is_reproducible_and_loads(short_run, tmp_path):
    folder, out = short_run
    again, _ = run(
        '-m',
        'mingpt_nb.adder',
        '--data.ndigit=1',
        '--trainer.max_iters=60',
        '--system.work_dir',
        str(tmp_path),
    )
    assert out.replace(str(folder), '') == again.replace(str(tmp_path), '')
    model = GPT.from_pretrained(folder / 'model')
    shown = re.findall(
        r'^(\d) \+ (\d) = (\d+) (right|WRONG, it is (\d+))$', out, re.M
    )  # '3 + 4 = 7 right', '3 + 4 = 8 WRONG, it is 7'
    assert len(shown) == 10
    for a, b, c, mark, correct in shown:
        assert (
            add(model, int(a), int(b)) == int(c)
            and int(correct or c) == int(a) + int(b)
            and (mark == 'right') == (int(c) == int(a) + int(b))
        )


def test_entry_point_is_the_same_command(tmp_path):
    code = "import sys; from mingpt_nb.utils import cli; sys.argv[0] = 'mingpt-nb'; cli()"
    out, _ = run(
        '-c',
        code,
        'adder',
        '--data.ndigit=1',
        '--trainer.max_iters=3',
        '--system.work_dir',
        str(tmp_path),
    )
    assert 'max_iters: 3\n' in out and (tmp_path / 'model' / 'model.safetensors').exists()
    assert json.loads((tmp_path / 'config.json').read_text())['trainer']['max_iters'] == 3


@pytest.mark.parametrize(
    'arg, says',
    [
        ('--trainer.max_iter=5', "did you mean 'trainer.max_iters'?"),
        ('--data.ndigit=0', 'ndigit must be 1 or more'),
        ('--data.ndigit=two', 'expected int'),
        ('ndigit=2', 'expected --name=value'),
    ],
)
def test_a_mistake_gets_one_line(arg, says, tmp_path):
    _, err = run('-m', 'mingpt_nb.adder', arg, cwd=tmp_path, code=1)
    assert says in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())


def test_command_without_matplotlib(tmp_path):
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib' / '__init__.py').write_text(
        'raise ImportError("hidden for this test")'
    )
    out, _ = run(
        '-m',
        'mingpt_nb.adder',
        '--data.ndigit=1',
        '--trainer.max_iters=3',
        '--system.work_dir',
        str(tmp_path / 'out'),
        env=dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}'),
    )
    assert "pip install 'mingpt-nb[plot]'" in out
    assert (tmp_path / 'out' / 'model' / 'model.safetensors').exists() and not (
        tmp_path / 'out' / 'training.png'
    ).exists()


def test_importing_starts_nothing(tmp_path):
    out, err = run('-c', 'import mingpt_nb.adder', cwd=tmp_path, plain=True)
    assert (out, err) == ('', '') and not list(tmp_path.iterdir())


def test_items_are_the_same_in_every_process():
    code = (
        'from mingpt_nb.adder import AdditionDataset; from mingpt_nb.utils import CfgNode; '
        'print([[AdditionDataset(CfgNode(ndigit=n), "train")[i][0].tolist() for i in (0, 1, '
        '4242)] for n in (2, 9)])'
    )
    names = {}
    exec(code.replace('print(', 'here = ('), names)
    assert run('-c', code, env=dict(PYTHONHASHSEED='1'))[0].strip() == str(names['here'])


@pytest.mark.parametrize('n', [1, 2, 3])
def test_listed_splits_are_disjoint_and_complete(n):
    train, test = (AdditionDataset(CfgNode(ndigit=n), s) for s in ('train', 'test'))
    rows = torch.cat(
        [
            torch.cat(
                [
                    data.__getitems__(range(i, min(i + 10**5, len(data))))[0][:, : 2 * n]
                    for i in range(0, len(data), 10**5)
                ]
            )
            for data in (train, test)
        ]
    )
    numbers = (rows * 10 ** torch.arange(2 * n).flip(0)).sum(1)
    assert torch.equal(numbers.sort().values, torch.arange(100**n))


@pytest.mark.parametrize('n', [4, 5, 20, 50, 300])
def test_drawn_splits_are_disjoint(n):
    train, test = (
        draw_questions(n, s, range(20_000 if n < 20 else 500)) for s in ('train', 'test')
    )
    assert not is_test(train).any() and is_test(test).all()
    swapped = np.roll(train, n, axis=1)
    seen = {r.tobytes() for r in train} | {r.tobytes() for r in swapped}
    assert not any(r.tobytes() in seen for r in test)


digits = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, 10**n - 1), st.integers(0, 10**n - 1))
)


@given(digits)
@settings(max_examples=300, deadline=None)
def test_add_columns_is_addition(nab):
    n, a, b = nab
    rows = [torch.tensor([[int(d) for d in f'{v:0{n}}']]) for v in (a, b)]
    assert ''.join(map(str, add_columns(*rows)[0].flip(0).tolist())) == f'{a + b:0{n + 1}}'


@given(
    st.integers(1, 40),
    st.sampled_from(['train', 'test']),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
@settings(max_examples=50, deadline=None)
def test_an_item_does_not_depend_on_its_batch(n, split, ids):
    batch = draw_questions(n, split, ids)
    assert batch.shape == (len(ids), 2 * n) and 0 <= batch.min() <= batch.max() <= 9
    for i, row in zip(ids, batch):
        assert (draw_questions(n, split, [i])[0] == row).all()


def test_worker_processes_get_the_same_batches():
    data = AdditionDataset(CfgNode(ndigit=12), 'test')
    here, there = (list(DataLoader(data, batch_size=100, num_workers=w)) for w in (0, 1))
    assert len(here) == 5
    for (x, y), (x2, y2) in zip(here, there):
        assert torch.equal(x, x2) and torch.equal(y, y2)
