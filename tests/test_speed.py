"""What the chapter on speed cannot show: other models, other processors, and what must not move."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from mingpt_nb import speed
from mingpt_nb.llama import Llama
from mingpt_nb.model import GPT
from mingpt_nb.speed import StaticStep, drafted, fast, look_up, speculate, write_static
from mingpt_nb.utils import CfgNode, set_seed

SIZES = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=97, block_size=48)
IDX = torch.tensor([[5, 9, 2, 44, 7]])


def gpt(**sizes):
    set_seed(0)
    model = GPT(CfgNode(model_type=None, **SIZES | sizes)).eval()
    for p in model.parameters():
        p.data.mul_(3)
    return model


def llama():
    set_seed(0)
    config = Llama.get_default_config()
    config.merge_from_dict(SIZES | dict(n_kv_head=2, n_inner=128))
    model = Llama(config).eval()
    for p in model.parameters():
        p.data.mul_(3) if p.dim() == 2 else None
    return model


@pytest.mark.parametrize('make', [gpt, llama])
def test_tokens_are_the_same(make):
    model = make()
    for how in dict(), dict(tune=False), dict(guess=look_up), dict(guess=drafted(model)):
        quick = fast(model, **how)
        for idx in IDX, IDX.repeat(3, 1), IDX[:, :1].repeat(20, 1):
            assert torch.equal(quick.generate(idx, 30), model.generate(idx, 30))
        assert torch.equal(quick.generate(IDX, 60), model.generate(IDX, 60))  # the window slides
    gains = []
    new = torch.cat(list(speculate(model, IDX, 30, drafted(model), gains=gains)))
    assert torch.equal(new, model.generate(IDX, 30)[0, 5:]) and gains == [5] * 6


@pytest.mark.parametrize('make', [gpt, llama])
@pytest.mark.parametrize('bits', [16, 8])
def test_fewer_bits_are_near(make, bits):
    model = make()
    for tune in True, False:
        quick = fast(model, bits=bits, tune=tune)
        with torch.no_grad():
            right, found = model.next_logits(IDX[:, :1]), quick.next_logits(IDX[:, :1])
        assert speed.relative_error(found, right) < 0.1
        assert (quick.choices != {}) and all(f', {bits} bits' in key for key in quick.choices)


def test_untied_odd_sizes_and_other_activations():
    for sizes in dict(n_embd=36, n_head=3), dict(activation='relu'), dict(n_inner=50):
        model = gpt(**sizes, tie_weights=True)
        for bits in None, 16, 8:
            assert fast(model, bits=bits).generate(IDX, 9).shape == (1, 14)
        assert torch.equal(fast(model).generate(IDX, 30), model.generate(IDX, 30))


def test_a_layer_that_is_used_twice_and_one_that_is_quantised_by_somebody_else():
    model = gpt()
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    assert torch.equal(fast(model).generate(IDX, 30), model.generate(IDX, 30))
    nn.utils.parametrizations.weight_norm(model.transformer.h[0].attn.c_attn)
    nn.utils.parametrizations.spectral_norm(model.transformer.h[1].attn.c_proj)
    assert torch.equal(fast(model).generate(IDX, 30), model.eval().generate(IDX, 30))


def test_nothing_global_moves():
    def state():
        onednn = torch.backends.mkldnn
        switches = onednn.enabled, torch.get_num_threads(), torch.get_default_dtype()
        return *switches, torch.is_grad_enabled(), torch.get_rng_state().tolist()

    before, model = state(), gpt()
    before = state()
    for bits in None, 16, 8:
        fast(model, bits=bits).generate(IDX.repeat(5, 1), 5)
    assert state() == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any('forward' in vars(m) or 'bare' in vars(m) for m in model.modules())


def test_threads_write_while_another_one_trains_a_copy():
    model, wrong = gpt(), []
    right = {n: model.generate(IDX.repeat(n, 1), 20) for n in range(1, 7)}
    quick = fast(model)

    def write(n):
        for _ in range(3):
            if not torch.equal(quick.generate(IDX.repeat(n, 1), 20), right[n]):
                wrong.append(n)

    threads = [threading.Thread(target=write, args=[n]) for n in right]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_it_follows_training():
    model = gpt()
    quick = fast(model, bits=8, tune=False)
    quick.generate(IDX, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(IDX[:, :-1], IDX[:, 1:])[1].backward()
    optimizer.step()
    fresh = fast(model, bits=8, tune=False)
    assert torch.equal(quick.generate(IDX, 30), fresh.generate(IDX, 30)) and model.training
    model.load_state_dict(gpt().state_dict())
    assert torch.equal(quick.generate(IDX, 30), fast(gpt(), bits=8, tune=False).generate(IDX, 30))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_recorded_step_writes_the_same():
    model = gpt().cuda()
    step = StaticStep(model, 2, 48)
    idx = IDX.repeat(2, 1).cuda()
    with torch.inference_mode():
        step.record()
    assert torch.equal(write_static(step, idx, 30), model.generate(idx, 30))


PROGRAM = """
import torch
from mingpt_nb import speed
from test_speed import IDX, gpt

model = gpt()
for tune in True, False:
    for idx in IDX, IDX.repeat(8, 1):
        quick = speed.fast(model, tune=tune)
        assert torch.equal(quick.generate(idx, 20), model.generate(idx, 20))
        for bits in 16, 8:
            few = speed.fast(model, bits=bits, tune=tune)
            with torch.no_grad():
                pair = few.next_logits(idx[:, :1]), model.next_logits(idx[:, :1])
            assert speed.relative_error(*pair) < 0.1, (bits, few.choices)
"""


@pytest.mark.parametrize('isa', [('default', 'SSE41', 'SSE4_2'), ('avx2', 'AVX2', 'AVX2')])
def test_on_an_older_processor(isa):
    names = 'ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA', 'MKL_ENABLE_INSTRUCTIONS'
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    env = os.environ | dict(zip(names, isa)) | {'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-c', PROGRAM], env=env, check=True)
