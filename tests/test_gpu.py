"What only a GPU can show. All of it is skipped where there is none."

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch

from mingpt_nb.gpt2 import next_tokens
from mingpt_nb.llama import Llama
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer, speed
from mingpt_nb.speed import StaticStep, fast, write_static
from mingpt_nb.trainer import Trainer as PlainTrainer
from mingpt_nb.utils import set_seed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


class Steps:
    "Rows that count up, by 1 to 3."

    def __len__(self):
        return 500

    def __getitem__(self, i):
        row = torch.arange(i, i + 17) * (1 + i % 3) % 50
        return row[:-1], row[1:]


def gpt(**sizes):
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=50, block_size=16) | sizes)
    c.merge_from_dict(dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0))
    set_seed(3)
    return GPT(c)


def trained(kind=Trainer, model=None, data=None, **settings):
    t = kind.get_default_config()
    t.merge_from_dict(dict(max_iters=30, batch_size=32, seed=1, log_every=1, progress=False))
    t.merge_from_dict(dict(learning_rate=3e-3) | settings)
    trainer = kind(t, model or gpt(), data or Steps())
    trainer.run()
    return trainer


def sharpen(model):
    "So that the best token does not hang on rounding."
    for p in model.parameters():
        p.data.mul_(4)


def losses(trainer):
    return torch.tensor([row['loss'] for row in trainer.history])


def test_a_run_is_that_of_the_cpu():
    cpu = losses(trained(device='cpu', dtype='float32'))
    assert cpu[-1] < 0.7 * cpu[0]
    for kind, settings in itertools.product((PlainTrainer, Trainer), (dict(), dict(seed=1))):
        if kind is Trainer:
            settings |= dict(dtype='float32')
        t = trained(kind, **settings)
        assert t.device.startswith('cuda')
        torch.testing.assert_close(losses(t), cpu, rtol=0, atol=0.02)  # products in TF32


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_small_types_learn_the_same(dtype):
    wide, small = (losses(trained(dtype=d, max_iters=60)) for d in ('float32', dtype))
    assert (wide - small).abs().max() < 0.15 and small[-10:].mean() < 0.6 * small[0]


@pytest.mark.filterwarnings('default:.torch.jit.script')  # what torch 2.11 says of itself
def test_a_compiled_run_learns_the_same():
    plain, compiled = (losses(trained(dtype='float32', compile=c)) for c in (False, True))
    torch.testing.assert_close(plain, compiled, rtol=0, atol=0.02)


def test_a_run_that_is_resumed_goes_on_as_before(tmp_path):
    whole = trained(work_dir=str(tmp_path / 'whole'), dtype='float32')
    folder = str(tmp_path / 'parts')
    settings = dict(work_dir=folder, dtype='float32', checkpoint_every=10)
    trained(max_iters=10, **settings)
    rest = trained(resume='auto', **settings)
    assert rest.iter_num == 30
    torch.testing.assert_close(losses(rest)[10:], losses(whole)[10:], rtol=0, atol=0.02)


def test_memory_that_runs_out_is_found_by_halving():
    big = dict(n_layer=4, n_head=4, n_embd=512, model_type=None, block_size=256)
    rows = [(torch.arange(256) % 50, torch.arange(1, 257) % 50)] * 512
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3e9 / whole)  # of bytes
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            t = trained(model=gpt(**big), data=rows, batch_size=512, max_iters=2, dtype='float32')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert t.engine.parts > 1 and t.iter_num == 2 and losses(t).isfinite().all()
    assert any('memory' in str(w.message) for w in seen)


def test_an_id_that_the_model_lacks_is_named():
    class Wrong(Steps):
        def __getitem__(self, i):
            return torch.full((4,), 50), torch.full((4,), 50)

    for kind in PlainTrainer, Trainer:
        with pytest.raises(ValueError, match=r'token id 50 at \[0, 0\] is outside \[0, 50\)'):
            trained(kind, data=Wrong(), check_alignment=False)
    torch.cuda.synchronize()  # and the GPU goes on


@pytest.mark.parametrize('kind', [GPT, Llama])
def test_ids_may_lie_on_the_cpu(kind):
    if kind is GPT:
        model = gpt().eval()
    else:
        c = Llama.get_default_config()
        c.merge_from_dict(dict(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_kv_head=2))
        c.merge_from_dict(dict(model_type='llama', n_embd=32, n_inner=64))
        model = Llama(c).eval()
    sharpen(model)
    idx, rows = torch.arange(6)[None], [[1, 2, 3], [4], [5, 6]]
    expected = model.generate(idx, 8), model.generate(rows, 8), model(idx, idx)[1]
    model.cuda()
    out = model.generate(idx, 8), model.generate(rows, 8), model(idx, idx)[1].cpu()
    assert torch.equal(out[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(out[1], expected[1]))
    torch.testing.assert_close(out[2], expected[2], rtol=0, atol=1e-2)
    assert torch.equal(model.generate(idx.cuda(), 8).cpu(), out[0])
    assert torch.equal(fast(model).generate(idx, 8).cpu(), out[0])


def test_next_tokens_of_a_model_on_a_gpu():
    class Letters:
        encode = staticmethod(lambda text: [ord(c) - 97 for c in text])
        decode = staticmethod(lambda ids: ''.join(chr(97 + i) for i in ids))

    found = next_tokens(gpt().eval().cuda(), Letters, 'abc', k=5)
    assert len(found) == 5 and all(0 < p < 1 for _, p in found)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_recorded_step_writes_what_the_model_does(dtype):
    model = gpt(block_size=64).eval().cuda().to(dtype)
    sharpen(model)
    idx = torch.arange(8, device='cuda').reshape(2, 4)
    step = StaticStep(model, 2, 40)
    with torch.inference_mode():
        step.record()
    same = (write_static(step, idx, 30) == model.generate(idx, 30)).float().mean()
    assert same == 1 if dtype == torch.float32 else same > 0.5


def test_the_share_of_the_peak():
    t = trained(dtype='bfloat16')
    if (mfu := speed(t)['mfu']) is not None:
        assert 0 < mfu < 1


def test_one_process_of_torchrun_speaks_nccl(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=1']
    command += ['--no-python', sys.executable, '-c', 'from mingpt_nb.utils import cli; cli()']
    command += ['adder', '--trainer.max_iters=20', f'--system.work_dir={tmp_path}/out']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'model: {tmp_path}' in done.stdout
