"""Every benchmark runs with its smallest sizes, and writes a file, a table and pictures. No time is
asserted."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mingpt_nb.attention import CausalSelfAttention
from mingpt_nb.model import GPT

ROOT = Path(__file__).parents[1]
HALVES = (
    ('start', 'bpe', 'chargpt', 'train'),
    ('machine', 'generate', 'llama', 'products', 'bare', 'scaling', 'adder'),
)
BUSY = [], ['--busy', '--rounds', '3']
sys.path.append(
    str(ROOT / 'benchmarks')
)  # products.py, bare.py, and the common.py that they import


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "The folders of two runs side by side."
    pytest.importorskip('transformers')
    folders = [tmp_path_factory.mktemp('results') for _ in HALVES]
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / 'benchmarks',
                '--tiny',
                '--out',
                folder,
                '--only',
                *names,
                *busy,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder, names, busy in zip(folders, HALVES, BUSY)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], '\n'.join(said)
    return folders


def test_rows_say_how_they_were_measured(results):
    for folder, names in zip(results, HALVES):
        (file,) = folder.glob('*.json')
        result = json.loads(file.read_text(encoding='utf-8'))
        assert set(result['machine']) == {'name', 'cpu', 'cores', 'system', 'versions'} and set(
            result['runs']
        ) == set(names)
        for run in result['runs'].values():
            assert ('note' in run) == ('--processor-time' in run['command']) == (names == HALVES[1])
            assert run['rows'] and {
                'command',
                'seconds',
                'load_before',
                'load_after',
                'threads',
                'date',
            } <= set(run)
            assert all(
                0 < row['low'] <= row['ratio'] <= row['high']
                for row in run['rows']
                if 'ratio' in row
            )


def test_table_and_pictures_are_written(results):
    for folder, names in zip(results, HALVES):
        (file,) = folder.glob('*.json')
        table = file.with_suffix('.md').read_text(encoding='utf-8')
        assert table.count('\n## ') == len(names) and '| tiktoken |' in table or 'GFLOP/s' in table
    pictures = {p.stem.split('-')[-1] for folder in results for p in folder.glob('*.png')}
    assert pictures == {
        'start',
        'bpe',
        'chargpt',
        'train',
        'generate',
        'products',
        'bare',
        'llama',
        'adder',
        'time',
        'memory',
        'shares',
    }


def test_expectations_come_from_the_chapters_cells(tmp_path):
    out = tmp_path / 'expect.json'
    subprocess.run(
        [
            sys.executable,
            ROOT / 'benchmarks' / 'expect.py',
            '--tiny',
            '--seeds',
            '1',
            '--json',
            out,
        ],
        check=True,
        capture_output=True,
    )
    rows = json.loads(out.read_text(encoding='utf-8'))['rows']
    assert [r['what'] for r in rows] == ['sorting', '2 digits', '3 digits'] and all(
        r['steps'] == 5 and r['wall_s'] > 0 and 0 <= r['right'] < 1 for r in rows
    )


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1,), (2, 1), (), (4,), (5,), (8, 1), (3, 3)])
@pytest.mark.parametrize(
    'way', ['stored_in_out', 'rows_turned', 'multiplied_and_summed', 'without_onednn']
)
@torch.no_grad()
def test_each_way_to_multiply_is_f_linear(way, shape, bias):
    import products

    torch.manual_seed(0)
    layer, x = nn.Linear(500, 60, bias=bias), torch.randn(*shape, 500)
    turned = products.lay_in_out(layer.weight)
    assert torch.equal(turned, layer.weight) and turned.stride() == (1, 60)
    before = torch.backends.mkldnn.enabled
    for dtype, eps in (torch.float32, 1e-5), (torch.bfloat16, 3e-2):
        weight = (turned if way == 'stored_in_out' else layer.weight).to(dtype)
        b = layer.bias.to(dtype) if bias else None
        y = products.WAYS[way](x.to(dtype), weight, b)
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.linear(x.to(dtype), weight, b), atol=eps, rtol=eps)
    assert torch.backends.mkldnn.enabled == before


def test_onednn_is_on_again_after_an_error():
    import products

    before = torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        products.without_onednn(torch.randn(1, 3), torch.randn(4, 5))
    assert torch.backends.mkldnn.enabled == before


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Turned(GPT):
    def embed(self, idx, start=0):
        return super().embed(idx, start).flip(-1)


CHANGES = dict(
    nothing=lambda m: None,
    hook=lambda m: m.transformer.h[1].mlp.register_forward_hook(lambda module, args, y: -y),
    pre_hook=lambda m: m.transformer.h[0].attn.c_proj.register_forward_pre_hook(
        lambda module, args: (args[0] + 1,)
    ),
    own_layer=lambda m: setattr(m.transformer.h[2].mlp, 'c_fc', Doubled(48, 192)),
    other_class=lambda m: setattr(m.transformer.h[0], 'mlp', nn.Linear(48, 48)),
    other_activation=lambda m: setattr(m.transformer.h[1].mlp, 'act', nn.Tanh()),
    own_forward=lambda m: setattr(m.transformer.h[1].attn, 'forward', lambda x, cache=None: x),
    wrapped_layer=lambda m: setattr(
        m.transformer.h[0].attn, 'c_attn', nn.Sequential(m.transformer.h[0].attn.c_attn, nn.Tanh())
    ),
    parametrization=lambda m: nn.utils.parametrizations.weight_norm(
        m.lm_head
    ).parametrizations.weight.original0.data.mul_(-1),
    hook_at_the_end=lambda m: m.transformer.ln_f.register_forward_hook(
        lambda module, args, y: y.flip(-1)
    ),
    another_class=lambda m: setattr(m, '__class__', Turned),
    own_method=lambda m: setattr(
        m, 'hidden', lambda idx, caches=None: GPT.hidden(m, idx, caches).flip(-1)
    ),
)


@pytest.fixture(scope='module')
def small_gpt():
    torch.manual_seed(0)
    config = GPT.get_default_config()
    config.merge_from_dict(dict(model_type='gpt-nano', vocab_size=10, block_size=8))
    model = GPT(config).eval()
    for p in model.parameters():
        p.data.mul_(3)  # far from equal logits
    return model


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_without_modules_the_same_numbers(change, small_gpt):
    """Whatever somebody has changed in a model is called as before, by the model itself and by the
    one without modules."""
    from bare import BareGPT

    x, model = (
        torch.randint(10, (4, 8), generator=torch.Generator().manual_seed(0)),
        copy.deepcopy(small_gpt),
    )
    CHANGES[change](model)
    want = model(x)[0]
    assert change == 'nothing' or (want - small_gpt(x)[0]).abs().max() > 0.01
    for m in model, BareGPT(model):
        torch.testing.assert_close(m.next_logits(x), want[:, -1], atol=1e-4, rtol=0)
        caches = model.new_caches(4, 8)
        for n in 4, 5, 7, 8:
            torch.testing.assert_close(
                m.next_logits(x[:, :n], caches), model(x[:, :n])[0][:, -1], atol=1e-4, rtol=0
            )
    torch.testing.assert_close(
        model.generate(x[:, :3], 5)[:, 3], model(x[:, :3])[0][:, -1].argmax(-1)
    )


@torch.no_grad()
def test_without_modules_in_bfloat16_and_with_another_product(small_gpt, monkeypatch):
    import products
    from bare import BareGPT

    x = torch.randint(10, (1, 8), generator=torch.Generator().manual_seed(0))
    half = copy.deepcopy(small_gpt).bfloat16()
    assert torch.equal(
        BareGPT(half).next_logits(x, half.new_caches(1, 8)),
        half.next_logits(x, half.new_caches(1, 8)),
    )
    torch.testing.assert_close(
        BareGPT(small_gpt, products.rows_turned).next_logits(x),
        small_gpt.next_logits(x),
        atol=1e-4,
        rtol=0,
    )
    monkeypatch.setattr(CausalSelfAttention, 'forward', lambda self, x, cache=None: x)
    assert torch.equal(BareGPT(small_gpt).next_logits(x), small_gpt.next_logits(x))
