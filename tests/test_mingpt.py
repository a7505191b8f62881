"""Programs and checkpoints made for minGPT work here when `mingpt` becomes `mingpt_nb`."""

import sys

import pytest
import torch
from reference import ReferenceGPT
from torch.utils.data import DataLoader, Dataset

import mingpt_nb.bpe
import mingpt_nb.checkpoints
import mingpt_nb.model
import mingpt_nb.scaling
import mingpt_nb.trainer
import mingpt_nb.utils
from mingpt_nb.model import GPT, PRESETS
from mingpt_nb.utils import set_seed


def config(**kwargs):
    c = GPT.get_default_config()
    c.merge_from_dict(dict(n_layer=3, n_head=4, n_embd=32, vocab_size=17, block_size=12) | kwargs)
    return c


def batch(vocab=17, B=5, T=12):
    seqs = torch.randint(vocab, (B, T + 1), generator=torch.Generator().manual_seed(0))
    x, y = seqs[:, :-1], seqs[:, 1:].clone()
    y[:, :3] = -1
    return x, y


def test_same_seed_same_start():
    set_seed(3)
    theirs = ReferenceGPT(config())
    set_seed(3)
    ours = GPT(config()).state_dict()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.endswith('.attn.bias')}
    assert list(weights) == list(ours)
    for k, v in weights.items():
        torch.testing.assert_close(ours[k], v, rtol=0, atol=0)


@pytest.mark.parametrize('n_head,T', [(1, 12), (4, 12), (8, 1), (32, 7)])
def test_checkpoint_logits_and_training_step(tmp_path, n_head, T):
    c = config(n_head=n_head, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    set_seed(1)
    theirs, ours = ReferenceGPT(c), GPT(c)
    torch.save(theirs.state_dict(), tmp_path / 'model.pt')
    ours.load_state_dict(torch.load(tmp_path / 'model.pt'), strict=True)
    x, y = (t[:, :T] for t in batch())
    y = y.clone()
    y[:, -1] = x[:, 0]
    train = mingpt_nb.trainer.Trainer.get_default_config()
    train.learning_rate = 1e-3
    optimizers = [m.configure_optimizers(train) for m in (theirs, ours)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers):
            logits, loss = model(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((logits, loss))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    'front', ['_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.']
)
def test_a_checkpoint_of_a_wrapped_model_loads(tmp_path, front):
    "As nanoGPT writes it when it compiles, also on many devices: masks and all."
    set_seed(1)
    theirs = ReferenceGPT(config()).eval()
    torch.save(
        {'model': {front + k: v for k, v in theirs.state_dict().items()}, 'iter_num': 3},
        tmp_path / 'ckpt.pt',
    )
    ours = GPT(config()).eval()
    ours.load_state_dict(torch.load(tmp_path / 'ckpt.pt')['model'])
    x, y = batch()
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='lm_head.weight differs from transformer.wte.weight'):
        GPT(config(tie_weights=True)).load_state_dict(torch.load(tmp_path / 'ckpt.pt')['model'])


