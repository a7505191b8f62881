"""Llama, Mistral, Qwen2 and Qwen3 of random shapes against transformers: in, out, refused; and the
file of SmolLM2 against transformers reading the same file."""

import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

from theirs import assert_same, edit, ids, save, shaken

from mingpt_nb import llama
from mingpt_nb.data import smollm2
from mingpt_nb.llama import Llama
from mingpt_nb.model import GPT
from mingpt_nb.trainer import Trainer
from mingpt_nb.utils import CfgNode

KINDS = 'llama', 'mistral', 'qwen2', 'qwen3'
LLAMA3 = dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0)


def shape(kind, seed):
    "The fields of a small model: the first seeds have what matters, the others are drawn."
    draw = random.Random(f'{kind} {seed}')
    heads, share = draw.randint(1, 4), draw.choice([1, 2, 3])
    size, context = 2 * draw.randint(2, 16), draw.choice([16, 40, 90])
    fields = dict(
        vocab_size=draw.randint(50, 300),
        hidden_size=heads * share * (size if kind == 'qwen2' else draw.randint(3, 20)),
        intermediate_size=draw.randint(5, 90),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads * share,
        num_key_value_heads=heads,
        head_dim=size,
        max_position_embeddings=context,
        rms_norm_eps=10 ** draw.uniform(-7, -2),
        tie_word_embeddings=draw.random() < 0.5,
        rope_theta=10 ** draw.uniform(2, 6),
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    scaling = [
        None,
        dict(rope_type='linear', factor=draw.uniform(1, 8)),
        LLAMA3 | dict(factor=8.0, original_max_position_embeddings=context // 2),
        dict(rope_type='dynamic', factor=2.0),
    ][seed % 4]
    if scaling:
        fields['rope_scaling'] = scaling
    if kind == 'mistral':
        fields['sliding_window'] = [None, context, 10 * context][seed % 3]
    if kind == 'llama':
        fields |= dict(attention_bias=seed % 3 == 1, mlp_bias=seed % 5 == 2)
    if kind == 'qwen3':
        fields['attention_bias'] = seed % 3 == 1
    if kind.startswith('qwen'):
        fields |= dict(use_sliding_window=seed % 2 == 1, sliding_window=4, max_window_layers=9)
    if seed % 7 == 6:
        fields['hidden_act'] = 'gelu'
    return fields


def hf(kind, **fields):
    torch.manual_seed(len(str(fields)))
    config = transformers.AutoConfig.for_model(kind, **fields)
    return shaken(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def greedy(theirs, x, n):
    "Greedy tokens by transformers' logits, its window sliding as ours does, and how sure they are."
    margin = float('inf')
    for _ in range(n):
        logits = theirs(x[:, -theirs.config.max_position_embeddings :]).logits[:, -1]
        best = logits.topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        x = torch.cat((x, best.indices[:, :1]), dim=1)
    return x, margin


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('kind', KINDS)
def test_random_shapes(tmp_path, kind, seed):
    theirs = hf(kind, **shape(kind, seed))
    ours = Llama.from_pretrained(save(theirs, tmp_path / 'in'))
    assert not ours.training
    assert_same(ours, theirs)
    assert_same(ours, theirs, T=5)
    numbers = sum(p.numel() for p in ours.parameters())
    assert numbers == llama.count_params(ours.config) == sum(p.numel() for p in theirs.parameters())
    x = ids(theirs, B=2, T=4, seed=seed)
    want, margin = greedy(theirs, x, 40)
    if margin > 1e-4:  # a tie may go either way
        assert torch.equal(ours.generate(x, 40), want)
        assert torch.equal(ours.generate(x, 40, use_cache=False), want)
    ours.save_pretrained(tmp_path / 'out')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert type(back) is type(theirs)
    again, direct = Llama.from_pretrained(tmp_path / 'out'), ours.to_hf()
    for (name, p), q, r in zip(theirs.named_parameters(), back.parameters(), direct.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r), name
    for (name, p), q in zip(ours.named_parameters(), again.named_parameters()):
        assert name == q[0] and torch.equal(p, q[1]), name
    assert again.config.to_dict() == ours.config.to_dict()
    x = ids(theirs)
    with torch.no_grad():
        for other in back, direct:
            torch.testing.assert_close(other(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)


def small(tmp_path, kind='llama', name='m', **fields):
    theirs = hf(kind, **shape(kind, 0) | fields)
    return theirs, save(theirs, tmp_path / name)


def test_formats(tmp_path):
    theirs, folder = small(tmp_path, tie_word_embeddings=True)
    x = ids(theirs)
    want = Llama.from_pretrained(folder)(x)[0]
    weights = load_file(folder / 'model.safetensors')
    config = (folder / 'config.json').read_text()
    table = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    variants = dict(
        plain={k.removeprefix('model.'): v for k, v in weights.items()},
        old=weights | table,
        head=weights | {'lm_head.weight': weights['model.embed_tokens.weight'].clone()},
    )
    for name, tensors in variants.items():
        to = tmp_path / name
        to.mkdir()
        (to / 'config.json').write_text(config)
        save_file(tensors, to / 'model.safetensors')
        assert torch.equal(Llama.from_pretrained(to)(x)[0], want), name
    shards = save(theirs, tmp_path / 'shards', max_shard_size='10KB')
    assert len(list(shards.glob('model-*'))) > 1
    assert torch.equal(Llama.from_pretrained(shards)(x)[0], want)
    (shards / next(shards.glob('model-*')).name).unlink()
    with pytest.raises(FileNotFoundError, match='lacks model-0'):
        Llama.from_pretrained(shards)


def test_older_words_for_rotary_positions(tmp_path):
    "What files of transformers 4 say: `rope_theta` and `rope_scaling`, some with `type`."
    scaling = LLAMA3 | dict(factor=8.0, original_max_position_embeddings=20)
    theirs, folder = small(tmp_path, rope_theta=777.0, rope_scaling=scaling)
    edit(folder, rope_parameters=None, rope_theta=777.0, rope_scaling=scaling)
    assert_same(Llama.from_pretrained(folder), theirs)
    theirs, folder = small(tmp_path, rope_scaling=dict(rope_type='linear', factor=2.0))
    edit(folder, rope_parameters=None, rope_theta=theirs.config.rope_parameters['rope_theta'])
    edit(folder, rope_scaling={'type': 'linear', 'factor': 2.0})
    assert_same(Llama.from_pretrained(folder), theirs)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    theirs = hf('qwen3', **shape('qwen3', 0)).to(dtype)
    folder = save(theirs, tmp_path / 'half')
    ours = Llama.from_pretrained(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same(ours, whole.eval())
    kept = Llama.from_pretrained(folder, dtype=None)
    assert {p.dtype for p in kept.parameters()} == {dtype}
    assert kept.generate(ids(theirs, T=3), 5).shape == (3, 8)
    kept.save_pretrained(tmp_path / 'again')
    again = load_file(tmp_path / 'again' / 'model.safetensors')
    for k, v in load_file(folder / 'model.safetensors').items():
        assert again[k].dtype == dtype and torch.equal(again[k], v)


REFUSED = {
    "model_type='gemma2' is not supported": dict(model_type='gemma2'),
    "rope_type='yarn' is not supported": dict(rope_parameters=dict(rope_type='yarn', factor=2)),
    'partial_rotary_factor=0.5': dict(partial_rotary_factor=0.5),
    'factor must be a number': dict(rope_parameters=dict(rope_type='linear')),
    'quantization_config': dict(quantization_config={'bits': 8}),
    'missing: model.layers.': dict(num_hidden_layers=9),
    'unexpected: model.layers.1.': dict(num_hidden_layers=1),
    'is not a multiple of n_kv_head': dict(num_key_value_heads=5, num_attention_heads=6),
    'of another shape: model.embed_tokens.weight': dict(vocab_size=400),
    'head_size=3 is odd': dict(head_dim=3),
    'missing: lm_head.weight': dict(tie_word_embeddings=False),
    'it describes a model of': dict(num_hidden_layers=10**6),
    'unknown activation': dict(hidden_act='gelu_fast'),
}


@pytest.mark.parametrize('says', REFUSED)
def test_refused(tmp_path, says):
    _, folder = small(tmp_path, tie_word_embeddings=True, num_hidden_layers=2)
    edit(folder, **REFUSED[says])
    with pytest.raises(ValueError) as e:
        Llama.from_pretrained(folder)
    assert says in str(e.value)
    with pytest.raises(ValueError, match='this is not a GPT-2'):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize('kind', ['mistral', 'qwen2', 'qwen3'])
def test_a_window_that_acts_is_refused_and_a_shorter_context_is_a_way_out(tmp_path, kind):
    window = dict(sliding_window=8, max_position_embeddings=40)
    if kind != 'mistral':
        window |= dict(use_sliding_window=True, max_window_layers=0)
    theirs, folder = small(tmp_path, kind, **window)
    with pytest.raises(ValueError, match='sliding_window=8: a position sees no more than that'):
        Llama.from_pretrained(folder)
    assert_same(Llama.from_pretrained(folder, block_size=8), theirs, T=8)
    with torch.no_grad():  # and it would have been wrong
        edit(folder, sliding_window=None, use_sliding_window=False)
        x = ids(theirs, T=30)
        assert (Llama.from_pretrained(folder)(x)[0] - theirs(x).logits).abs().max() > 1e-3


def test_damaged(tmp_path):
    _, folder = small(tmp_path)
    whole = (folder / 'model.safetensors').read_bytes()
    for raw in whole[:-1], whole[:7], b'', b'<html>not found</html>':
        (folder / 'model.safetensors').write_bytes(raw)
        with pytest.raises(ValueError, match='model.safetensors is damaged or incomplete'):
            Llama.from_pretrained(folder)
    for name, raw in {'cut.gguf': b'GGUF\3\0\0\0', 'other.gguf': whole}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=name):
            Llama.from_pretrained(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Llama.from_pretrained(tmp_path / 'nowhere.gguf')
    with pytest.raises(FileNotFoundError, match='no folder'):
        Llama.from_pretrained(tmp_path / 'nowhere')


def test_loaded_model_trains_and_copies(tmp_path):
    import copy
    import pickle

    ours = Llama.from_pretrained(small(tmp_path, tie_word_embeddings=True)[1]).train()
    x = torch.randint(50, (4, 16))
    for m in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours:
        assert m.lm_head.weight is m.model.embed_tokens.weight
        train = CfgNode(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        opt, first = m.configure_optimizers(train), m(x, x)[1]
        for _ in range(5):
            opt.zero_grad()
            m(x, x)[1].backward()
            opt.step()
        assert m(x, x)[1] < first


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        ids = torch.arange(i, i + 9) % 50
        return ids[:-1], ids[1:]


def new_llama():
    torch.manual_seed(0)
    config = Llama.get_default_config()
    config.merge_from_dict(dict(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, vocab_size=50))
    config.merge_from_dict(dict(block_size=8, tie_weights=True))
    return Llama(config)


def test_both_trainers_take_it_and_a_run_is_resumed(tmp_path):
    from mingpt_nb import scaling

    settings = dict(max_iters=6, batch_size=4, device='cpu', seed=1, progress=False)
    runs = []
    for kind in Trainer, scaling.Trainer:
        config = kind.get_default_config()
        config.merge_from_dict(settings)
        trainer = kind(config, new_llama(), Counting())
        trainer.run()
        runs.append(trainer.model)
    config = scaling.Trainer.get_default_config()
    config.merge_from_dict(settings | dict(max_iters=3, work_dir=str(tmp_path)))
    first = scaling.Trainer(config, new_llama(), Counting())
    first.run()
    first.save_checkpoint()
    config.max_iters = 6
    second = scaling.Trainer(config, new_llama(), Counting())
    second.load_checkpoint(first.checkpoint)
    second.run()
    for p, q, r in zip(*(m.parameters() for m in runs), second.model.parameters()):
        torch.testing.assert_close(p, q)
        assert torch.equal(q, r)
    back = Llama.from_pretrained(tmp_path / 'checkpoints' / first.checkpoint.name)
    assert back.config.to_dict() == first.model.config.to_dict()
    assert scaling.flops_per_token(second.model, 8) > 0


def test_prompts_of_several_lengths_give_the_tokens_that_each_gives_alone():
    torch.manual_seed(3)
    config = GPT.get_default_config()
    config.merge_from_dict(dict(model_type='gpt-nano', vocab_size=50, block_size=8))
    prompts = [torch.randint(50, (n,)) for n in (5, 1, 12, 8)]  # the context has 8 places
    for model in new_llama().eval(), GPT(config).eval():
        alone = [model.generate(row[None], 9)[0] for row in prompts]
        for use_cache in True, False:
            for row, want in zip(model.generate(prompts, 9, use_cache=use_cache), alone):
                assert torch.equal(row, want)
        lists = model.generate([row.tolist() for row in prompts], 9, stop_tokens=alone[1][4])
        for row, prompt in zip(lists, prompts):
            assert torch.equal(row, model.generate(prompt[None], 9, stop_tokens=alone[1][4])[0])


@pytest.mark.skipif(smollm2() is None, reason='make weights')
def test_smollm2_as_transformers_reads_the_same_file():
    pytest.importorskip('gguf')
    pytest.importorskip('accelerate')
    path = smollm2()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ours = Llama.from_pretrained(path)
    x = ids(theirs, B=1, T=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x).logits, rtol=1e-3, atol=1e-3)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    theirs.generation_config.eos_token_id = None  # 60 tokens, also past the end of the text
    how = dict(max_new_tokens=60, do_sample=False, pad_token_id=0)
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    assert want.size(1) == 65 and torch.equal(ours.generate(prompt, 60), want)
