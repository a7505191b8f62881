"""What a cell of chapter 13 cannot show: the command in a process of its own, and a judge of its
own for what the model has learned."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import LEFT, ROOT, run

from mingpt_nb import pixels
from mingpt_nb.gpt2 import load_pretrained
from mingpt_nb.pixels import DigitImages
from mingpt_nb.utils import CfgNode, cli
from mingpt_nb.words import read_data

SMALL = ['--model.n_layer=1', '--model.n_embd=32', '--trainer.batch_size=16']
SMALL += ['--trainer.max_iters=60', '--trainer.eval_every=30', '--trainer.device=cpu']


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    args = '-m', 'mingpt_nb.pixels', *SMALL, '--system.work_dir', str(folder / 'out')
    return folder / 'out', run(*args, cwd=folder, plain=True)[0]


def test_command_trains_and_writes(short_run):
    folder, out = short_run
    assert sorted(p.name for p in folder.iterdir()) == sorted([*LEFT, 'digits.png'])
    for name in 'digits.png', 'training.png':
        assert (folder / name).read_bytes()[:4] == b'\x89PNG'
    assert 'bits per pixel; a table of neighbours 2.' in out and 'of 300 read' in out


def test_command_is_reproducible(short_run, tmp_path):
    folder, out = short_run
    again, _ = run('-m', 'mingpt_nb.pixels', *SMALL, '--system.work_dir', str(tmp_path))
    assert out.replace(str(folder), '') == again.replace(str(tmp_path), '')
    same = [load_pretrained(f / 'model').state_dict() for f in (folder, tmp_path)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in same)))


def test_bits_are_those_of_a_judge_that_reads_pixel_by_pixel(short_run):
    "From the file itself, one prediction at a time; the report says the same."
    model = load_pretrained(short_run[0] / 'model').eval()
    test = DigitImages(DigitImages.get_default_config(), 'test')
    lines = {line[2:]: line[0] for line in read_data('digits.txt.bz2').splitlines()}
    total, pictures = 0.0, 10
    with torch.no_grad():
        for _, y in (test[i] for i in range(pictures)):
            text = ''.join('0123456789abcdefg'[grey] for grey in y)
            ids = [17 + int(lines[text])]
            for grey in text:
                p = model(torch.tensor([ids]))[0][0, -1].softmax(-1)
                total -= math.log2(p[int(grey, 17)])
                ids.append(int(grey, 17))
    loss = model(*(torch.stack(t) for t in zip(*(test[i] for i in range(pictures)))))[1].item()
    assert total / pictures / 64 == pytest.approx(loss / math.log(2), abs=1e-4)


@given(st.sampled_from(['raster', 'spiral', 'random']), st.integers(0, 1296))
def test_every_order_holds_the_same_picture(order, i):
    data = DigitImages(CfgNode(order=order), 'train')
    place = pixels.reading_order(order)
    assert torch.equal(data.pixels[i][place.argsort()], pixels.read_digits()[0][i])
    assert torch.equal(data[i][1], data.pixels[i]) and len({*place.tolist()}) == 64


def test_no_picture_is_in_two_parts():
    parts = [DigitImages(CfgNode(order='raster'), s).pixels.tolist() for s in pixels.SPLITS]
    seen = [{*map(tuple, p)} for p in parts]
    assert [len(s) for s in seen] == [1297, 200, 300]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@pytest.mark.parametrize(
    'args, says',
    [
        (['--data.order=snake'], "order must be 'raster' or 'spiral' or 'random', got 'snake'"),
        (['--data.order='], "order must be 'raster' or 'spiral' or 'random', got ''"),
        (['--data.oder=random'], "did you mean 'data.order'?"),
        (['--sample.temperature=-1'], 'temperature must be 0'),
        (['--sample.temperature=None'], 'it must not be None'),
        (['--sample.seed=1.5'], "expected int, as in 0, got '1.5'"),
        (['--sample.seed=-1'], 'seed must be'),
        (['--model.block_size=9'], 'block_size follows from the data: it is 64, not 9'),
        (['--model.n_head=5'], 'n_embd=64 is not a positive multiple of n_head=5'),
        (['--trainer.device=tpu'], 'tpu'),
        (['digit.png'], "expected --name=value, got 'digit.png'"),
    ],
)
def test_it_refuses(args, says, tmp_path):
    with pytest.raises(SystemExit) as e:
        cli(['pixels', f'--system.work_dir={tmp_path / "out"}', *args])
    assert str(e.value.code).startswith('mingpt-nb pixels: ') and says in e.value.code
    assert '\n' not in e.value.code and not (tmp_path / 'out' / 'model').exists()


def test_what_is_in_the_way_is_found_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr('mingpt_nb.trainer.Trainer.run', lambda t: pytest.fail('it has started'))
    (tmp_path / 'model').write_text('a file')
    with pytest.raises(SystemExit, match='is in the way'):
        cli(['pixels', f'--system.work_dir={tmp_path}'])


def test_the_benchmark_of_the_orders_runs(tmp_path):
    out = tmp_path / 'rows.json'
    args = ROOT / 'benchmarks/pixels.py', '--tiny', '--seeds', '1', '--json', out
    subprocess.run([sys.executable, *args], check=True, capture_output=True)
    rows = json.loads(out.read_text(encoding='utf-8'))['rows']
    assert [r['what'] for r in rows] == ['raster', 'spiral', 'random']
    assert all(r['so_far'][-1] / 64 == pytest.approx(r['bits']) and r['wall_s'] > 0 for r in rows)
