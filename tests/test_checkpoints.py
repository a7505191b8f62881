"""What a cell of chapter 07 cannot show: real processes that are killed, signalled and started
again, and every kind of damage."""

import copy
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import processes
import pytest
import torch
from processes import finish
from safetensors.torch import load_file, save_file

from mingpt_nb import runs, scaling
from mingpt_nb.checks import TrainingDiverged
from mingpt_nb.data import DataError
from mingpt_nb.gpt2 import load_pretrained, save_pretrained
from mingpt_nb.model import GPT
from mingpt_nb.runs import CheckpointError, OtherRun, check, prune
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import ConfigError, FolderInUse, cli, hold, set_seed
from mingpt_nb.weights import checkpoints, find_model, held_out_loss

if os.name != 'nt':
    import pty
    import resource

posix = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')

PROGRAM = '''
import hashlib, sys, torch
from mingpt_nb import runs
from mingpt_nb.model import GPT
from mingpt_nb.scaling import Trainer
from mingpt_nb.utils import set_seed

class Noisy:
    "Items with noise from torch, made one by one."
    def __len__(self): return 1000
    def __getitem__(self, i):
        seq = (torch.arange(i, i + 17) + torch.randint(3, (17,))) % 50
        return seq[:-1], seq[1:]

def main():
    torch.set_num_threads(1)
    set_seed(1)
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    # a step takes little, a save some milliseconds
    c.merge_from_dict(dict(n_layer=1, n_head=4, n_embd=256, vocab_size=50, block_size=16))
    t.merge_from_dict(dict(device='cpu', max_iters=200, batch_size=4, log_every=1))
    t.merge_from_dict(dict(work_dir='out', checkpoint_every=5, resume='auto'))
    t.merge_from_args(sys.argv[1:])
    trainer = Trainer(t, GPT(c), Noisy())
    real = runs.write_folder
    def told(*args): print('saving', flush=True); real(*args); print('saved', flush=True)
    runs.write_folder = told
    trainer.add_callback('on_batch_end', lambda t: print('step', t.iter_num, flush=True))
    trainer.run()
    weights = b''.join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    print('sha256', hashlib.sha256(weights).hexdigest())

if __name__ == '__main__': main()
'''


def start(folder, *args, **kwargs):
    (folder / 'program.py').write_text(PROGRAM)
    return processes.start('program.py', *args, cwd=folder, **kwargs)


def digest(out):
    return out.split('sha256 ')[1].split()[0]


def lives_and_dies(folder, dice, during_save):
    """Start the program, kill it after some steps, if wanted in the middle of the save that
    follows. Was there a half-written folder?"""
    process, steps = start(folder), dice.randrange(1, 16)
    for line in process.stdout:
        steps -= line.startswith('step')
        if steps <= 0 and (line == 'saving\n' or not during_save):
            break
    time.sleep(dice.uniform(0, 0.05))
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    return any(folder.glob('out/checkpoints/.step-*'))


@posix
def test_twenty_kills_change_nothing(tmp_path):
    dice, (killed, straight) = random.Random(0), (tmp_path / n for n in ('killed', 'straight'))
    killed.mkdir()
    straight.mkdir()
    half_written = sum(lives_and_dies(killed, dice, during_save=n % 2) for n in range(20))
    assert half_written >= 3
    out, _ = finish(start(killed))
    want, _ = finish(start(straight, plain=True))
    assert digest(out) == digest(want)
    first = int(out.split('step ')[1].split()[0])
    assert 0 < first < 200  # it went on
    rows = [(folder / 'out' / 'metrics.jsonl').read_text() for folder in (killed, straight)]
    assert rows[0] == rows[1] and [json.loads(r)['iter'] for r in rows[0].splitlines()] == list(
        range(200)
    )
    for folder in killed, straight:
        assert [p.name for p in checkpoints(folder / 'out')] == [
            'step-00000190',
            'step-00000195',
            'step-00000200',
        ]
        assert {p.name for p in (folder / 'out').iterdir() if 'set-aside' not in p.name} == {
            'checkpoints',
            'metrics.jsonl',
        }
    out, _ = finish(start(killed))  # complete: nothing is trained, nothing is saved
    assert digest(out) == digest(want) and 'step' not in out and 'sav' not in out


@posix
@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_signal_saves_and_ends_and_the_rest_is_bit_equal(tmp_path, workers):
    arguments = '--max_iters=40', f'--num_workers={workers}', '--checkpoint_every=1000'
    want, _ = finish(start(tmp_path, *arguments, '--work_dir=whole', plain=workers == '0'))
    for number, code in (signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT):
        process = start(tmp_path, *arguments)
        for line in process.stdout:
            if line.startswith('step') and int(line.split()[1]) % 10 == 7:
                break
        process.send_signal(number)
        _, err = finish(process, code)
        said = [line for line in err.splitlines() if 'stopped after' in line]
        assert (
            said[0].startswith(f'{number.name}: stopped after')
            and 'saved as out/checkpoints/step-000000' in said[0]
        )
    out, _ = finish(start(tmp_path, *arguments))
    assert (
        digest(out) == digest(want)
        and out.count('step ') < 40
        and not list(tmp_path.glob('out/checkpoints/.*'))
    )


@posix
def test_a_signal_to_the_whole_group(tmp_path):
    process = start(tmp_path, '--max_iters=100000', '--num_workers=2', start_new_session=True)
    for line in process.stdout:
        if line == 'step 8\n':
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, err = finish(process, 143)
    assert 'SIGTERM: stopped after' in err and 'Traceback' not in err


