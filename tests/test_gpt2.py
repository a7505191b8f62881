"""GPT-2 checkpoints of many shapes against transformers: in, out, refused, in little memory, and
from the command line."""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

import processes
from theirs import assert_same, edit, ids, save, shaken

import mingpt_nb.bpe
import mingpt_nb.model
import mingpt_nb.utils
from mingpt_nb import gpt2
from mingpt_nb.bpe import BPETokenizer, CharTokenizer, get_encoder, load_tokenizer
from mingpt_nb.files import tokenizer_json
from mingpt_nb.model import GPT

SMALL = dict(
    vocab_size=61,
    n_positions=16,
    n_embd=24,
    n_layer=2,
    n_head=3,
    bos_token_id=None,
    eos_token_id=None,
)


def read_tokenizer(folder):
    "The tokenizer in `folder`, or None."
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None


def hf(seed=0, **kwargs):
    torch.manual_seed(seed)
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL | kwargs)))


@torch.no_grad()
def greedy(theirs, x, n):
    "Greedy tokens from transformers' logits, the window sliding as ours does."
    margin = float('inf')
    for _ in range(n):
        best = (
            theirs(x[:, -theirs.config.n_positions :])
            .logits[:, -1]
            .topk(min(2, theirs.config.vocab_size))
        )
        margin = min(margin, (best.values[:, 0] - best.values[:, 1:].sum(1)).min().item())
        x = torch.cat((x, best.indices[:, :1]), dim=1)
    return x, margin


