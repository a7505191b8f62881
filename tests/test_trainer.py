"""Training across processes: the same batches everywhere, and files that are whole or not there."""

import hashlib
import json
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run, start
from torch import nn

from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.chargpt import CharDataset
from mingpt_nb.data import TokenDataset, write_tokens
from mingpt_nb.gpt2 import load_pretrained, save_pretrained
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.trainer import batch_indices
from mingpt_nb.utils import CfgNode, cli, set_seed
from mingpt_nb.weights import checkpoints


def test_batches_are_the_same_in_every_process():
    code = (
        'import json; from mingpt_nb.trainer import batch_indices; '
        'print(json.dumps([batch_indices(7, s, 10**12, 8) for s in (0, 1, 99)]))'
    )
    here = [batch_indices(7, s, 10**12, 8) for s in (0, 1, 99)]
    assert json.loads(run('-c', code, env=dict(PYTHONHASHSEED='1'))[0]) == here


class Squares:
    "Items made one by one, in the worker."

    def __len__(self):
        return 50

    def __getitem__(self, i):
        seq = torch.arange(i, i + 7) ** 2 % 11
        return seq[:-1], seq[1:]


def weights_hash(workers, device='cpu'):
    set_seed(1)
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=11, block_size=6))
    t = Trainer.get_default_config()
    t.merge_from_dict(
        dict(device=device, max_iters=8, batch_size=6, num_workers=workers, learning_rate=1e-3)
    )
    trainer = Trainer(t, GPT(c), Squares())
    trainer.run()
    return hashlib.sha256(
        b''.join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    ).hexdigest()


def test_workers_change_nothing():
    assert weights_hash(0) == weights_hash(2)  # bit for bit, with dropout


def test_a_kill_while_saving_leaves_a_whole_model(tmp_path):
    code = f'''
from mingpt_nb.model import GPT
from mingpt_nb.gpt2 import save_pretrained
c = GPT.get_default_config()
c.merge_from_dict(dict(model_type='gpt-mini', vocab_size=500, block_size=64))
model = GPT(c)
while True: save_pretrained(model, {str(tmp_path)!r}); print('saved', flush=True)
'''
    for delay in (0.0, 0.01, 0.03):
        process = start('-c', code)
        assert process.stdout.readline() == 'saved\n'
        time.sleep(delay)
        process.send_signal(signal.SIGKILL if hasattr(signal, 'SIGKILL') else signal.SIGTERM)
        process.communicate(timeout=60)
        model = load_pretrained(tmp_path)
        assert model.config.vocab_size == 500
    save_pretrained(model, tmp_path)


def new_trainer(data=None, evaluate=None, model=None, **kw):
    set_seed(1)
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=11, block_size=6))
    t.merge_from_dict(
        dict(device='cpu', max_iters=4, batch_size=4, log_every=1, progress=False) | kw
    )
    return Trainer(t, GPT(c) if model is None else model, data or Squares(), evaluate)


IMPOSSIBLE = [
    ('betas=None', 'betas'),
    ('betas=("a","b")', "betas must be two numbers in [0, 1), got ('a', 'b')"),
    ('betas=[0.9]', 'betas must be two'),
    ('learning_rate=inf', 'learning_rate must be a finite number of 0 or more, got inf'),
    ('weight_decay=inf', 'weight_decay must be a finite'),
    ('min_lr=-1', 'min_lr must be a finite'),
    ('grad_norm_clip=-1', 'grad_norm_clip must be a finite'),
    ('keep_last=None', 'keep_last'),
    ('max_iters=2.5', "max_iters: expected int or None, got '2.5'"),
    ('checkpoint_every=1.5', 'checkpoint_every: expected int or None'),
    ('eval_batches=2.5', 'eval_batches: expected int or None'),
    ('eval_every=-5', 'eval_every must be an integer of 0 or more or None, got -5'),
    ('num_workers=100000', 'num_workers must be an integer from 0 to'),
    ('batch_size=99999999999999', 'batch_size=99,999,999,999,999: the tokens alone'),
    ('seed=-1', 'seed must be'),
    ('resume=5', '5 is no checkpoint'),
    ('resume=True', 'True is no checkpoint'),
    ('device=meta', "device 'meta' computes nothing here"),
    ('device=xla', "device 'xla' computes nothing here"),
    ('device=gpu', "device 'gpu' is none that torch knows"),
    ('dtype=int8', 'dtype must be'),
    ('lr_schedule=linear', "lr_schedule must be 'constant' or 'cosine'"),
    ('parallel=tp', "parallel must be 'ddp' or 'fsdp'"),
    ('progress=5', 'progress: expected true or false'),
]