@pytest.mark.parametrize('command', ['adder', 'chargpt'])
def test_commands_resume(tmp_path, command):
    (tmp_path / 'input.txt').write_text(
        'It was the best of times, it was the worst of times. ' * 40
    )
    arguments = {
        'adder': ['--data.ndigit=1', '--trainer.batch_size=8'],
        'chargpt': [
            'input.txt',
            '--model.model_type=gpt-nano',
            '--data.block_size=16',
            '--trainer.batch_size=4',
            '--trainer.eval_every=10',
            '--trainer.eval_batches=1',
            '--sample.length=20',
        ],
    }[command]

    def run(folder, *more, code=0):
        return processes.run(
            '-m',
            f'mingpt_nb.{command}',
            *arguments,
            f'--system.work_dir={folder}',
            '--trainer.lr_schedule=constant',
            '--trainer.device=cpu',
            '--trainer.checkpoint_every=15',
            '--trainer.resume=auto',
            *more,
            cwd=tmp_path,
            code=code,
        )

    whole, _ = run('whole', '--trainer.max_iters=40')
    run('parts', '--trainer.max_iters=20')
    parts, _ = run('parts', '--trainer.max_iters=40')
    for file in 'checkpoints/step-00000040/model.safetensors', 'model/model.safetensors':
        assert (
            hashlib.sha256((tmp_path / 'whole' / file).read_bytes()).digest()
            == hashlib.sha256((tmp_path / 'parts' / file).read_bytes()).digest()
        )
    assert parts.splitlines()[-2:] == [
        line.replace('whole', 'parts') for line in whole.splitlines()[-2:]
    ]
    again, _ = run('parts', '--trainer.max_iters=40')  # complete
    assert again.splitlines()[-2:] == parts.splitlines()[-2:]
    _, refused = run(
        'parts',
        '--trainer.max_iters=60',
        '--trainer.batch_size=9',
        '--trainer.resume=parts/checkpoints/step-00000040',
        code=1,
    )
    assert (
        refused.splitlines()[-1].startswith(f'mingpt-nb {command}: ')
        and 'batch_size is 9 here' in refused
    )


class Rows:
    def __len__(self):
        return 100

    def __getitem__(self, i):
        seq = torch.arange(i, i + 9) % 11
        return seq[:-1], seq[1:]


def trainer(work_dir=None, data=None, model=None, evaluate=None, **kw):
    set_seed(1)
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=11, block_size=8) | (model or {}))
    t.merge_from_dict(
        dict(
            device='cpu',
            max_iters=6,
            batch_size=4,
            work_dir=work_dir and str(work_dir),
            log_every=1,
            progress=False,
        )
        | kw
    )
    return Trainer(t, GPT(c), data or Rows(), evaluate)


def flat(t):
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    t = trainer(tmp_path_factory.mktemp('run'), checkpoint_every=2)
    t.run()
    return t


def truncate(p):
    p.write_bytes(p.read_bytes()[:-7])


def empty(p):
    p.write_bytes(b'')