def test_generation_is_the_simple_loop():
    set_seed(2)
    model = GPT(config()).eval()
    x, _ = batch(T=4)
    greedy, sampled = x, x
    for _ in range(20):
        greedy = torch.cat((greedy, model(greedy[:, -12:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    torch.testing.assert_close(model.generate(x, 20), greedy)
    g = torch.Generator().manual_seed(5)
    for _ in range(20):
        logits = model(sampled[:, -12:])[0][:, -1] / 0.8
        logits[logits < logits.topk(5).values[:, [-1]]] = -float('inf')
        sampled = torch.cat((sampled, torch.multinomial(logits.softmax(-1), 1, generator=g)), 1)
    ours = model.generate(
        x, 20, temperature=0.8, do_sample=True, top_k=5, generator=torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(ours, sampled)


@pytest.fixture
def mingpt(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mingpt', mingpt_nb)
    for name in 'bpe', 'model', 'trainer', 'utils':
        monkeypatch.setitem(sys.modules, f'mingpt.{name}', getattr(mingpt_nb, name))


class Doubling(Dataset):
    """x x x -> each id doubled modulo 10, built item by item and at random, as minGPT's sorting
    demo does."""

    def __len__(self):
        return 10000

    def get_vocab_size(self):
        return 10

    def get_block_size(self):
        return 5

    def __getitem__(self, i):
        a = torch.randint(10, (3,))
        both = torch.cat((a, 2 * a % 10))
        x, y = both[:-1].clone(), both[1:].clone()
        y[:2] = -1
        return x, y


def test_a_program_in_mingpts_style(mingpt, tmp_path, monkeypatch):
    from mingpt.model import GPT
    from mingpt.trainer import Trainer
    from mingpt.utils import CfgNode as CN
    from mingpt.utils import set_seed, setup_logging

    C = CN()
    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = str(tmp_path / 'out')
    C.model = GPT.get_default_config()
    C.model.model_type = 'gpt-nano'
    C.trainer = Trainer.get_default_config()
    C.trainer.learning_rate = 5e-4
    C.merge_from_args(
        ['--trainer.max_iters=30', '--trainer.num_workers=0', '--trainer.learning_rate=0.003']
    )
    monkeypatch.setattr(sys, 'argv', ['prog'])
    setup_logging(C)
    set_seed(C.system.seed)
    data = Doubling()
    C.model.vocab_size, C.model.block_size = data.get_vocab_size(), data.get_block_size()
    model = GPT(C.model)
    trainer = Trainer(C.trainer, model, data)
    seen = []

    def batch_end_callback(trainer):
        if trainer.iter_num % 10 == 0:
            seen.append((trainer.iter_num, trainer.loss.item(), trainer.iter_dt))
            model.eval()
            torch.save(model.state_dict(), tmp_path / 'out' / 'model.pt')
            model.train()

    trainer.set_callback('on_batch_end', batch_end_callback)
    trainer.run()
    assert [s[0] for s in seen] == [0, 10, 20]
    assert seen[-1][1] < seen[0][1]
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'args.txt', 'config.json', 'model.pt'}
    x, y = next(iter(DataLoader(data, batch_size=4)))
    with torch.no_grad():
        out = model.generate(x[:, :3].to(trainer.device), 3, do_sample=False)
    assert out.shape == (4, 6)


def test_the_trainers_of_three_chapters_take_the_same_steps():
    "Those of chapters 03, 07 and 08: a program changes one import."
    histories = []
    for module in mingpt_nb.trainer, mingpt_nb.checkpoints, mingpt_nb.scaling:
        c = module.Trainer.get_default_config()
        settings = dict(max_iters=12, batch_size=8, eval_every=5, log_every=1, device='cpu')
        c.merge_from_dict(settings | dict(progress=False, learning_rate=3e-3))
        if 'dtype' in vars(c):
            c.dtype = 'float32'
        set_seed(2)
        data = Doubling()
        trainer = module.Trainer(c, GPT(config(vocab_size=10, resid_pdrop=0.1)), data, data)
        trainer.run()
        histories.append(trainer.history)
    assert histories[0] == histories[1] == histories[2] and len(histories[0]) == 12 + 3


def test_tokenizer_in_mingpts_style(mingpt):
    from mingpt.bpe import BPETokenizer, get_encoder

    tokenizer = BPETokenizer()
    ids = tokenizer("Hello, world", return_tensors='pt')
    assert ids.dtype == torch.long and ids.shape == (1, 3)
    assert tokenizer.decode(ids[0]) == "Hello, world"
    assert get_encoder().encode_and_show_work("Hello, world")['bpe_idx'] == ids[0].tolist()


def test_every_preset_builds():
    for name in PRESETS:
        with torch.device('meta'):
            model = GPT(config(n_layer=None, n_head=None, n_embd=None, model_type=name))
        assert len(model.transformer.h) == PRESETS[name]['n_layer']