SHAPES = [
    {},
    dict(n_layer=1, n_head=1, n_embd=1),
    dict(n_embd=8, n_head=8),
    dict(n_layer=6, n_embd=48, n_head=12, n_inner=48),  # distilgpt2: 6 layers
    dict(n_positions=1),
    dict(vocab_size=1),
    dict(vocab_size=50304, n_embd=8, n_head=2),
    dict(n_positions=200, n_layer=3),
    dict(n_inner=7),
    dict(n_inner=24),
    dict(layer_norm_epsilon=1e-2),
    dict(layer_norm_epsilon=1e-12),
    dict(tie_word_embeddings=False),
    dict(tie_word_embeddings=False, n_inner=5, layer_norm_epsilon=0.5, activation_function='silu'),
    dict(resid_pdrop=0.5, embd_pdrop=0.3, attn_pdrop=0.2),
    dict(reorder_and_upcast_attn=True, attn_implementation='eager'),
    *(
        dict(activation_function=a)
        for a in ('gelu_new', 'gelu', 'relu', 'silu', 'swish', 'tanh', 'gelu_pytorch_tanh')
    ),
]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_shapes(tmp_path, shape):
    theirs = hf(**shape)
    ours = GPT.from_pretrained(save(theirs, tmp_path / 'in'))
    assert not ours.training
    assert_same(ours, theirs)
    assert_same(ours, theirs, T=1)
    W = theirs.config.n_positions
    x = ids(theirs, T=max(1, W // 2))
    want, margin = greedy(theirs, x, min(W, 12) + 6)
    if margin > 1e-4:  # a tie may go either way
        assert torch.equal(ours.generate(x, min(W, 12) + 6), want)
    ours.save_pretrained(tmp_path / 'out')
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out').eval()
    again, direct = GPT.from_pretrained(tmp_path / 'out'), ours.to_hf()
    for (name, p), q, r in zip(theirs.named_parameters(), back.parameters(), direct.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r), name
    for (name, p), q in zip(ours.named_parameters(), again.named_parameters()):
        assert name == q[0] and torch.equal(p, q[1]), name
    assert again.config.to_dict() == ours.config.to_dict()
    for field in (
        'n_inner',
        'activation_function',
        'layer_norm_epsilon',
        'tie_word_embeddings',
        'attn_pdrop',
        'embd_pdrop',
        'resid_pdrop',
    ):
        assert getattr(back.config, field) == getattr(theirs.config, field), field


def test_random_shapes(tmp_path):
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(
        max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.integers(1, 4),
        st.integers(1, 6),
        st.integers(1, 8),
        st.integers(1, 40),
        st.integers(2, 300),
        st.none() | st.integers(1, 70),
        st.sampled_from(['gelu_new', 'relu', 'gelu']),
        st.booleans(),
        st.floats(1e-8, 0.1),
        st.sampled_from([None, '5KB']),
        st.booleans(),
    )
    def check(
        n_layer,
        n_head,
        hs,
        n_positions,
        vocab_size,
        n_inner,
        activation,
        tied,
        eps,
        shard,
        sizes_by_alias,
    ):
        theirs = hf(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_head * hs,
            n_positions=n_positions,
            vocab_size=vocab_size,
            n_inner=n_inner,
            activation_function=activation,
            tie_word_embeddings=tied,
            layer_norm_epsilon=eps,
        )
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save(theirs, folder, **dict(max_shard_size=shard) if shard else {})
        if sizes_by_alias:
            config = json.loads((folder / 'config.json').read_text())
            (folder / 'config.json').write_text(
                json.dumps(
                    {theirs.config.__class__.attribute_map.get(k, k): v for k, v in config.items()}
                    | {
                        a: config.pop(k)
                        for a, k in theirs.config.attribute_map.items()
                        if k in config
                    }
                )
            )
        ours = GPT.from_pretrained(folder)
        assert_same(ours, theirs)
        assert (
            sum(p.numel() for p in ours.parameters())
            == mingpt_nb.model.count_params(ours.config)
            == sum(p.numel() for p in theirs.parameters())
        )

    check()


def test_formats(tmp_path):
    theirs = hf()
    x = ids(theirs)
    folder = save(theirs, tmp_path / 'one')
    want = GPT.from_pretrained(folder)(x)[0]
    weights = load_file(folder / 'model.safetensors')
    config = (folder / 'config.json').read_text()
    masks = {
        f'{{}}h.{i}.attn.{k}': v
        for i in range(2)
        for k, v in (('bias', torch.ones(1, 1, 16, 16).tril()), ('masked_bias', torch.tensor(-1e4)))
    }
    plain = {k.removeprefix('transformer.'): v for k, v in weights.items()}
    variants = dict(
        plain=plain,
        masks=weights | {k.format('transformer.'): v for k, v in masks.items()},
        plain_masks=plain
        | {k.format(''): v.to(torch.uint8) if v.dim() else v for k, v in masks.items()},
        head=weights | {'lm_head.weight': weights['transformer.wte.weight'].clone()},
    )
    for name, tensors in variants.items():
        for kind in 'safetensors', 'zip', 'pickle':
            to = tmp_path / f'{name}_{kind}'
            to.mkdir()
            (to / 'config.json').write_text(config)
            if kind == 'safetensors':
                save_file(tensors, to / 'model.safetensors')
            else:
                torch.save(
                    tensors, to / 'pytorch_model.bin', _use_new_zipfile_serialization=kind == 'zip'
                )
            assert torch.equal(GPT.from_pretrained(to)(x)[0], want), to
    shards = save(theirs, tmp_path / 'shards', max_shard_size='10KB')
    assert len(list(shards.glob('model-*'))) > 1 and torch.equal(
        GPT.from_pretrained(shards)(x)[0], want
    )
    (shards / 'model.safetensors.index.json').rename(shards / 'pytorch_model.bin.index.json')
    index = json.loads((shards / 'pytorch_model.bin.index.json').read_text())
    for path in shards.glob('model-*'):
        torch.save(load_file(path), shards / f'{path.stem}.bin')
        path.unlink()
    index['weight_map'] = {
        k: v.replace('.safetensors', '.bin') for k, v in index['weight_map'].items()
    }
    (shards / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    assert torch.equal(GPT.from_pretrained(shards)(x)[0], want)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    theirs = hf().to(dtype)
    folder = save(theirs, tmp_path / 'half')
    ours = GPT.from_pretrained(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(ours, theirs.float())
    kept = GPT.from_pretrained(folder, dtype=None)
    assert {p.dtype for p in kept.parameters()} == {dtype}
    kept.save_pretrained(tmp_path / 'again')
    assert (
        load_file(tmp_path / 'again' / 'model.safetensors').keys()
        == load_file(folder / 'model.safetensors').keys()
    )
    for k, v in load_file(tmp_path / 'again' / 'model.safetensors').items():
        assert v.dtype == dtype and torch.equal(v, load_file(folder / 'model.safetensors')[k])


def test_loaded_model_trains_and_copies(tmp_path):
    import copy
    import pickle

    ours = GPT.from_pretrained(save(hf(resid_pdrop=0.1), tmp_path / 'm')).train()
    x = torch.randint(61, (4, 16))
    for m in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours:
        assert m.lm_head.weight is m.transformer.wte.weight
        train = mingpt_nb.utils.CfgNode(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        opt, first = m.configure_optimizers(train), m(x, x)[1]
        for _ in range(5):
            opt.zero_grad()
            m(x, x)[1].backward()
            opt.step()
        assert m(x, x)[1] < first
    save(hf(seed=9), tmp_path / 'm')  # the file may change: nothing of it is still mapped
    assert all(torch.isfinite(p).all() for p in ours.parameters())


REFUSED = {
    'scale_attn_weights=False': dict(scale_attn_weights=False),
    'scale_attn_by_inverse_layer_idx=True': dict(scale_attn_by_inverse_layer_idx=True),
    'add_cross_attention=True': dict(add_cross_attention=True),
    "activation_function='gelu_fast'": dict(activation_function='gelu_fast'),
    "activation_function='no_such'": dict(activation_function='no_such'),
    "model_type='bert'": dict(model_type='bert'),
    "model_type='gpt_neo'": dict(model_type='gpt_neo'),
    "pruned_heads={'0': [1]}": dict(pruned_heads={'0': [1]}),
    "quantization_config={'bits': 8}": dict(quantization_config={'bits': 8}),
    'n_head': dict(n_head=5),
    'n_layer must be a positive integer': dict(n_layer=0),
    'missing: transformer.h.2.ln_1.weight': dict(n_layer=3),
    'unexpected: transformer.h.1.attn.c_attn.bias': dict(n_layer=1),
    'transformer.wpe.weight is (16, 24), not (17, 24)': dict(n_positions=17),
    'transformer.wte.weight is (61, 24), not (62, 24)': dict(vocab_size=62),
    'transformer.h.0.mlp.c_fc.bias is (96,), not (95,)': dict(n_inner=95),
    'missing: lm_head.weight': dict(tie_word_embeddings=False),
}


@pytest.mark.parametrize('says', REFUSED)
def test_refused(tmp_path, says):
    folder = save(hf(), tmp_path / 'm')
    edit(folder, **REFUSED[says])
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(folder)
    assert says in str(e.value)


def test_damaged(tmp_path):
    folder = save(hf(), tmp_path / 'm')
    weights = {
        k: v.clone() for k, v in load_file(folder / 'model.safetensors').items()
    }  # the file is about to change
    whole = (folder / 'model.safetensors').read_bytes()
    for raw in whole[:-1], whole[:1000], whole[:7], b'', b'<html>not found</html>', b'\xff' * 100:
        (folder / 'model.safetensors').write_bytes(raw)
        with pytest.raises(ValueError, match='model.safetensors is damaged or incomplete'):
            GPT.from_pretrained(folder)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no weights in'):
        GPT.from_pretrained(folder)
    torch.save(weights, folder / 'pytorch_model.bin')
    whole = (folder / 'pytorch_model.bin').read_bytes()
    for raw in whole[:-1000], whole[:10], b'', b'<html>not found</html>':
        (folder / 'pytorch_model.bin').write_bytes(raw)
        with pytest.raises(ValueError, match='pytorch_model.bin is damaged or incomplete'):
            GPT.from_pretrained(folder)
    torch.save(
        {'transformer.wte.weight': subprocess.Popen}, folder / 'pytorch_model.bin'
    )  # a pickle that is more than numbers
    with pytest.raises(ValueError, match='damaged or incomplete'):
        GPT.from_pretrained(folder)
    (folder / 'config.json').write_text('{"model_type": "gp')
    with pytest.raises(ValueError, match='config.json is not JSON'):
        GPT.from_pretrained(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='no config.json'):
        GPT.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match='no folder'):
        GPT.from_pretrained(tmp_path / 'nowhere')


def test_head_that_differs(tmp_path):
    folder = save(hf(tie_word_embeddings=False), tmp_path / 'm')
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match='lm_head.weight differs from wte.weight'):
        GPT.from_pretrained(folder)


def run(*args, env=None, code=None, module=None, cwd=None, plain=False):
    what = ['-m', module] if module else ['-c', code or 'from mingpt_nb.utils import cli; cli()']
    process = processes.start(
        *what, *args, env={'HF_HUB_OFFLINE': '1'} | (env or {}), cwd=cwd, plain=plain
    )
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


MEASURE = '''
import json, sys, mingpt_nb.gpt2
from mingpt_nb.model import GPT
status = lambda: next(l for l in open('/proc/self/status') if l.startswith('VmHWM'))
peak = lambda: int(status().split()[1]) * 1024
before = peak()
model = GPT.from_pretrained(sys.argv[1])
sizes = [p.numel() * 4 for p in model.parameters()]
peers = [m for m in sys.modules if m.split('.')[0] in ('transformers', 'huggingface_hub')]
print(json.dumps([peak() - before, sum(sizes), max(sizes), peers]))
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads peak memory from /proc')
@pytest.mark.parametrize('shard', [None, '20MB'])
def test_memory(tmp_path, shard):
    """Loading takes the weights, the largest tensor and little more; and a folder needs neither
    transformers nor the hub's library."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=6, n_embd=512, n_head=8, vocab_size=20000, n_positions=64
    )  # 117 MB
    save(
        transformers.GPT2LMHeadModel(config),
        tmp_path / 'm',
        **dict(max_shard_size=shard) if shard else {},
    )
    out = run(str(tmp_path / 'm'), code=MEASURE, plain=True)
    assert out.returncode == 0, out.stderr
    grown, total, largest, imported = json.loads(out.stdout)
    assert total > 110e6 and not imported
    assert grown < total + largest + 30e6


def test_meta_needs_no_random_numbers(tmp_path):
    "Loading does not disturb the generator."
    folder = save(hf(), tmp_path / 'm')
    before = torch.get_rng_state()
    GPT.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory):
    "GPT-2's vocabulary with a small model, in a folder named as minGPT's programs name it."
    where = tmp_path_factory.mktemp('models')
    theirs = hf(vocab_size=50257, n_positions=64, bos_token_id=50256, eos_token_id=50256)
    GPT.from_pretrained(save(theirs, where / 'tmp')).save_pretrained(where / 'gpt2', get_encoder())
    return where / 'gpt2'


def test_program_logits_and_greedy(gpt2_folder, monkeypatch):
    """What minGPT's unit test of its import does, with `mingpt` meaning this package and gpt2 a
    folder here."""
    monkeypatch.chdir(gpt2_folder.parent)
    for name in 'bpe', 'model', 'utils':
        monkeypatch.setitem(sys.modules, f'mingpt.{name}', getattr(mingpt_nb, name))
    monkeypatch.setitem(sys.modules, 'mingpt', mingpt_nb)
    from mingpt.bpe import BPETokenizer
    from mingpt.model import GPT

    model, model_hf = (
        GPT.from_pretrained('gpt2'),
        transformers.GPT2LMHeadModel.from_pretrained('gpt2'),
    )
    model.eval()
    model_hf.eval()
    tokenizer, tokenizer_hf = BPETokenizer(), transformers.GPT2Tokenizer.from_pretrained('gpt2')
    x1 = tokenizer('Hello, my dog is a little')
    x2 = tokenizer_hf('Hello, my dog is a little', return_tensors='pt')['input_ids']
    assert torch.equal(x1, x2)
    with torch.no_grad():
        torch.testing.assert_close(model(x1)[0], model_hf(x2).logits, rtol=1e-4, atol=1e-4)
        y1 = model.generate(x1, max_new_tokens=20, do_sample=False)[0]
        y2 = model_hf.generate(
            x2,
            attention_mask=torch.ones_like(x2),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=50256,
        )[0]
    assert torch.equal(y1[: len(y2)], y2)
    assert tokenizer.decode(y1.cpu().squeeze()) == tokenizer_hf.decode(y1)


def test_program_samples(gpt2_folder, monkeypatch):
    "What generate.ipynb does: ten samples of a prompt, and of none."
    monkeypatch.chdir(gpt2_folder.parent)
    mingpt_nb.utils.set_seed(3407)
    model, tokenizer = GPT.from_pretrained('gpt2'), BPETokenizer()
    for prompt in 'Andrej Karpathy, the', '':
        x = (
            tokenizer(prompt)
            if prompt
            else torch.tensor([[tokenizer.encoder.encoder['<|endoftext|>']]], dtype=torch.long)
        )
        y = model.generate(x.expand(10, -1), max_new_tokens=20, do_sample=True, top_k=40)
        assert y.shape == (10, x.size(1) + 20) and len({tuple(r) for r in y.tolist()}) == 10
        assert all(isinstance(tokenizer.decode(row.cpu().squeeze()), str) for row in y)


def test_hub_cache(tmp_path, gpt2_folder):
    """A model in the Hugging Face cache loads by name, under its old name or its new one, without a
    network."""
    for repo in 'openai-community--gpt2', 'gpt2-medium', 'distilbert--distilgpt2', 'me--mine':
        snapshot = tmp_path / 'hub' / f'models--{repo}' / 'snapshots' / ('a' * 40)
        snapshot.mkdir(parents=True)
        for p in gpt2_folder.iterdir():
            (snapshot / p.name).symlink_to(p)
        refs = snapshot.parents[1] / 'refs'
        refs.mkdir()
        (refs / 'main').write_text('a' * 40)
    code = (
        'import sys; from mingpt_nb.model import GPT\n'
        'for n in sys.argv[1:]: print(n, GPT.from_pretrained(n).config.vocab_size)'
    )
    out = run(
        'gpt2',
        'gpt2-medium',
        'distilgpt2',
        'me/mine',
        code=code,
        env={'HF_HUB_CACHE': str(tmp_path / 'hub')},
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == [
        'gpt2',
        '50257',
        'gpt2-medium',
        '50257',
        'distilgpt2',
        '50257',
        'me/mine',
        '50257',
    ]
    out = run(
        'generate', '--model=gpt2-xl', env={'HF_HUB_CACHE': str(tmp_path / 'hub')}, cwd=tmp_path
    )
    assert out.returncode == 1 and 'Traceback' not in out.stderr
    assert (
        "no folder 'gpt2-xl' here" in out.stderr
        and 'needs the network' in out.stderr
        and 'save_pretrained' in out.stderr
    )


def test_without_transformers(gpt2_folder):
    """Reading and writing folders works where neither transformers nor the hub's library can be
    imported; names and to_hf say what to install."""
    code = '''
import sys, tempfile
class Absent:
    def find_spec(self, name, *args):
        if name.split('.')[0] in ('transformers', 'huggingface_hub', 'tokenizers'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from mingpt_nb.model import GPT
model = GPT.from_pretrained(sys.argv[1])
with tempfile.TemporaryDirectory() as d:
    model.save_pretrained(d)
    assert all(a.equal(b) for a, b in zip(GPT.from_pretrained(d).parameters(), model.parameters()))
for f in (lambda: GPT.from_pretrained('gpt2-large'), model.to_hf):
    try: f()
    except ImportError as e: print(e)
'''
    out = run(str(gpt2_folder), code=code, cwd='/')
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == [
        "this needs huggingface_hub: pip install 'mingpt-nb[hf]'",
        "this needs transformers: pip install 'mingpt-nb[hf]'",
    ]


def test_command_line(tmp_path, gpt2_folder, capsys):
    args = ['generate', f'--model={gpt2_folder}', '--device=cpu', '--max_new_tokens=12']

    def said(*more):
        mingpt_nb.utils.cli([*args, *more])
        return capsys.readouterr().out

    first = run(*args, '--seed=1', '--num_samples=2', 'Once upon a time')
    assert first.returncode == 0 and not first.stderr, first.stderr
    assert first.stdout == said('Once', 'upon', 'a', 'time', '--num_samples', '2', '--seed', '1')
    one, two = first.stdout.split('-' * 80 + '\n')
    assert one.startswith('Once upon a time') and two.startswith('Once upon a time') and one != two
    model, enc = GPT.from_pretrained(gpt2_folder), get_encoder()
    want = model.generate(torch.tensor([enc.encode('Hello')]), 12, stop_tokens=[50256])[0]
    assert (
        said('--temperature=0', 'Hello')
        == enc.decode([i for i in want.tolist() if i != 50256]) + '\n'
    )
    assert said('--seed=2') == said('--seed=2', '--prompt=')  # both start from <|endoftext|>
    for bad, says in (
        ('--temperature=-1', 'temperature must be 0'),
        ('--top_q=1', "no field 'top_q'"),
        ('--model=/no/where', 'no folder'),
        (f'--model={tmp_path}', 'not a model that save_pretrained wrote'),
        ('--device=tpu9', 'tpu9'),
    ):
        with pytest.raises(SystemExit, match=f'mingpt-nb generate: .*{says}'):
            said(bad, 'Hi')
    module = run(
        '--temperature=0',
        f'--model={gpt2_folder}',
        '--max_new_tokens=1',
        '--tmperature=1',
        module='mingpt_nb.gpt2',
    )
    assert (
        module.returncode == 1
        and "did you mean 'temperature'?" in module.stderr
        and 'Traceback' not in module.stderr
    )


def test_command_line_loads_characters(tmp_path, capsys):
    tok = CharTokenizer.from_text('to be, or not')
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=tok.vocab_size, block_size=8))
    GPT(c).save_pretrained(tmp_path, tok)
    gpt2.main([f'--model={tmp_path}', '--device=cpu', '--max_new_tokens=30', '--seed=3', 'to be'])
    out = capsys.readouterr().out
    assert out.startswith('to be') and len(out) == 5 + 30 + 1
    with pytest.raises(mingpt_nb.utils.ConfigError, match="'X' at position 0"):
        gpt2.main([f'--model={tmp_path}', '--device=cpu', 'X'])


def test_tokenizers_of_transformers(tmp_path, gpt2_folder):
    transformers.GPT2Tokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    tok, text = read_tokenizer(tmp_path), "Hello, it's 2 o'clock é🤗\n\n  def f():"
    assert tok.encode(text) == get_encoder().encode(text) and tok.special_tokens == {
        '<|endoftext|>': 50256
    }


def test_text_is_never_cut_inside_a_character(gpt2_folder):
    enc = get_encoder()
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(50257, (30,), generator=g).tolist()
        assert ''.join(gpt2.pieces(enc, ids)) == enc.decode(ids)
    text = '你好🤗 naïve'
    assert [p for p in gpt2.pieces(enc, enc.encode(text)) if '\ufffd' in p] == []


@torch.no_grad()
def test_perplexity_against_transformers(tmp_path):
    theirs = hf()
    ours, W = GPT.from_pretrained(save(theirs, tmp_path / 'm')), 16
    x = ids(theirs, B=1, T=50)[0]
    for stride in 1, 5, 16:
        total, done = 0.0, 0
        for start in range(0, 49, stride):  # the windows, written another way
            end = min(start + W, 49)
            loss = torch.nn.functional.cross_entropy(
                theirs(x[None, start:end]).logits[0], x[start + 1 : end + 1], reduction='none'
            )
            total += loss[len(loss) - (end - done) :].sum().item()
            done = end
            if end == 49:
                break
        assert gpt2.perplexity(ours, x, stride) == pytest.approx(
            torch.tensor(total / 49).exp().item(), rel=1e-4
        )
    assert gpt2.perplexity(ours, x[:10]) == pytest.approx(
        ours(x[None, :9], x[None, 1:10])[1].exp().item(), rel=1e-5
    )


# ---- folders that hold something else ------------------------------------------------------------


def in_old_format(model, folder):
    "As the first versions of this package wrote a model."
    config = {'format': 'mingpt_nb'} | model.config.to_dict()
    (folder / 'config.json').write_text(json.dumps(config))
    state = model.state_dict()
    if gpt2.is_tied(model):
        del state['transformer.wte.weight']
    save_file(state, folder / 'model.safetensors')


def test_a_folder_of_the_first_versions(tmp_path, words):
    for tied in True, False:
        model = tiny(tie_weights=tied)
        words.save(tmp_path)
        in_old_format(model, tmp_path)
        again, tokenizer = gpt2.load(tmp_path, 'cpu')
        assert tokenizer.encoder == words.encoder
        assert again.config.to_dict() == model.config.to_dict()
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q)


def tiny(**kwargs):
    c = GPT.get_default_config()
    c.merge_from_dict(
        dict(model_type='gpt', n_layer=1, n_head=1, n_embd=8, vocab_size=300, block_size=8) | kwargs
    )
    return GPT(c).eval()


@pytest.fixture(scope='module')
def words():
    return mingpt_nb.bpe.train_bpe('the cat sat on the mat and the dog sat on the log. ' * 9, 300)


NOT_THEM = {
    'nothing': b'',
    'cut': None,
    'a page': b'<html><body>404 Not Found</body></html>',
    'noise': bytes(range(128, 256)) * 9,
    'null': b'null',
    'a list': b'[1, 2]',
    'text': b'"gpt2"',
    'empty': b'{}',
    'nested': b'[' * 50_000,
    'utf-16': '{"a": 1}'.encode('utf-16'),
    'words': b'{"a": "b"}',
    'numbers': b'{"a": 1.5, "b": -3, "model_type": 7, "format": [], "weight_map": 3, "model": 1}',
    'odd sizes': b'{"format": "mingpt_nb", "n_layer": "1", "n_head": null, '
    b'"model_type": "gpt2", "n_embd": 1e400, "vocab_size": [3]}',
    'huge': b'{"format": "mingpt_nb", "n_layer": 100000000000, "n_head": 1, '
    b'"n_embd": 1, "vocab_size": 1, "block_size": 1}',
    'huge gpt2': b'{"model_type": "gpt2", "n_layer": 100000000000, "n_head": 1, '
    b'"n_embd": 1, "vocab_size": 1, "n_positions": 1}',
}


@pytest.mark.parametrize(
    'save',
    ['pretrained', 'old', 'bin', 'shards', 'tokenizer.json'],
    ids=['pretrained', 'old', 'bin', 'shards', 'tokenizer'],
)
def test_a_damaged_file_is_named(tmp_path, words, save, capsys):
    """Whatever is in a file of a folder: one line that names the file, from every function and
    command that reads it."""
    model, sound, folder = tiny(), tmp_path / 'sound', tmp_path / 'm'
    gpt2.save_pretrained(model, sound, words)
    if save == 'old':
        in_old_format(model, sound)
    if save == 'bin':
        torch.save(load_file(sound / 'model.safetensors'), sound / 'pytorch_model.bin')
        (sound / 'model.safetensors').unlink()
    if save == 'shards':
        shutil.rmtree(sound)
        model.to_hf().save_pretrained(sound, max_shard_size='5KB')
        words.save(sound)
        (sound / 'generation_config.json').unlink()
    if save == 'tokenizer.json':
        transformers.GPT2Tokenizer.from_pretrained(sound).save_pretrained(sound)
        (
            (sound / 'vocab.json').unlink(),
            (sound / 'merges.txt').unlink(),
            (sound / 'tokenizer_config.json').unlink(),
        )
    assert gpt2.load(sound, 'cpu')[0].config.vocab_size == 300
    for path in sorted(sound.iterdir()):
        for what, content in NOT_THEM.items():
            if path.suffix == '.txt' and what in ('nothing', 'null', 'text', 'empty', 'nested'):
                continue  # no merges, or a line of one word: other tests
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound, folder)
            raw = path.read_bytes()
            (folder / path.name).write_bytes(raw[: len(raw) // 2] if content is None else content)
            with pytest.raises((ValueError, OSError)) as e:
                gpt2.load(folder, 'cpu')
            assert '\n' not in str(e.value) and (
                path.name in str(e.value) or f'{folder}' in str(e.value)
            ), (path.name, what, str(e.value))
    with pytest.raises(SystemExit) as e:
        mingpt_nb.utils.cli(['generate', f'--model={folder}', 'the cat'])
    assert str(e.value).startswith('mingpt-nb generate: ') and '\n' not in str(e.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, words):
    gpt2.save_pretrained(tiny(), tmp_path / 'm', words)
    for path in [*tmp_path.glob('m/*.json'), tmp_path / 'm' / 'merges.txt']:
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    model, tokenizer = gpt2.load(tmp_path / 'm', 'cpu')
    assert (
        tokenizer.encoder == words.encoder
        and tokenizer.bpe_ranks == words.bpe_ranks
        and model.config.n_embd == 8
    )


def test_what_a_folder_holds_is_what_was_saved(tmp_path, words):
    """Every pair of savings over each other, with three kinds of tokenizers or none; what
    transformers makes of the folder is the same model, and the same ids."""
    kinds = [None, CharTokenizer('abcd'), CharTokenizer('abcdefgh'), words]
    for first in kinds:
        for second in kinds:
            gpt2.save_pretrained(tiny(), tmp_path / 'm', first)
            model = tiny(vocab_size=second.vocab_size if second else 5)
            gpt2.save_pretrained(model, tmp_path / 'm', second)
            again, tokenizer = (
                GPT.from_pretrained(tmp_path / 'm'),
                read_tokenizer(tmp_path / 'm'),
            )
            assert again.config.vocab_size == model.config.vocab_size
            assert type(tokenizer) is type(second)
            assert second is None or tokenizer.vocab_size == second.vocab_size
            fresh = tmp_path / 'fresh'
            shutil.rmtree(fresh, ignore_errors=True)
            gpt2.save_pretrained(model, fresh, second)
            assert sorted(p.name for p in fresh.iterdir()) == sorted(
                p.name for p in (tmp_path / 'm').iterdir()
            )
            theirs = transformers.GPT2LMHeadModel.from_pretrained(fresh)
            x = torch.tensor([[1, 2, 3, 0]])
            with torch.no_grad():
                torch.testing.assert_close(theirs(x).logits, model(x)[0], rtol=1e-4, atol=1e-4)
            if second is not None:
                text = 'abcdaab' if second is not words else 'the cat sat'
                read = transformers.AutoTokenizer.from_pretrained(fresh)
                assert read(text)['input_ids'] == second.encode(text)


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    gpt2.save_pretrained(tiny(vocab_size=5), tmp_path)
    (tmp_path / 'vocab.json').write_text(json.dumps(CharTokenizer('abcdefgh').stoi))
    with pytest.raises(ValueError, match='the tokenizer has id 7, and the model has 5 tokens'):
        gpt2.load(tmp_path, 'cpu')


def test_a_checkpoint_is_not_written_into(tmp_path, capsys):
    "Not by a model or a tokenizer that is saved there; and it is read as any model is."
    tokenizer, folder = CharTokenizer('abcde'), tmp_path / 'checkpoints' / 'step-00000001'
    gpt2.save_pretrained(tiny(vocab_size=5), folder, tokenizer)
    for name in 'optimizer.pt', 'trainer.json':
        (folder / name).write_text('{}')
    sums = [
        f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n'
        for p in sorted(folder.iterdir())
    ]
    (folder / 'SHA256SUMS').write_text(''.join(sums))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(
        ValueError, match='is a checkpoint, and what is written into it would damage it'
    ):
        gpt2.save_pretrained(tiny(vocab_size=5), folder, tokenizer)
    with pytest.raises(ValueError, match='is a checkpoint'):
        tokenizer.save(folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    for place in folder, tmp_path:
        assert gpt2.load(place, 'cpu')[1].chars == tokenizer.chars
        mingpt_nb.utils.cli(['generate', f'--model={place}', '--max_new_tokens=3', 'abba'])
        assert capsys.readouterr().out.startswith('abba')
    spoilt = bytearray(before['model.safetensors'])
    spoilt[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(spoilt)
    with pytest.raises(ValueError, match='model.safetensors does not have the checksum'):
        gpt2.load(tmp_path, 'cpu')


@pytest.mark.parametrize(
    'kind',
    [
        'GPT2ForSequenceClassification',
        'GPT2ForTokenClassification',
        'GPT2ForQuestionAnswering',
        'GPT2DoubleHeadsModel',
    ],
)
def test_a_head_beside_the_model_is_named(tmp_path, kind):
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(
        transformers.GPT2Config(**SMALL | dict(num_labels=1 if 'Double' in kind else 3))
    ).eval()
    save(theirs, tmp_path)
    with pytest.warns(UserWarning, match='which is left out: ') as seen:
        ours = GPT.from_pretrained(tmp_path)
    heads = [
        n for n, _ in theirs.named_parameters() if not n.startswith(('transformer.', 'lm_head.'))
    ]
    assert len(seen) == 1 and heads and all(n in str(seen[0].message) for n in heads)
    x = ids(theirs)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.hidden(x), theirs.transformer(x).last_hidden_state, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    'wrap',
    [
        torch.nn.DataParallel,
        lambda m: torch.compile(m, backend='eager'),
        lambda m: torch.nn.DataParallel(torch.compile(m, backend='eager')),
    ],
)
def test_a_wrapped_model_is_saved_as_the_model(tmp_path, words, wrap):
    for tied in True, False:
        model = tiny(tie_weights=tied)
        gpt2.save_pretrained(wrap(model), tmp_path, words)
        assert not [
            n
            for n in load_file(tmp_path / 'model.safetensors')
            if 'module' in n or '_orig_mod' in n
        ]
        again, _ = gpt2.load(tmp_path, 'cpu')
        assert again.config.to_dict() == model.config.to_dict()
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_ids_that_the_tokenizer_lacks_are_not_drawn(tmp_path, words, capsys):
    "A vocabulary padded to three times its size, from the command line and in functions."
    from mingpt_nb.chargpt import write_text

    model = tiny(vocab_size=900)
    torch.nn.init.normal_(model.lm_head.weight)
    gpt2.save_pretrained(model, tmp_path, words)
    for more in [], ['--temperature=0'], ['--top_k=900'], ['--top_p=0.9']:
        gpt2.main(
            [
                f'--model={tmp_path}',
                '--device=cpu',
                '--max_new_tokens=60',
                '--seed=1',
                *more,
                'the cat',
            ]
        )
        assert capsys.readouterr().out.startswith(
            'the cat'
        )  # an id that means nothing would be an error
    model, tokenizer = gpt2.load(tmp_path, 'cpu')
    assert model.generate(torch.tensor([[1]]), 60, do_sample=True).max() >= words.vocab_size
    assert len(gpt2.next_tokens(model, tokenizer, 'the', k=900)) == len(words.encoder)
    assert len(write_text(model, CharTokenizer('abc'), 'a', 100)) == 101


# ---- tokenizers of others ------------------------------------------------------------------------

NAMES = [
    '<user>',
    '<pad>',
    'hello',
    ' the',
    '\n\n',
    '<|im_start|>',
    '<user',
    'bot',
    'x y',
    '1',
    '中',
    'cat',
]
PIECES = [
    'the',
    ' ',
    '  ',
    'cat',
    'hello',
    'Hello',
    '<user>',
    '<pad>',
    '<|endoftext|>',
    '<|im_start|>',
    '<|im',
    'é',
    'É',
    'e\u0301',
    '中',
    '\n',
    '\n\n',
    '1',
    'x y',
    "'s",
    '.',
    'bot',
    ' bot',
    '<',
    '>',
    '\t',
    '🤗',
    ' the',
]


def texts(rng, n=25):
    return [''.join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(n)]


AROUND = {
    'type': 'TemplateProcessing',
    'single': [
        {'SpecialToken': {'id': '<|endoftext|>', 'type_id': 0}},
        {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
    'special_tokens': {
        '<|endoftext|>': {'id': '<|endoftext|>', 'ids': [299], 'tokens': ['<|endoftext|>']}
    },
}
NOTHING = {
    'type': 'TemplateProcessing',
    'single': [{'Sequence': {'id': 'A', 'type_id': 0}}],
    'pair': AROUND['pair'],
    'special_tokens': {},
}
ODD = [
    (('pre_tokenizer', 'add_prefix_space'), True),
    (('pre_tokenizer', 'use_regex'), False),
    (('normalizer',), {'type': 'Lowercase'}),
    (('normalizer',), {'type': 'NFC'}),
    (('normalizer',), {'type': 'Sequence', 'normalizers': []}),
    (('post_processor',), AROUND),
    (('normalizer',), {'type': 'Sequence', 'normalizers': [{'type': 'NFD'}]}),
    (('post_processor',), NOTHING),
    (
        ('post_processor',),
        {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True},
    ),
    (
        ('post_processor',),
        {
            'type': 'RobertaProcessing',
            'sep': ['a', 5],
            'cls': ['b', 6],
            'trim_offsets': True,
            'add_prefix_space': False,
        },
    ),
    (('model', 'ignore_merges'), True),
    (('model', 'dropout'), 0.5),
    (('model', 'byte_fallback'), True),
    (('pre_tokenizer',), None),
    (
        ('pre_tokenizer',),
        {
            'type': 'Sequence',
            'pretokenizers': [
                {
                    'type': 'ByteLevel',
                    'add_prefix_space': False,
                    'trim_offsets': True,
                    'use_regex': True,
                }
            ],
        },
    ),
    (
        ('pre_tokenizer',),
        {
            'type': 'Sequence',
            'pretokenizers': [
                {'type': 'Digits', 'individual_digits': True},
                {
                    'type': 'ByteLevel',
                    'add_prefix_space': False,
                    'trim_offsets': True,
                    'use_regex': True,
                },
            ],
        },
    ),
]


@pytest.mark.parametrize('seed', range(6))
def test_a_tokenizer_gives_the_ids_of_tokenizers_or_is_refused(tmp_path, words, seed):
    """A tokenizer.json with tokens, flags and settings at random: the ids of Hugging Face's
    library, also when saved again, or the setting by name."""
    tokenizers, rng, same, refused = (
        pytest.importorskip('tokenizers'),
        random.Random(seed),
        0,
        set(),
    )
    for _ in range(40):
        found, names, new = (
            tokenizer_json(words.encoder, words.bpe_ranks, words.special_tokens, words.words),
            set(),
            itertools.count(words.vocab_size),
        )
        for name in rng.sample(NAMES, rng.randrange(4)):
            special = rng.random() < 0.5
            token = dict(
                id=found['model']['vocab'][name] if name in words.encoder else next(new),
                content=name,
                special=special,
                normalized=rng.choice([special, not special]),
                lstrip=False,
                rstrip=False,
                single_word=False,
            )
            found['added_tokens'].append(token)
            if rng.random() < 0.1:
                names.add(flag := rng.choice(['lstrip', 'rstrip', 'single_word']))
                token[flag] = True
        found['added_tokens'].sort(key=lambda t: t['id'])
        for path, value in rng.sample(ODD, rng.choice([0, 0, 1])):
            (found if len(path) == 1 else found[path[0]])[path[-1]] = value
            names.add(path[-1])
        (tmp_path / 'tokenizer.json').write_text(json.dumps(found), encoding='utf-8')
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
        try:
            ours = mingpt_nb.bpe.load_tokenizer(tmp_path)
        except ValueError as e:
            said = {name for name in {*names, 'normalized'} if name in str(e)}
            assert said and 'tokenizer.json: ' in str(e), (names, str(e))
            refused |= said
            continue
        ours.save(tmp_path / 'again')
        again = mingpt_nb.bpe.load_tokenizer(tmp_path / 'again')
        for text in texts(rng):
            want = theirs.encode(text).ids
            assert ours.encode(text, 'all') == want and again.encode(text, 'all') == want, (
                text,
                found['added_tokens'],
            )
            assert ours.decode(want) == text
        same += 1
    assert same > 5 and refused


@pytest.mark.parametrize('seed', range(2))
def test_added_tokens_beside_a_vocabulary(tmp_path, words, seed):
    """What older versions of transformers write: ids and sizes as AutoTokenizer has them, or the
    setting that is not supported."""
    rng, same, refused = random.Random(seed), 0, set()
    for case in range(15):
        folder = tmp_path / str(case)
        words.save(folder)
        (folder / 'config.json').write_text('{"model_type": "gpt2"}')
        chosen = [n for n in rng.sample(NAMES, rng.randrange(5)) if n not in words.encoder]
        special = [n for n in chosen if rng.random() < 0.4]
        if chosen:
            (folder / 'added_tokens.json').write_text(
                json.dumps({n: words.vocab_size + k for k, n in enumerate(chosen)})
            )
        if special:
            (folder / 'special_tokens_map.json').write_text(
                json.dumps({'pad_token': special[0], 'additional_special_tokens': special[1:]})
            )
        config = {
            name: True for name in ('add_prefix_space', 'add_bos_token') if rng.random() < 0.15
        }
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
        if config:
            with pytest.raises(
                ValueError,
                match=f'tokenizer_config.json: {next(iter(config))}=True: only False is supported',
            ):
                mingpt_nb.bpe.load_tokenizer(folder)
            refused |= config.keys()
            continue
        ours, theirs = (
            mingpt_nb.bpe.load_tokenizer(folder),
            transformers.AutoTokenizer.from_pretrained(folder),
        )
        assert ours.vocab_size == len(theirs) == words.vocab_size + len(chosen) and set(
            special
        ) <= set(ours.special_tokens)
        for text in texts(rng):
            assert ours.encode(text, 'all') == theirs(text)['input_ids'], (text, chosen, special)
        same += 1
    assert same and refused


def test_a_model_with_added_tokens_gets_all_of_them(tmp_path, words):
    "In both directions."
    model = tiny(vocab_size=words.vocab_size + 3)
    theirs = transformers.GPT2Tokenizer.from_pretrained(
        words.save(tmp_path / 'w') or tmp_path / 'w'
    )
    theirs.add_tokens(['<user>', 'Wherefore']), theirs.add_special_tokens({'pad_token': '<pad>'})
    gpt2.save_pretrained(model, tmp_path / 'm')
    theirs.save_pretrained(tmp_path / 'm')
    _, ours = gpt2.load(tmp_path / 'm', 'cpu')
    assert (
        ours.vocab_size == model.config.vocab_size
        and ours.words.keys() == {'<user>', 'Wherefore'}
        and '<pad>' in ours.special_tokens
    )
    text = 'Wherefore<user> sat the cat?<pad>'
    gpt2.save_pretrained(model, tmp_path / 'm', ours)
    assert gpt2.load(tmp_path / 'm', 'cpu')[1].encode(text, 'all') == theirs(text)['input_ids']
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')(text)['input_ids']
        == theirs(text)['input_ids']
    )