def flip(p):
    raw = bytearray(p.read_bytes())
    raw[len(raw) // 2] ^= 4
    p.write_bytes(raw)


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'config.json', 'optimizer.pt', 'trainer.json', 'SHA256SUMS']
)
@pytest.mark.parametrize('damage', [truncate, empty, flip, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, finished, name, damage):
    shutil.copytree(finished.config.work_dir, tmp_path / 'run')
    newest = checkpoints(tmp_path / 'run')[-1]
    damage(newest / name)
    t = trainer(tmp_path / 'run', checkpoint_every=2, resume='auto')
    with pytest.warns(UserWarning, match='step-00000006 is .*Trying the one before') as caught:
        t.run()
    assert len(caught) == 1 and (name in str(caught[0].message) or name == 'SHA256SUMS')
    assert torch.equal(flat(t), flat(finished)) and t.history == finished.history
    check(newest)  # written again
    assert [p.name for p in checkpoints(tmp_path / 'run' / 'set-aside-1')] == ['step-00000006']


def test_all_damaged_is_a_fresh_start(tmp_path, finished):
    shutil.copytree(finished.config.work_dir, tmp_path / 'run')
    for p in checkpoints(tmp_path / 'run'):
        flip(p / 'optimizer.pt')
    t = trainer(tmp_path / 'run', checkpoint_every=2, resume='auto')
    with pytest.warns(UserWarning) as caught:
        t.run()
    assert len(caught) == 3 and torch.equal(flat(t), flat(finished))
    for folder in 'run', 'run/set-aside-1':
        assert [p.name for p in checkpoints(tmp_path / folder)] == [
            'step-00000002',
            'step-00000004',
            'step-00000006',
        ]


@pytest.mark.parametrize(
    'other, says',
    [
        (dict(batch_size=5), 'batch_size is 5 here, and 4 in the checkpoint'),
        (dict(seed=2), 'seed is 2 here, and 1'),
        (dict(learning_rate=0.1), 'learning_rate'),
        (dict(lr_schedule='cosine'), 'lr_schedule'),
        (dict(betas=(0.9, 0.9)), 'betas'),
        (dict(grad_norm_clip=None), 'grad_norm_clip'),
        (dict(model=dict(block_size=9)), 'model.block_size is 9'),
        (dict(model=dict(resid_pdrop=0.0)), 'model.resid_pdrop'),
        (dict(model=dict(vocab_size=12)), 'model.vocab_size'),
        (dict(data=[Rows()[0]] * 7), 'items is 7 here, and 100'),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_changes_nothing(finished, other, says):
    t = trainer(**other)
    before, random_numbers = flat(t), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=says):
        t.load_checkpoint(finished.checkpoint)
    assert (
        torch.equal(flat(t), before)
        and torch.equal(torch.get_rng_state(), random_numbers)
        and t.iter_num == 0
    )


@pytest.mark.parametrize(
    'other',
    [
        dict(num_workers=1),
        dict(log_every=2),
        dict(max_iters=100),
        dict(eval_every=3),
        dict(keep_last=1),
    ],
)
def test_what_changes_no_number_is_free(finished, other):
    t = trainer(**other)
    t.load_checkpoint(finished.checkpoint)
    assert t.iter_num == 6 and torch.equal(flat(t), flat(finished))


@pytest.mark.parametrize('raw', [b'\x80\x02c__builtin__\nprint\n.', None])
def test_a_pickle_is_never_run(tmp_path, finished, raw):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    folder = tmp_path / 'step-00000006'
    shutil.copytree(finished.checkpoint, folder)
    (folder / 'optimizer.pt').write_bytes(raw or b'')
    if raw is None:
        torch.save(Trap(), folder / 'optimizer.pt')
    sums = [
        f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n'
        for p in folder.iterdir()
        if p.name != 'SHA256SUMS'
    ]
    (folder / 'SHA256SUMS').write_text(''.join(sums))  # a forger would do that, too
    t = trainer()
    with pytest.raises(CheckpointError, match='optimizer.pt'):
        t.load_checkpoint(folder)
    assert not (tmp_path / 'sprung').exists() and t.iter_num == 0


@posix
def test_a_worker_that_ends_while_the_last_checkpoint_is_saved_raises_nothing(
    tmp_path, monkeypatch
):
    def of_torch(*_):
        raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated.')

    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGCHLD)
        return write_folder(*args, **kwargs)

    write_folder = runs.write_folder
    monkeypatch.setattr(runs, 'write_folder', slow)
    t = trainer(tmp_path)
    t.add_callback(
        'on_batch_end', lambda t: t.iter_num == 2 and os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.signal(signal.SIGCHLD, of_torch)
    try:
        with pytest.raises(SystemExit) as e:
            t.run()
        assert e.value.code == 143 and [p.name for p in checkpoints(tmp_path)] == ['step-00000003']
        assert signal.getsignal(signal.SIGCHLD) is of_torch
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_best_is_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    t = trainer(tmp_path, evaluate=Rows(), checkpoint_every=100, keep_last=1, eval_every=1)
    t.eval = lambda: next(losses)
    t.run()
    assert [p.name for p in checkpoints(tmp_path)] == [
        'step-00000002',
        'step-00000006',
    ] and find_model(tmp_path).name == 'step-00000002'


def test_divergence_names_the_last_checkpoint(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2)

    def spoil(t):
        if t.iter_num == 4:
            t.model.lm_head.weight.data[0, 0] = float('nan')

    t.add_callback('on_batch_end', spoil)
    with pytest.raises(TrainingDiverged, match='step 5: .*Last checkpoint: .*step-00000004'):
        t.run()
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000002', 'step-00000004']


def contents(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob('*')}


@pytest.mark.parametrize(
    'made',
    [
        lambda f: (f / 'thesis.txt').write_text('Chapter one'),  # somebody's work
        lambda f: (f / 'SHA256SUMS').write_text(
            f'{"0" * 64}  config.json\n'
        ),  # checksums, but not of a checkpoint
        lambda f: (f / 'chapters').mkdir(),
        lambda f: (f / 'SHA256SUMS').unlink(),
        lambda f: (f / '.hidden').touch(),
    ],
)
def test_nothing_but_a_checkpoint_is_replaced(tmp_path, made):
    folder, t = tmp_path / 'results', trainer(max_iters=1)
    t.run()
    folder.mkdir()
    for _ in range(2):
        assert t.save_checkpoint(folder) == folder  # empty, and a checkpoint
    check(folder)
    made(folder)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match='results holds .* is no part of a checkpoint'):
        t.save_checkpoint(folder)
    assert contents(tmp_path) == before


def test_the_run_is_not_replaced_by_its_checkpoint(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2)
    t.run()
    before = contents(tmp_path)
    for target in (
        tmp_path,
        tmp_path / 'checkpoints',
        tmp_path / 'metrics.jsonl',
        tmp_path / 'metrics.jsonl' / 'below',
    ):
        with pytest.raises(CheckpointError):
            t.save_checkpoint(target)
    assert contents(tmp_path) == before


def test_no_model_is_written_into_a_checkpoint(tmp_path, finished):
    shutil.copytree(finished.config.work_dir, tmp_path / 'run')
    before, at = contents(tmp_path), checkpoints(tmp_path / 'run')[-1]
    for write in (
        lambda: save_pretrained(finished.model, at),
        lambda: finished.model.save_pretrained(at),
    ):
        with pytest.raises(ValueError, match='is a checkpoint'):
            write()
    assert contents(tmp_path) == before


def a_run(folder, **kw):
    "A run with all that the programs of this package leave in its folder."
    t = trainer(folder, checkpoint_every=2, **kw)
    t.run()
    save_pretrained(t.model, folder / 'model')
    for name in 'config.json', 'args.txt', 'training.png':
        (folder / name).write_text(f'the {name} of the first run')
    return contents(folder)


def test_a_start_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    before = a_run(tmp_path)
    with pytest.raises(
        OtherRun,
        match='batch_size is 5 here, and 4 in the checkpoint. To start over, set resume=None',
    ):
        trainer(tmp_path, checkpoint_every=2, batch_size=5, resume='auto').run()
    assert contents(tmp_path) == before


@pytest.mark.parametrize('left', ['checkpoints', 'no checkpoints', 'damaged ones'])
def test_what_an_earlier_run_has_left_is_set_aside_whole(tmp_path, left):
    a_run(tmp_path)
    for p in checkpoints(tmp_path):
        if left == 'no checkpoints':
            shutil.rmtree(p)
        if left == 'damaged ones':
            flip(p / 'model.safetensors')
    before = contents(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer(
            tmp_path,
            checkpoint_every=2,
            batch_size=5,
            resume=None if left == 'checkpoints' else 'auto',
        ).run()
    after = contents(tmp_path / 'set-aside-1')
    assert after == before or after == {k: v for k, v in before.items() if k != 'checkpoints'}
    assert (
        not (tmp_path / 'model').exists()
        and len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 6
    )
    t = trainer(tmp_path / 'set-aside-1', checkpoint_every=2, resume='auto')  # it is still a run
    if left == 'checkpoints':
        t.run()
        assert t.iter_num == 6 and not (tmp_path / 'set-aside-1' / 'set-aside-1').exists()


def test_going_back_keeps_a_copy_of_what_came_after(tmp_path):
    before = a_run(tmp_path)
    t = trainer(tmp_path, checkpoint_every=2, resume=tmp_path / 'checkpoints' / 'step-00000002')
    t.run()
    after = contents(tmp_path / 'set-aside-1')
    assert {k: v for k, v in before.items() if 'step-00000002' not in k} == after
    assert [r['iter'] for r in t.history] == list(range(6))
    for n, work_dir in ('4', tmp_path), ('6', tmp_path / 'set-aside-1'):
        back = trainer(resume=work_dir / 'checkpoints' / f'step-0000000{n}')
        assert back.begin() is None and [r['iter'] for r in back.history] == list(range(int(n)))


def test_a_program_asks_before_it_writes(tmp_path, capsys):
    line = [
        'adder',
        '--data.ndigit=1',
        f'--system.work_dir={tmp_path}',
        '--trainer.max_iters=4',
        '--trainer.checkpoint_every=2',
        '--trainer.resume=auto',
        '--trainer.lr_schedule=constant',
    ]
    cli(line)
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match='weight_decay is 0.5 here'):
        cli([*line, '--trainer.weight_decay=0.5'])
    assert contents(tmp_path) == before
    cli([*line[:-2], '--trainer.lr_schedule=constant', '--trainer.weight_decay=0.5'])
    assert contents(tmp_path / 'set-aside-1') == before


def test_what_is_on_another_disk_is_set_aside_there(tmp_path):
    other = Path('/dev/shm')
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip('one disk only')
    with tempfile.TemporaryDirectory(dir=other) as far:
        (tmp_path / 'checkpoints').symlink_to(far)
        trainer(tmp_path, checkpoint_every=2).run()
        trainer(tmp_path, checkpoint_every=2, keep_last=1).run()
        for folder, n in (tmp_path, 1), (tmp_path / 'set-aside-1', 3):
            assert len(checkpoints(folder)) == n
        assert (
            len(list(Path(far).glob('**/step-*'))) == 4
            and len(trainer(tmp_path / 'set-aside-1', resume='auto').history) == 0
        )
        t = trainer(tmp_path / 'set-aside-1', resume='auto')
        t.begin()
        assert t.iter_num == 6 and len(t.history) == 6


class Cut(Exception):
    pass


def stop_at(step):
    def callback(t):
        if t.iter_num == step:
            raise Cut

    return callback


def cut_and_resumed(folder, before=lambda t: None, after=None, step=4, **kw):
    """Two trainers with the same data: one runs through, one is cut off and resumed; `before`
    happens to both, `after` are settings of the second life."""
    straight = trainer(**kw)
    before(straight)
    straight.run()
    first = trainer(folder, checkpoint_every=2, **kw)
    before(first)
    first.add_callback('on_batch_end', stop_at(step))
    with pytest.raises(Cut):
        first.run()
    t = trainer(folder, checkpoint_every=2, resume='auto', **kw | (after or {}))
    t.run()
    return straight, t


def no_room_in_step_1(t):
    def hook(model, args):
        if t.iter_num == 1 and len(args[0]) > 2:
            raise torch.OutOfMemoryError('CUDA out of memory')

    t.model.register_forward_pre_hook(hook)


@pytest.mark.filterwarnings('ignore:step 1. out of memory')
def test_a_run_goes_on_in_as_many_parts_as_it_had(tmp_path):
    straight, t = cut_and_resumed(tmp_path, no_room_in_step_1)
    assert straight.engine.parts == t.engine.parts == 2
    assert t.history == straight.history and torch.equal(flat(t), flat(straight))


class Noisy(Rows):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (
            x + torch.randint(2, x.shape) + random.randrange(2) + numpy.random.randint(2)
        ) % 11, y


@pytest.mark.parametrize('workers', [(0, 1), (2, 0)])
def test_workers_may_come_and_go_also_with_random_data(tmp_path, workers):
    straight, t = cut_and_resumed(
        tmp_path,
        data=Noisy(),
        num_workers=workers[0],
        after=dict(num_workers=workers[1]),
        check_alignment=False,
    )
    assert t.history == straight.history and torch.equal(flat(t), flat(straight))


def test_random_data_are_looked_at_without_a_trace(tmp_path):
    def looking(n):
        t = trainer(evaluate=Noisy(), eval_every=n, check_alignment=False)
        t.run()
        return t

    seldom, often = looking(4), looking(1)
    assert torch.equal(flat(seldom), flat(often))
    assert seldom.history[-1] == often.history[-1]


def test_the_type_is_what_it_was(tmp_path, monkeypatch):
    machines = iter(
        [torch.bfloat16, torch.bfloat16, torch.float32]
    )  # two lives on one machine, and one on another
    monkeypatch.setattr(scaling, 'pick_dtype', lambda device: next(machines))
    straight, t = cut_and_resumed(
        tmp_path, model=dict(model_type=None, n_layer=1, n_head=2, n_embd=64)
    )
    assert (
        t.engine.dtype == torch.bfloat16
        and t.history == straight.history
        and torch.equal(flat(t), flat(straight))
    )
    assert next(machines, None) is None


@pytest.mark.parametrize('other', [dict(accumulate=2), dict(compile=True), dict(dtype='bfloat16')])
def test_other_bits_are_refused_unless_asked_for(tmp_path, finished, other, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    ((name, value),) = other.items()
    shutil.copytree(finished.config.work_dir, tmp_path / 'run')
    t = trainer(tmp_path / 'run', resume='auto', checkpoint_every=2, max_iters=8, **other)
    before = contents(tmp_path)
    with pytest.raises(
        OtherRun,
        match=f'would go on with other bits: {name} is {value} here, and .* '
        'If that is meant, set same_bits=False',
    ):
        t.run()
    assert contents(tmp_path) == before
    t = trainer(
        tmp_path / 'run', resume='auto', checkpoint_every=2, max_iters=8, same_bits=False, **other
    )
    t.begin()
    assert t.iter_num == 6 and torch.equal(flat(t), flat(finished))


def test_a_kill_in_the_last_pruning_is_made_good(tmp_path, monkeypatch, finished):
    run = tmp_path / 'run'

    def life(k):
        "Remove folders k times, then be cut off."
        calls, real = iter(range(100)), shutil.rmtree

        def rmtree(path, **kw):
            if Path(path).name.endswith('.gone') and not kw and next(calls) >= k:
                raise Cut
            real(path, **kw)

        with monkeypatch.context() as m:
            m.setattr(shutil, 'rmtree', rmtree)
            trainer(run, checkpoint_every=1, keep_last=1, resume='auto').run()

    for k in range(5):
        shutil.rmtree(run, ignore_errors=True)
        with pytest.raises(Cut):
            life(k)
    assert checkpoints(run)[-1].name == 'step-00000006' and list(
        run.glob('checkpoints/.*')
    )  # k = 4: the last one
    shutil.copytree(
        run / 'checkpoints' / 'step-00000006', run / 'checkpoints' / 'step-00000003'
    )  # and one not yet begun
    again = trainer(run, checkpoint_every=1, keep_last=1, resume='auto', max_iters=6)
    again.run()
    assert (
        again.iter_num == 6
        and [p.name for p in (run / 'checkpoints').iterdir()] == ['step-00000006']
        and torch.equal(flat(again), flat(finished))
    )


class Room:
    """Callback: files may not be larger than 100,000 bytes from step `first` to step `last`, as on
    a full disk."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def __call__(self, t):
        if t.iter_num == self.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if t.iter_num == self.last:
            self.end()

    def end(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@posix
@pytest.mark.parametrize('last', [4, 9])
def test_a_full_disk_ends_the_run_only_at_the_last_save(tmp_path, finished, last):
    t, room = trainer(tmp_path, checkpoint_every=2), Room(2, last)
    t.add_callback('on_batch_end', room)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            if last == 4:
                t.run()
            else:
                with pytest.raises(
                    CheckpointError,
                    match='step-00000006: File too large; [0-9,]+ bytes are free there$',
                ):
                    t.run()
    finally:
        room.end()
    line = (
        r'cannot write a checkpoint of 1,\d\d\d,\d\d\d bytes into .*step-0000000[46]: '
        r'File too large; [\d,]+ bytes are free there. Trying again at the next checkpoint'
    )
    assert len(caught) == 1 + (last == 9) and all(
        re.fullmatch(line, str(w.message)) for w in caught
    )
    assert [p.name for p in sorted((tmp_path / 'checkpoints').iterdir())] == [
        'step-00000002',
        'step-00000006',
    ][: 3 - len(caught)]
    assert (
        torch.equal(flat(t), flat(finished))
        and len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 6
    )
    for p in checkpoints(tmp_path):
        check(p)


@posix
def test_rows_that_found_no_room_are_written_later(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2, keep_last=9)

    def crowd(t):
        if t.iter_num == 1:
            resource.setrlimit(
                resource.RLIMIT_FSIZE,
                ((tmp_path / 'metrics.jsonl').stat().st_size + 20, resource.RLIM_INFINITY),
            )
        if t.iter_num == 3:
            Room(0, 0).end()

    t.add_callback('on_batch_end', crowd)
    try:
        with pytest.warns(
            UserWarning,
            match='cannot write metrics.jsonl into .*: File too large; .* '
            'Trying again after each step|cannot write a checkpoint',
        ):
            t.run()
    finally:
        Room(0, 0).end()
    assert [
        json.loads(r)['iter'] for r in (tmp_path / 'metrics.jsonl').read_text().splitlines()
    ] == list(range(6))
    for n in 4, 6:
        back = trainer()
        back.load_checkpoint(tmp_path / 'checkpoints' / f'step-0000000{n}')
        assert back.history == t.history[:n]


def reseal(folder):
    "Right checksums, whatever is in the folder."
    sums = [
        f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n'
        for p in sorted(folder.iterdir())
        if p.name != 'SHA256SUMS'
    ]
    (folder / 'SHA256SUMS').write_text(''.join(sums))


def in_json(**kw):
    return lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | kw))


def text(t):
    return lambda p: p.write_text(t)


def without(key):
    return lambda p: p.write_text(
        json.dumps({k: v for k, v in json.loads(p.read_text()).items() if k != key})
    )


def in_rng(**kw):
    return lambda p: in_json(rng=json.loads(p.read_text())['rng'] | kw)(p)


def in_optimizer(change):
    return lambda p: torch.save(change(torch.load(p)), p)


def in_weights(change):
    return lambda p: save_file(change(load_file(p)), p)


def in_state(**kw):
    return in_optimizer(lambda s: s | {'state': s['state'] | {0: s['state'][0] | kw}})


def in_group(**kw):
    return in_optimizer(lambda s: s | {'param_groups': [g | kw for g in s['param_groups']]})


WRONG = {
    'trainer.json': [
        text('null'),
        text('{}'),
        text(''),
        text('{"step": 6'),
        text('[]'),
        in_json(step=1e308),
        in_json(step='6'),
        in_json(step=True),
        in_json(step=-6),
        in_json(step=9),
        in_json(clipped='x'),
        in_json(settings=None),
        in_json(history={}),
        in_json(history=[1]),
        in_json(rows=-1),
        in_json(rng=None),
        in_rng(python=[3, [], None]),
        in_rng(numpy=['MT19937', [1] * 624, 10**9, 0, 0.0]),
        in_rng(torch=[1, 2, 3]),
        in_rng(cuda='x'),
        without('rng'),
        without('step'),
        without('engine'),
        in_json(engine=dict(scaler={}, parts=0)),
        in_json(engine=dict(scaler={'scale': 'x'})),
    ],
    'optimizer.pt': [
        text(''),
        text('text'),
        truncate,
        in_optimizer(lambda s: [s]),
        in_optimizer(lambda s: None),
        in_optimizer(lambda s: s | {'param_groups': []}),
        in_optimizer(lambda s: s | {'state': []}),
        in_state(exp_avg=torch.zeros(1)),
        in_state(exp_avg_sq='x'),
        in_group(betas='x'),
        in_group(eps=None),
        in_group(params=[0]),
    ],
    'model.safetensors': [
        text(''),
        text('x' * 100),
        truncate,
        in_weights(lambda w: {'a': torch.zeros(2)}),
        in_weights(lambda w: w | {'one_more': torch.zeros(2)}),
        in_weights(lambda w: w | {'lm_head.weight': torch.zeros(2, 2)}),
        in_weights(lambda w: {k: v.long() for k, v in w.items()}),
    ],
}


@pytest.mark.parametrize(
    'name, change', [(name, change) for name, changes in WRONG.items() for change in changes]
)
def test_what_cannot_be_loaded_is_named_and_changes_nothing(tmp_path, finished, name, change):
    shutil.copytree(finished.config.work_dir, tmp_path / 'run')
    newest = checkpoints(tmp_path / 'run')[-1]
    change(newest / name)
    reseal(newest)
    t = trainer()
    t.run()  # it has an optimizer with a state of its own
    before = (
        flat(t),
        copy.deepcopy(t.optimizer.state_dict()),
        t.history[:],
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.rand(),
    )
    numpy.random.seed(0)
    with pytest.raises(CheckpointError, match=name) as e:
        t.load_checkpoint(newest)
    assert '\n' not in str(e.value) and 'more than numbers' not in str(e.value)
    assert (
        torch.equal(flat(t), before[0])
        and t.history == before[2]
        and torch.equal(torch.get_rng_state(), before[3])
        and random.getstate() == before[4]
    )
    for i, numbers in t.optimizer.state_dict()['state'].items():
        for k, v in numbers.items():
            assert torch.equal(v, before[1]['state'][i][k])
    assert (
        t.iter_num == 6
        and t.checkpoint is None
        and numpy.random.rand() == numpy.random.RandomState(0).rand()
    )
    fresh = trainer(tmp_path / 'run', resume='auto', checkpoint_every=2)
    with pytest.warns(UserWarning, match=f'{name}.*Trying the one before'):
        fresh.begin()
    assert fresh.iter_num == 4


class Odd(torch.optim.SGD):
    "An optimizer of somebody else, which changes before it looks."

    version = 1

    def state_dict(self):
        return super().state_dict() | {'version': self.version}

    def load_state_dict(self, state):
        self.param_groups[0]['lr'] = state['param_groups'][0]['lr']
        if state['version'] != self.version:
            raise KeyError('another version')


def test_an_optimizer_that_refuses_is_as_it_was(tmp_path):
    first, second = trainer(), trainer()
    first.optimizer, second.optimizer = (
        Odd(first.model.parameters(), lr=7.0),
        Odd(second.model.parameters(), lr=0.5),
    )
    second.optimizer.version = 2
    before = flat(second)
    first.model.lm_head.weight.data.fill_(1.0)
    first.save_checkpoint(tmp_path / 'odd')
    with pytest.raises(
        CheckpointError, match='optimizer.pt does not fit the optimizer: .*another version'
    ):
        second.load_checkpoint(tmp_path / 'odd')
    assert second.iter_num == 0 and second.checkpoint is None and torch.equal(flat(second), before)
    assert second.optimizer.param_groups[0]['lr'] == 0.5


@pytest.mark.parametrize(
    'wrong',
    [
        'null',
        '{"eval_loss": "x"}',
        '{"eval_loss": [1]}',
        '{"eval_loss": true}',
        '[]',
        '',
        '{',
        '{"eval_loss": NaN}',
    ],
)
def test_a_loss_that_is_none_does_not_stop_pruning(tmp_path, wrong):
    losses = iter([3.0, 2.0, 1.0, 0.5])
    t = trainer(
        tmp_path, checkpoint_every=1, keep_last=9, evaluate=Rows(), eval_every=1, max_iters=4
    )
    t.eval = lambda: next(losses)
    t.run()
    for name in 'eval.json', 'trainer.json':
        (checkpoints(tmp_path)[0] / name).write_text(wrong)
    assert (
        held_out_loss(checkpoints(tmp_path)[0]) == float('inf')
        and find_model(tmp_path).name == 'step-00000004'
    )
    prune(tmp_path, 1, True)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000004']


def test_the_history_is_kept_once(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2)
    t.history = [dict(iter=-1 - n, loss=1.5, lr=0.1, grad_norm=1.0) for n in range(50_000)]
    t.run()
    newest = checkpoints(tmp_path)[-1]
    assert (newest / 'trainer.json').stat().st_size < 50_000 and (
        newest / 'eval.json'
    ).stat().st_size < 100
    (newest / 'trainer.json').unlink()
    assert held_out_loss(newest) == t.history[-1]['eval_loss']  # all that pruning reads
    back = trainer(tmp_path, resume='auto', evaluate=Rows(), eval_every=2)
    with pytest.warns(UserWarning, match='trainer.json is missing'):
        back.begin()
    assert (
        back.iter_num == 4
        and back.history == t.history[: len(back.history)]
        and len(back.history) == 50_000 + 4 + 2
    )
    t.save_checkpoint(tmp_path / 'apart')  # alone: with all of it
    alone = trainer()
    alone.load_checkpoint(tmp_path / 'apart')
    assert alone.history == t.history


def test_a_history_that_is_gone_is_not_the_end(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2)
    t.run()
    best = min((r for r in t.history if 'eval_loss' in r), key=lambda r: r['eval_loss'])
    for content in None, '{"iter": 0}\n' * 20, 'not json':
        (tmp_path / 'metrics.jsonl').unlink(missing_ok=True)
        if content:
            (tmp_path / 'metrics.jsonl').write_text(content)
        back = trainer(tmp_path, evaluate=Rows())
        with pytest.warns(UserWarning, match='its history of 9 rows is not in'):
            back.load_checkpoint(t.checkpoint)
        assert back.iter_num == 6 and back.history == [best] and torch.equal(flat(back), flat(t))


def as_it_was_written_once(folder):
    """The history, the loss and the scale in trainer.json, all settings in one list, and no
    eval.json."""
    state = json.loads((folder / 'trainer.json').read_text())
    rows = [
        json.loads(r) for r in (folder.parent.parent / 'metrics.jsonl').read_text().splitlines()
    ]
    state['history'] = rows[: state['rows']] + state['history']
    state |= dict(
        eval_loss=json.loads((folder / 'eval.json').read_text())['eval_loss'],
        scaler=state['engine']['scaler'],
    )
    state['settings']['dtype'] = 'auto'
    for key in 'rows', 'last_row', 'best_row', 'engine', 'ways':
        del state[key]
    (folder / 'trainer.json').write_text(json.dumps(state))
    (folder / 'eval.json').unlink()
    reseal(folder)


def test_checkpoints_of_before_are_loaded(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2)
    t.run()
    losses = [held_out_loss(p) for p in checkpoints(tmp_path)]
    for p in checkpoints(tmp_path):
        as_it_was_written_once(p)
    assert [held_out_loss(p) for p in checkpoints(tmp_path)] == losses
    shutil.rmtree(checkpoints(tmp_path)[-1])
    back = trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2, resume='auto')
    back.run()
    assert back.history == t.history and torch.equal(flat(back), flat(t))


def test_the_folder_of_a_run_is_no_checkpoint_but_points_to_auto(tmp_path, finished):
    with pytest.raises(
        CheckpointError,
        match='is the folder of a run, not a checkpoint: '
        "resume='auto' with this as work_dir goes on",
    ):
        trainer(tmp_path, resume=finished.config.work_dir).run()


@posix
def test_a_closed_terminal_saves_and_ends(tmp_path):
    (tmp_path / 'program.py').write_text(PROGRAM)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(processes.ROOT)}
        os.execve(
            sys.executable,
            [
                sys.executable,
                'program.py',
                '--max_iters=100000',
                '--checkpoint_every=100000',
                '--progress=true',
            ],
            env,
        )
    said = b''
    while b'step 7' not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    (saved,) = checkpoints(tmp_path / 'out')
    check(saved)


class Broken(Rows):
    def __init__(self, how):
        self.how = how

    def __getitem__(self, i):
        if i > 60:
            self.how()
        return super().__getitem__(i)


def raise_error():
    raise KeyError('no such file')


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_data_error_names_item_and_worker(workers):
    with pytest.raises(
        DataError, match=r"train_dataset\[(6[1-9]|[789]\d)\]: KeyError: 'no such file'"
    ) as e:
        trainer(data=Broken(raise_error), num_workers=workers, max_iters=50).run()
    assert 'DataLoader worker process' in str(e.value) if workers else 'worker' not in str(e.value)
    with pytest.raises(DataError, match=r'eval_dataset\[61\]'):
        trainer(evaluate=Broken(raise_error)).eval()


@posix
def test_a_worker_that_dies_names_itself(tmp_path):
    t = trainer(tmp_path, data=Broken(die), num_workers=2, max_iters=50)
    with pytest.raises(
        RuntimeError,
        match=r'step \d+: a data worker died: (DataLoader worker \(pid|ConnectionR|EOFE).*\. '
        r'If .*num_workers, now 2.*Last checkpoint: None',
    ):
        t.run()


def test_quiet_is_quiet(capfd, tmp_path):
    trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2).run()
    assert capfd.readouterr() == ('', '')


@posix
def test_a_second_run_in_the_same_folder_is_refused_and_a_kill_frees_it(tmp_path):
    first = start(tmp_path, '--max_iters=100000', '--num_workers=1')
    for line in first.stdout:
        if line == 'step 6\n':
            break
    _, err = finish(start(tmp_path), code=1)
    assert re.search(
        rf'FolderInUse: out is in use by another run, process {first.pid} on '
        rf'{re.escape(platform.node())}, since \d{{4}}-\d\d-\d\d ',
        err.splitlines()[-1],
    )
    assert first.returncode is None and not list((tmp_path / 'out').glob('set-aside*'))
    first.kill()  # its worker lives on for a while, and does not hold the folder
    first.communicate(timeout=60)
    out, _ = finish(start(tmp_path, '--max_iters=10'))
    assert 'sha256' in out and sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'checkpoints',
        'metrics.jsonl',
    ]


def in_another_thread(f, *args):
    with ThreadPoolExecutor() as pool:
        return pool.submit(f, *args).result()


@pytest.mark.parametrize('command', ['adder', 'chargpt'])
def test_a_command_touches_nothing_in_the_folder_of_another_run(tmp_path, command):
    (tmp_path / 'input.txt').write_text('It was the best of times. ' * 40)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'ids.bin').write_text('of the other run')
    args = {
        'adder': ['--data.ndigit=1'],
        'chargpt': [
            str(tmp_path / 'input.txt'),
            '--text.map_above=0',
            '--model.model_type=gpt-nano',
            '--data.block_size=8',
        ],
    }[command]
    with hold(tmp_path / 'out'):
        with pytest.raises(
            SystemExit, match=f'mingpt-nb {command}: .*out is in use by another run'
        ):
            in_another_thread(
                cli,
                [command, *args, f'--system.work_dir={tmp_path / "out"}', '--trainer.max_iters=1'],
            )
        assert (
            sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['.lock', 'ids.bin']
            and (tmp_path / 'out' / 'ids.bin').read_text() == 'of the other run'
        )


def test_what_a_trainer_does_to_its_folder_it_does_alone(tmp_path):
    trainer(tmp_path, checkpoint_every=3).run()
    before = contents(tmp_path)
    with hold(tmp_path):
        for act in 'run', 'begin', 'save_checkpoint':
            other = trainer(tmp_path)
            with pytest.raises(FolderInUse, match='in use by another run'):
                in_another_thread(getattr(other, act))
    assert contents(tmp_path) == before
    trainer(tmp_path, resume='auto').run()
    assert not (tmp_path / '.lock').exists()


class Letters:
    "Items of a text, as of a CharDataset."

    def __init__(self, text):
        self.ids = torch.tensor([ord(c) for c in text])

    def __len__(self):
        return len(self.ids) - 8

    def __getitem__(self, i):
        return self.ids[i : i + 8], self.ids[i + 1 : i + 9]


class Bigram(torch.nn.Module):
    "minGPT's interface, and no GPT: two names for one matrix, and a buffer."

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(128, 128)
        self.twin = self.table
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))

    def configure_optimizers(self, config):
        return torch.optim.SGD(self.parameters(), lr=config.learning_rate, momentum=0.9)

    def forward(self, idx, targets=None):
        self.seen += 1
        logits = self.twin(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def letters_trainer(folder, text, model=None, **kwargs):
    set_seed(3)
    if model is None:
        c = GPT.get_default_config()
        c.merge_from_dict(dict(n_layer=1, n_head=2, n_embd=8, vocab_size=128, block_size=8))
        model = GPT(c)
    else:
        model = model()
    t = Trainer.get_default_config()
    t.merge_from_dict(
        dict(device='cpu', max_iters=10, batch_size=4, work_dir=folder, checkpoint_every=5)
        | dict(learning_rate=0.1, log_every=1, progress=False, resume='auto')
        | kwargs
    )
    trainer = Trainer(t, model, Letters(text))
    trainer.steps = []
    trainer.add_callback('on_batch_end', lambda t: t.steps.append(t.iter_num))
    return trainer


def test_another_text_of_the_same_length_is_another_run(tmp_path):
    first, second = 'to be or not to be ' * 40, 'or not to be to be ' * 40
    letters_trainer(tmp_path, first).run()
    other = letters_trainer(tmp_path, second, max_iters=20)
    with pytest.raises(OtherRun, match=r'train_dataset\[\d+\] is another item than it was'):
        other.run()
    assert other.iter_num == 0
    again = letters_trainer(tmp_path, first, max_iters=20)
    again.run()
    assert len(again.steps) == 10


def test_a_checkpoint_that_does_not_know_its_data_goes_on(tmp_path):
    letters_trainer(tmp_path, 'to be or not to be ' * 40).run()
    file = checkpoints(tmp_path)[-1] / 'trainer.json'
    state = json.loads(file.read_text())
    del state['settings']['data']
    file.write_text(json.dumps(state))
    sums = file.with_name('SHA256SUMS')
    new = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(re.sub(r'\w+(?=  trainer.json)', new, sums.read_text()))
    again = letters_trainer(tmp_path, 'or not to be to be ' * 40, max_iters=20)
    again.run()
    assert len(again.steps) == 10


def test_a_model_that_is_no_gpt_is_trained_saved_and_resumed_to_the_same_bits(tmp_path):
    text = 'to be or not to be ' * 40
    straight = letters_trainer(tmp_path / 'straight', text, Bigram, max_iters=20)
    straight.run()
    letters_trainer(tmp_path / 'cut', text, Bigram).run()
    again = letters_trainer(tmp_path / 'cut', text, Bigram, max_iters=20)
    again.run()
    assert len(again.steps) == 10 and again.history == straight.history
    for name, t in again.model.state_dict().items():
        assert torch.equal(t, straight.model.state_dict()[name]), name
    saved = load_file(checkpoints(tmp_path / 'cut')[-1] / 'model.safetensors')
    assert sorted(saved) == ['seen', 'table.weight'] and saved['seen'] == 20
    with pytest.raises(OtherRun, match='model'):
        letters_trainer(tmp_path / 'cut', text).run()
    with pytest.raises(ValueError, match='config.json'):
        find_and_load(tmp_path / 'cut')


def find_and_load(folder):
    return load_pretrained(find_model(folder))


def test_slices_are_for_a_gpt(tmp_path):
    with pytest.raises(ConfigError, match="parallel='fsdp' takes a GPT, .* not a Bigram"):
        letters_trainer(tmp_path, 'to be or not to be ' * 40, Bigram, parallel='fsdp').run()
