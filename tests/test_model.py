"""Properties of the model that hold for every shape, and what it takes as input."""

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mingpt_nb.model import GPT
from mingpt_nb.utils import CfgNode, set_seed

settings.register_profile('book', derandomize=True, deadline=None, max_examples=25)
settings.load_profile('book')


@st.composite
def configs(draw):
    n_head = draw(st.integers(1, 4))
    c = GPT.get_default_config()
    c.merge_from_dict(
        dict(
            n_layer=draw(st.integers(1, 3)),
            n_head=n_head,
            n_embd=n_head * draw(st.integers(1, 8)),
            vocab_size=draw(st.integers(2, 40)),
            block_size=draw(st.integers(1, 9)),
            tie_weights=draw(st.booleans()),
        )
    )
    return c


def make(config):
    "A model far from the start, where all tokens look alike."
    set_seed(0)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@given(configs(), st.integers(1, 3), st.integers(1, 20), st.integers(0, 20), st.booleans())
def test_cached_and_uncached_generation_agree(config, B, T, new, do_sample):
    model = make(config)
    idx = torch.randint(model.config.vocab_size, (B, T))
    draw = lambda use_cache: model.generate(
        idx,
        new,
        do_sample=do_sample,
        temperature=0.7,
        use_cache=use_cache,
        generator=torch.Generator().manual_seed(0),
    )
    cached = draw(True)
    assert cached.shape == (B, T + new)
    assert torch.equal(cached, draw(False))
    assert torch.equal(cached[:, :T], idx)


@given(configs(), st.integers(1, 3))
def test_the_past_does_not_see_the_future(config, B):
    model = make(config)
    T, V = model.block_size, model.config.vocab_size
    idx = torch.randint(V, (B, T))
    logits = model(idx)[0]
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % V
        torch.testing.assert_close(model(changed)[0][:, :t], logits[:, :t], rtol=1e-4, atol=1e-4)


@given(configs(), st.integers(1, 4))
def test_a_batch_is_its_rows(config, B):
    model = make(config)
    idx = torch.randint(model.config.vocab_size, (B, model.block_size))
    rows = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(model(idx)[0], rows, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_generate():
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=50, block_size=16))
    model = GPT(c).bfloat16()
    idx = torch.randint(50, (2, 4))
    assert model.generate(idx, 30, do_sample=True, top_k=5, top_p=0.9).shape == (2, 34)
    assert model(idx, idx)[1].dtype == torch.float32


def test_the_checks_do_not_break_the_graph():
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=50, block_size=16))
    model = GPT(c).eval()
    explained = torch._dynamo.explain(model)(torch.randint(50, (2, 16)), torch.randint(50, (2, 16)))
    assert explained.graph_break_count == 0


def test_values_survive_the_command_line():
    @given(
        st.dictionaries(
            st.from_regex(r'[a-z]\w{0,8}', fullmatch=True),
            st.one_of(
                st.booleans(),
                st.integers(),
                st.floats(allow_nan=False),
                st.text(max_size=20).filter(lambda s: s != 'None'),
            ),
            min_size=1,
        )
    )
    def check(values):
        config = CfgNode(**{k: type(v)() for k, v in values.items()}).freeze()
        config.merge_from_args([f'--{k}={v}' for k, v in values.items()])
        assert config.to_dict() == values
        assert {k: type(v) for k, v in config.to_dict().items()} == {
            k: type(v) for k, v in values.items()
        }

    check()


def test_numbers_of_numpy_and_torch_make_a_config_of_python_numbers():
    config = GPT.get_default_config()
    config.merge_from_dict(
        dict(
            n_layer=np.int64(1),
            n_head=torch.tensor(2),
            n_embd=np.uint8(8),
            vocab_size=np.int64(65),
            block_size=8.0,
            embd_pdrop=np.float32(0),
            attn_pdrop=torch.tensor(0.5),
            tie_weights=np.bool_(True),
        )
    )
    model = GPT(config)
    found = model.config.to_dict()
    assert {type(v) for v in found.values()} <= {int, float, bool, str, type(None)}
    assert json.loads(json.dumps(found)) == found
    assert (
        found['vocab_size'],
        found['block_size'],
        found['attn_pdrop'],
        found['tie_weights'],
    ) == (65, 8, 0.5, True)
    assert model.lm_head.weight is model.transformer.wte.weight


def small(**kwargs):
    c = GPT.get_default_config()
    c.merge_from_dict(
        dict(
            n_layer=2,
            n_head=2,
            n_embd=8,
            vocab_size=11,
            block_size=6,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
        )
        | kwargs
    )
    return GPT(c)


@pytest.mark.parametrize(
    'dtype',
    [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32],
)
def test_every_type_of_integer_is_an_id(dtype):
    model = small().eval()
    x, y = torch.tensor([[0, 1, 10]]), torch.tensor([[1, 10, 0]])
    assert torch.equal(model(x.to(dtype), y.to(dtype))[1], model(x, y)[1])
    assert torch.equal(model.generate(x.to(dtype), 8), model.generate(x, 8))
    with pytest.raises(ValueError, match=r'token id 11 at \[0, 2\]'):
        model((x + 1).to(dtype))
    with pytest.raises(ValueError, match=r'token id 11 at \[0, 1\] of targets'):
        model(x, (y + 1).to(dtype))


def test_threads_that_write_at_once_leave_the_mode_of_before():
    model = small().train()
    model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    idx, wait, texts = torch.tensor([[1, 2]]), threading.Barrier(3), []

    def write(n):
        wait.wait()
        for _ in range(4):
            texts.append(model.generate(idx, n)[0].tolist())
            for _ in model.stream(idx, n):
                pass
            with pytest.raises(ValueError):
                model.generate(idx + 10, n)

    threads = [threading.Thread(target=write, args=[n]) for n in (3, 4, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [m.training for m in model.modules()] == before
    longest = model.eval().generate(idx, 5)[0].tolist()
    assert len(texts) == 12 and all(
        text == longest[: len(text)] for text in texts
    )  # none with dropout


@pytest.mark.parametrize('sample', [False, True])
def test_weights_that_are_not_finite_write_nothing(sample):
    for name in 'lm_head.weight', 'transformer.wpe.weight', 'transformer.h.1.mlp.c_proj.bias':
        for bad in float('nan'), float('inf'):
            model = small()
            model.get_parameter(name).data.fill_(bad)
            with pytest.raises(
                ValueError, match='the logits at position 2 of sequence 0 hold .* choose no token'
            ):
                model.generate(torch.tensor([[1, 2]]), 3, do_sample=sample)