@pytest.mark.parametrize('arg, says', IMPOSSIBLE, ids=[arg for arg, _ in IMPOSSIBLE])
def test_impossible_settings_get_one_line_before_anything_is_done(arg, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['adder', '--data.ndigit=1', f'--system.work_dir={tmp_path}', f'--trainer.{arg}'])
    assert (
        str(e.value).startswith('mingpt-nb adder: ')
        and says in str(e.value)
        and '\n' not in str(e.value)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('threads', ['1000000', '0', '1.5'])
def test_threads_are_bounded(threads, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(SystemExit, match='threads'):
        cli(
            [
                'adder',
                '--data.ndigit=1',
                f'--system.work_dir={tmp_path}',
                f'--system.threads={threads}',
            ]
        )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    'args, says',
    [
        (['learning_rate=1e30', 'max_iters=9'], 'step 1: loss nan'),
        (['learning_rate=1e30', 'eval_every=1'], 'step 0: held-out loss nan'),
        (['learning_rate=1e40', 'max_iters=1'], 'step 0: weights that are not finite'),
        (['weight_decay=1e40'], 'step 1: loss nan'),
    ],
)
def test_a_run_that_diverges_ends_with_its_one_line(args, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli(
            [
                'adder',
                '--data.ndigit=1',
                f'--system.work_dir={tmp_path}',
                '--trainer.grad_norm_clip=None',
                '--trainer.lr_schedule=constant',
                '--trainer.warmup_iters=0',
                *(f'--trainer.{arg}' for arg in args),
            ]
        )
    assert (
        str(e.value).startswith(f'mingpt-nb adder: {says}')
        and '\n' not in str(e.value)
        and not (tmp_path / 'model').exists()
    )
    assert 'Traceback' not in capsys.readouterr().err


def test_a_spoilt_model_is_never_saved(tmp_path):
    t = new_trainer(work_dir=str(tmp_path), checkpoint_every=1)

    def spoil(t):
        if t.iter_num == 2:
            t.model.transformer.wpe.weight.data[0, 0] = float('inf')

    t.add_callback('on_batch_end', spoil)
    with pytest.raises(
        RuntimeError,
        match='step 3: weights that are not finite, '
        'the first in transformer.wpe.weight.*step-00000002$',
    ):
        t.run()
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000001', 'step-00000002']


def test_numpys_numbers_and_whole_floats_are_numbers(tmp_path):
    plain = new_trainer(
        learning_rate=0.5**10, betas=(0.5, 0.75), eval_every=2, eval_batches=1, evaluate=Squares()
    )
    odd = new_trainer(
        learning_rate=np.float32(0.5**10),
        betas=[np.float32(0.5), np.float64(0.75)],
        batch_size=np.int64(4),
        max_iters=np.float32(4),
        eval_every=2e0,
        eval_batches=np.int8(1),
        evaluate=Squares(),
        keep_last=2.0,
        checkpoint_every=1e0,
        work_dir=str(tmp_path),
        log_every=torch.tensor(1),
    )
    for t in plain, odd:
        set_seed(2)
        t.run()
    assert odd.history == plain.history and checkpoints(tmp_path)[-1].name == 'step-00000004'
    c = GPT.get_default_config()
    c.merge_from_dict(
        dict(
            model_type=None,
            n_layer=np.int64(1),
            n_head=np.int8(1),
            n_embd=np.uint8(8),
            vocab_size=np.int64(11),
            block_size=torch.tensor(6),
            embd_pdrop=np.float32(0.0),
        )
    )
    save_pretrained(GPT(c), tmp_path / 'model')
    assert (
        json.loads((tmp_path / 'model' / 'config.json').read_text())['vocab_size'] == 11
        and load_pretrained(tmp_path / 'model').config.n_embd == 8
    )


def ran(*args, **kw):
    t = new_trainer(*args, **kw)
    set_seed(2)
    t.run()
    return t


class Stories(list):
    """Rows of ids with a question at the start that is not to be predicted, as one kind of item or
    the other."""

    def __init__(self, item):
        super().__init__(item((torch.arange(i, i + 7) ** 2 % 11), 2 + i % 3) for i in range(30))


def pair(ids, question):
    y = ids[1:].clone()
    y[: question - 1] = -1
    return ids[:-1], y


def hugging(kind, dtype):
    def item(ids, question):
        labels = ids.clone()
        labels[:question] = -100
        return dict(
            input_ids=kind(ids.to(dtype)),
            labels=kind(labels.to(dtype)),
            attention_mask=kind(torch.ones_like(ids)),
        )

    return item


@pytest.mark.parametrize(
    'kind, dtype',
    [
        (torch.Tensor.tolist, torch.int64),
        (torch.clone, torch.int32),
        (torch.Tensor.numpy, torch.int16),
    ],
)
def test_items_of_hugging_faces_data_sets(kind, dtype):
    data = Stories(hugging(kind, dtype))
    want, got = ran(Stories(pair), Stories(pair)), ran(data, data)
    assert got.history == want.history and 'eval_loss' in got.history[-1]


def test_minus_100_is_nothing_to_predict():
    def marked(ids, question):
        x, y = pair(ids, question)
        return x, y.masked_fill(y == -1, -100)

    assert ran(Stories(marked)).history == ran(Stories(pair)).history


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Squares())


@pytest.mark.parametrize(
    'data',
    [Stream(), (i for i in range(9)), type('Endless', (), {'__getitem__': lambda self, i: i})()],
)
def test_streams_are_told_what_to_do(data):
    with pytest.raises(
        ValueError,
        match=r'train_dataset, \w+, has no length or no items by number.*'
        'make a list of what it gives, or write its ids to a token file',
    ):
        new_trainer(data)
    with pytest.raises(ValueError, match='eval_dataset, '):
        new_trainer(Squares(), data)


def test_held_out_data_with_a_vocabulary_of_its_own(tmp_path):
    block = CfgNode(block_size=6)
    train, same_ids = CharDataset(block, 'abcdefgh' * 9), CharDataset(block, 'stuvwxyz' * 9)
    own, right = (
        CharDataset(block, 'bcdefgh' * 9),
        CharDataset(block, 'bcdefgh' * 9, train.tokenizer),
    )
    in_file = TokenDataset(write_tokens(tmp_path / 'ids', ['bcdefgh' * 9], own.tokenizer).path, 6)
    for held in own, same_ids, in_file:
        with pytest.raises(
            ValueError, match='eval_dataset has another tokenizer than train_dataset'
        ):
            new_trainer(train, held)
        with pytest.raises(ValueError, match='another tokenizer'):
            new_trainer(train).eval(held)
    new_trainer(train, right).eval(TokenDataset(right.ids, 6, CharTokenizer.from_text('abcdefgh')))


@pytest.mark.parametrize('value', [-1, -100])
def test_held_out_data_without_targets_are_found_before_the_first_step(value):
    held = [(x, torch.full_like(x, value)) for x, _ in (Squares()[i] for i in range(9))]
    t = new_trainer(Squares(), held)
    with pytest.raises(
        ValueError, match='eval_dataset has nothing to predict: all its targets are -1'
    ):
        t.run()
    assert t.iter_num == 0 and t.optimizer is None
    with pytest.raises(ValueError, match='nothing to predict'):
        t.eval()


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gpt():
    set_seed(1)
    c = GPT.get_default_config()
    c.merge_from_dict(
        dict(model_type=None, n_layer=1, n_head=1, n_embd=8, vocab_size=11, block_size=6)
    )
    return GPT(c)


def compiled(model):
    return torch.compile(model, backend='eager')


@pytest.fixture
def world_of_one():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    'wrap',
    [
        compiled,
        nn.parallel.DistributedDataParallel,
        lambda m: nn.parallel.DistributedDataParallel(compiled(m)),
        lambda m: compiled(nn.parallel.DistributedDataParallel(m)),
    ],
    ids=['compiled', 'DDP', 'compiled in DDP', 'DDP compiled'],
)
def test_a_wrapped_model_is_saved_under_plain_names(wrap, tmp_path, world_of_one):
    given = wrap(gpt())
    t = ran(model=given, work_dir=str(tmp_path), checkpoint_every=4)
    assert given in (
        t.engine.net,
        getattr(t.engine.net, 'module', None),
    )  # not the model inside, with the wrapper gone
    plain = ran(model=gpt())
    assert [r['loss'] for r in t.history] == pytest.approx(
        [r['loss'] for r in plain.history], abs=1e-5
    )
    assert t.model.state_dict().keys() == gpt().state_dict().keys()
    assert same_weights(load_pretrained(t.checkpoint), t.model)
    again = new_trainer(model=gpt(), same_bits=False)
    again.load_checkpoint(t.checkpoint)
    assert same_weights(again.model, t.model) and again.iter_num == 4
    save_pretrained(t.model, tmp_path / 'model')
    assert same_weights(load_pretrained(tmp_path / 'model'), t.model)


def test_a_model_without_an_optimizer_says_so_before_the_first_step():
    t = new_trainer(model=nn.Linear(2, 2))
    with pytest.raises(
        ValueError,
        match=r'Linear has no configure_optimizers\(config\): give the trainer an `optimizer`',
    ):
        t.run()
