"""What a cell of chapter 08 cannot show: real processes that share a batch, die, and are started
again; memory that runs out anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import processes
import pytest
import torch
import torch.distributed as dist
from processes import finish

from mingpt_nb.gpt2 import load_pretrained
from mingpt_nb.model import GPT
from mingpt_nb.runs import OtherRun
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed
from mingpt_nb.weights import checkpoints

torchrun = pytest.mark.skipif(
    os.name == 'nt' or not dist.is_available() or not dist.is_gloo_available(),
    reason='torchrun with gloo',
)

PROGRAM = '''
import os, signal, sys, torch
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed

class Uneven:
    "Rows with one to sixteen targets, so that the parts of a batch have different numbers of them."
    def __len__(self): return 1000
    def __getitem__(self, i):
        seq = torch.arange(i, i + 17) * (1 + i % 3) % 50
        x, y = seq[:-1], seq[1:].clone()
        if i % 5: y[:15 - i % 7] = -1
        return x, y

class Deadly(Uneven):
    "The second process is killed in step 12 of each of its lives."
    rows = 12 * 32
    def __getitem__(self, i):
        self.rows -= 1
        if self.rows < 0 and os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)

def new_trainer(*args, data=None, dropout=0.):
    set_seed(1)
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=50, block_size=16))
    c.merge_from_dict(dict(embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout))
    t.merge_from_dict(dict(device='cpu', dtype='float32', max_iters=50, batch_size=64))
    t.merge_from_dict(dict(learning_rate=1e-3, log_every=1, progress=False))
    t.merge_from_args(args)
    return Trainer(t, GPT(c), data or Uneven())

if __name__ == '__main__':
    data = Deadly() if sys.argv[1] == 'deadly' else Uneven()
    dropout = 0.1 if sys.argv[1] == 'dropout' else 0.
    trainer = new_trainer(*sys.argv[2:], data=data, dropout=dropout)
    trainer.add_callback('on_batch_end', lambda t: print('step', t.iter_num, flush=True))
    trainer.run()
    print('done', trainer.iter_num, trainer.engine.world)
'''
exec(PROGRAM.split('if __name__')[0])


def start(folder, *args, launcher=()):
    "The program in two processes that torchrun starts."
    (folder / 'program.py').write_text(PROGRAM)
    return processes.start(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node=2',
        *launcher,
        'program.py',
        *args,
        cwd=folder,
    )


def both(folder, *args, program=PROGRAM, code=0):
    """The same in two processes with the environment that torchrun gives them; (output, errors) of
    each."""
    (folder / 'program.py').write_text(program)
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    env = dict(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(store.port),
        WORLD_SIZE='2',
        TORCHELASTIC_RESTART_COUNT='0',
        TORCHELASTIC_USE_AGENT_STORE='True',
    )
    two = [
        processes.start('program.py', *args, cwd=folder, env=dict(env, RANK=rank, LOCAL_RANK=rank))
        for rank in '01'
    ]
    return [finish(process, code) for process in two]


def pair(folder, *args):
    "What the first of the two says."
    (out, _), (silence, _) = both(folder, *args)
    assert silence == ''
    return out


def rows(folder):
    return [
        json.loads(line)['loss'] for line in (folder / 'metrics.jsonl').read_text().splitlines()
    ]


def losses(trainer):
    return [r['loss'] for r in trainer.history]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope='module')
def straight():
    trainer = new_trainer()
    trainer.run()
    return trainer


@torchrun
def test_two_processes_are_one(tmp_path, straight):
    out, err = finish(start(tmp_path, 'plain', '--work_dir=out', '--checkpoint_every=25'))
    assert out.count('done 50 2') == 1 and out.count('step') == 50  # one speaks for both
    assert rows(tmp_path / 'out') == pytest.approx(losses(straight), abs=1e-5)
    shutil.rmtree(checkpoints(tmp_path / 'out')[-1])
    with pytest.raises(OtherRun, match='processes is 1 here, and 2'):
        new_trainer(f'--work_dir={tmp_path / "out"}', '--resume=auto').run()
    one = new_trainer(
        f'--work_dir={tmp_path / "out"}', '--resume=auto', '--same_bits=false'
    )  # and goes on alone
    one.run()
    assert one.checkpoint.name == 'step-00000025' and losses(one) == pytest.approx(
        losses(straight), abs=1e-5
    )
    assert torch.allclose(flat(one.model), flat(straight.model), atol=1e-4)


@torchrun
def test_one_process_goes_on_as_two_slices_and_back(tmp_path, straight):
    new_trainer(f'--work_dir={tmp_path / "out"}', '--checkpoint_every=25', '--max_iters=25').run()
    pair(
        tmp_path,
        'plain',
        '--work_dir=out',
        '--checkpoint_every=20',
        '--resume=auto',
        '--parallel=fsdp',
        '--accumulate=4',
        '--max_iters=40',
        '--same_bits=false',
    )
    assert [p.name for p in checkpoints(tmp_path / 'out')] == ['step-00000025', 'step-00000040']
    back = new_trainer(
        f'--work_dir={tmp_path / "out"}',
        '--checkpoint_every=25',
        '--resume=auto',
        '--same_bits=false',
    )
    back.run()
    assert losses(back) == pytest.approx(losses(straight), abs=1e-5)
    assert torch.allclose(
        flat(load_pretrained(checkpoints(tmp_path / 'out')[-1])), flat(straight.model), atol=1e-4
    )


@torchrun
def test_accumulating_processes_send_gradients_once_per_step(tmp_path, straight):
    out = pair(
        tmp_path, 'plain', '--work_dir=out', '--accumulate=3', '--max_iters=10', '--batch_size=63'
    )
    assert out.endswith('done 10 2\n')
    want = new_trainer('--batch_size=63', '--max_iters=10')
    want.run()
    assert rows(tmp_path / 'out') == pytest.approx(losses(want), abs=1e-5)


@torchrun
def test_a_killed_process_ends_the_job_and_restarts_resume_it(tmp_path, straight):
    """It dies, is started again, dies again further on, and the job ends; what is left is done by
    one process."""
    out, err = finish(
        start(
            tmp_path,
            'deadly',
            '--work_dir=out',
            '--checkpoint_every=5',
            '--resume=auto',
            launcher=['--max-restarts=1'],
        ),
        code=1,
    )
    assert 'Signal 9 (SIGKILL)' in err and 'done' not in out
    assert checkpoints(tmp_path / 'out')[-1].name == 'step-00000020'
    steps = [int(line.split()[1]) for line in out.splitlines()]
    again = steps.index(10, 11)
    assert steps == [*range(again), *range(10, steps[-1] + 1)] and steps[-1] >= 20
    back = new_trainer(f'--work_dir={tmp_path / "out"}', '--resume=auto', '--same_bits=false')
    back.run()
    assert rows(tmp_path / 'out') == pytest.approx(losses(straight), abs=1e-5)


@torchrun
def test_a_signal_stops_all_after_the_same_step_and_dropout_resumes(tmp_path):
    process = start(
        tmp_path, 'dropout', '--work_dir=out', '--resume=auto', '--checkpoint_every=1000'
    )
    for line in process.stdout:
        if line == 'step 7\n':
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode and len(checkpoints(tmp_path / 'out')) == 1
    pair(
        tmp_path,
        'dropout',
        '--work_dir=out',
        '--resume=auto',
        '--checkpoint_every=1000',
        '--max_iters=50',
    )
    pair(tmp_path, 'dropout', '--work_dir=whole')
    assert rows(tmp_path / 'out') == rows(tmp_path / 'whole')  # bit for bit


class Trap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, armed):
        ctx.armed = armed
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.armed:
            raise torch.OutOfMemoryError('CUDA out of memory (backward)')
        return g, None


def out_of_memory(trainer, where, steps, rows):
    """Let memory run out at these steps, in forward or backward, for calls with more than so many
    rows."""

    def hook(model, args, out):
        armed = trainer.iter_num in steps and len(args[0]) > rows
        if armed and where == 'forward':
            raise torch.OutOfMemoryError('CUDA out of memory (forward)')
        return out[0], Trap.apply(out[1], armed)

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize('where', ['forward', 'backward'])
@pytest.mark.parametrize(
    'steps, limit, end', [({0}, 32, 2), ({3, 7}, 16, 4), ({5}, 1, 64), (set(range(50)), 7, 16)]
)
def test_out_of_memory_changes_nothing(straight, where, steps, limit, end):
    t = new_trainer('--max_iters=12')
    out_of_memory(t, where, steps, limit)
    with pytest.warns(
        UserWarning, match=f'step {min(steps)}: out of memory with 64 rows at a time'
    ) as caught:
        t.run()
    assert len(caught) == 1 and t.engine.parts == end
    assert losses(t) == pytest.approx(losses(straight)[:12], abs=1e-5)


@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_no_random_number_is_lost_to_it(where):
    t = new_trainer('--max_iters=8', dropout=0.1)
    out_of_memory(t, where, {4}, 32)
    with pytest.warns(UserWarning):
        t.run()
    want = new_trainer('--max_iters=8', dropout=0.1)
    want.add_callback(
        'on_batch_end',
        lambda t: setattr(t.engine, 'parts', 2 if t.iter_num == 3 else t.engine.parts),
    )
    want.run()
    assert losses(t) == losses(want)  # bit for bit


def test_giving_up_says_what_to_do(tmp_path):
    t = new_trainer('--checkpoint_every=2', f'--work_dir={tmp_path}')
    out_of_memory(t, 'forward', {5}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r'step 5: one row at a time does not fit.*Last checkpoint: .*step-00000004',
        ):
            t.run()
    assert t.engine.parts == 64


def test_the_scale_of_float16_is_resumed(tmp_path):
    args = '--dtype=float16', f'--work_dir={tmp_path}', '--checkpoint_every=2'
    whole = new_trainer('--max_iters=6', *args)
    whole.run()
    assert whole.engine.scaler.get_scale() > 1
    shutil.rmtree(checkpoints(tmp_path)[-1])
    again = new_trainer('--max_iters=6', '--resume=auto', *args)
    again.run()
    assert (
        losses(again) == losses(whole)
        and again.engine.scaler.state_dict() == whole.engine.scaler.state_dict()
    )


def test_no_compiler_no_harm(straight):
    code = (
        PROGRAM.split('if __name__')[0]
        + '''
t = new_trainer('--max_iters=3', '--compile=true')
t.run()
print(t.history[-1]['loss'])
'''
    )
    env = dict(
        os.environ,
        **processes.ENV,
        CXX='/nonexistent/compiler',
        TORCHINDUCTOR_FORCE_DISABLE_CACHES='1',
    )
    run = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(losses(straight)[2], abs=1e-6)
    assert run.stderr.count('torch.compile failed, going on without') == 1, run.stderr


FAILING = (
    PROGRAM.split('if __name__')[0]
    + '''
class Broken(Uneven):
    def __getitem__(self, i): return super().__getitem__(i) if os.environ['RANK'] == '0' else {}[i]

def mistake(t):
    if t.iter_num == 2 and what == 'mine': raise ValueError('my own mistake')
    if t.iter_num == 2 and what == 'generate':
        t.model.generate(torch.zeros(1, 1, dtype=torch.long), 3)

what = sys.argv[1]
trainer = new_trainer(*sys.argv[2:], data=Broken() if what == 'data' else None)
trainer.add_callback('on_batch_end', mistake)
trainer.run()
'''
)


@torchrun
@pytest.mark.parametrize(
    'what, args, rank, says',
    [
        ('data', [], 1, 'DataError: train_dataset['),
        (
            'generate',
            ['--parallel=fsdp'],
            0,
            'RunError: step 2: a callback of on_batch_end needs the other processes',
        ),
        ('mine', [], 0, 'ValueError: my own mistake'),
        (
            'setting',
            ['--batch_size=0'],
            None,
            'ConfigError: batch_size must be a positive integer, got 0',
        ),
    ],
)
def test_an_error_of_many_processes_is_told_once_and_first(tmp_path, what, args, rank, says):
    errors = [err for _, err in both(tmp_path, what, *args, program=FAILING, code=1)]
    first = next(i for i, err in enumerate(errors) if err) if rank is None else rank
    lines = errors[first].splitlines()
    assert lines[0].startswith(f'rank {first} of 2: {says}') and errors[1 - first] == ''
    assert len(lines) == 1 if what != 'mine' else 'Traceback (most recent call last):' in lines


ALONE = (
    PROGRAM.split('if __name__')[0]
    + '''
import torch.distributed as dist
from mingpt_nb.utils import RunError
def double(): w.data.mul_(2)
def triple():
    with torch.no_grad(): w.mul_(3)
def flip(): w.data.neg_()
def change_rate(): t.config.learning_rate = 1.
def gather(): w.full_tensor()
def forward(): t.model(torch.zeros(1, 4, dtype=torch.long))
def save(): t.save_checkpoint('here')
def barrier(): dist.all_reduce(torch.ones(1))
def look(): w.to_local().sum() if t.engine.sharded else w.sum()
t = new_trainer(*sys.argv[1:])
t.optimizer = t.model.configure_optimizers(t.config)
w = t.model.lm_head.weight
acts = [double, triple, flip, change_rate, save, look]
for act in acts + [gather, forward, barrier] * t.engine.sharded:
    if t.engine.rank: break
    try:
        with t.engine.alone('on_batch_end'): act()
        print(act.__name__, 'is allowed')
    except RunError as e:
        changed = 'has changed weights or settings' in str(e)
        needs = 'needs the other processes' in str(e)
        print(act.__name__, 'changed' if changed else 'needs' if needs else e)
'''
)


@torchrun
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_what_a_callback_may_not_do_where_others_share_the_model(tmp_path, parallel):
    said = both(tmp_path, f'--parallel={parallel}', program=ALONE)[0][0].splitlines()
    want = [
        'double changed',
        'triple changed',
        'flip changed',
        'change_rate changed',
        'save needs',
        'look is allowed',
    ]
    assert said == want + ['gather needs', 'forward needs', 'barrier needs'] * (parallel == 'fsdp')
