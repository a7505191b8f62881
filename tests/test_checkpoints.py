"""What a cell of chapter 07 cannot show: real processes that are killed, signalled and started again, and every kind of damage."""
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import mingpt_nb.checkpoints
from mingpt_nb.bpe import CharTokenizer, train_bpe
from mingpt_nb.checkpoints import CheckpointError, check, checkpoints, export, find_model
from mingpt_nb.model import GPT
from mingpt_nb.trainer import DataError, Trainer, TrainingDiverged, save_model
from mingpt_nb.utils import set_seed
import processes
from processes import finish

posix = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')

PROGRAM = '''
import hashlib, sys, torch
import mingpt_nb.checkpoints as checkpoints
from mingpt_nb.model import GPT
from mingpt_nb.trainer import Trainer
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
    c.merge_from_dict(dict(n_layer=1, n_head=4, n_embd=256, vocab_size=50, block_size=16))      # a step takes little, a save some milliseconds
    t.merge_from_dict(dict(device='cpu', max_iters=200, batch_size=4, work_dir='out', checkpoint_every=5, resume='auto', log_every=1))
    t.merge_from_args(sys.argv[1:])
    trainer = Trainer(t, GPT(c), Noisy())
    real = checkpoints.write_folder
    def told(*args): print('saving', flush=True); real(*args); print('saved', flush=True)
    checkpoints.write_folder = told
    trainer.add_callback('on_batch_end', lambda t: print('step', t.iter_num, flush=True))
    trainer.run()
    print('sha256', hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest())

if __name__ == '__main__': main()
'''


def start(folder, *args, **kwargs):
    (folder/'program.py').write_text(PROGRAM)
    return processes.start('program.py', *args, cwd=folder, **kwargs)


def digest(out): return out.split('sha256 ')[1].split()[0]


def lives_and_dies(folder, dice, during_save):
    "Start the program, kill it after some steps, if wanted in the middle of the save that follows. Was there a half-written folder?"
    process, steps = start(folder), dice.randrange(1, 16)
    for line in process.stdout:
        steps -= line.startswith('step')
        if steps <= 0 and (line == 'saving\n' or not during_save): break
    time.sleep(dice.uniform(0, 0.05))
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    return any(folder.glob('out/checkpoints/.step-*'))


@posix
def test_twenty_kills_change_nothing(tmp_path):
    dice, (killed, straight) = random.Random(0), (tmp_path/n for n in ('killed', 'straight'))
    killed.mkdir()
    straight.mkdir()
    half_written = sum(lives_and_dies(killed, dice, during_save=n % 2) for n in range(20))
    assert half_written >= 3
    out, _ = finish(start(killed))
    want, _ = finish(start(straight, plain=True))
    assert digest(out) == digest(want)
    first = int(out.split('step ')[1].split()[0])
    assert 0 < first < 200                                          # it went on
    rows = [(folder/'out'/'metrics.jsonl').read_text() for folder in (killed, straight)]
    assert rows[0] == rows[1] and [json.loads(r)['iter'] for r in rows[0].splitlines()] == list(range(200))
    for folder in killed, straight:
        assert [p.name for p in checkpoints(folder/'out')] == ['step-00000190', 'step-00000195', 'step-00000200']
        assert sorted(p.name for p in (folder/'out').iterdir()) == ['checkpoints', 'metrics.jsonl']
    out, _ = finish(start(killed))                                  # complete: nothing is trained, nothing is saved
    assert digest(out) == digest(want) and 'step' not in out and 'sav' not in out


@posix
@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_signal_saves_and_ends_and_the_rest_is_bit_equal(tmp_path, workers):
    arguments = '--max_iters=40', f'--num_workers={workers}', '--checkpoint_every=1000'
    want, _ = finish(start(tmp_path, *arguments, '--work_dir=whole', plain=workers == '0'))
    for number, code in (signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT):
        process = start(tmp_path, *arguments)
        for line in process.stdout:
            if line.startswith('step') and int(line.split()[1]) % 10 == 7: break
        process.send_signal(number)
        _, err = finish(process, code)
        said = [line for line in err.splitlines() if 'stopped after' in line]
        assert said[0].startswith(f'{number.name}: stopped after') and 'saved as out/checkpoints/step-000000' in said[0]
    out, _ = finish(start(tmp_path, *arguments))
    assert digest(out) == digest(want) and out.count('step ') < 40 and not list(tmp_path.glob('out/checkpoints/.*'))


@posix
def test_a_signal_to_the_whole_group(tmp_path):
    process = start(tmp_path, '--max_iters=100000', '--num_workers=2', start_new_session=True)
    for line in process.stdout:
        if line == 'step 8\n': break
    os.killpg(process.pid, signal.SIGTERM)
    _, err = finish(process, 143)
    assert 'SIGTERM: stopped after' in err and 'Traceback' not in err


@pytest.mark.parametrize('command', ['adder', 'chargpt'])
def test_commands_resume(tmp_path, command):
    (tmp_path/'input.txt').write_text('It was the best of times, it was the worst of times. ' * 40)
    arguments = {'adder': ['--data.ndigit=1', '--trainer.batch_size=8'], 'chargpt': ['input.txt', '--model.model_type=gpt-nano', '--data.block_size=16', '--trainer.batch_size=4',
                 '--trainer.eval_every=10', '--trainer.eval_batches=1', '--sample.length=20']}[command]
    def run(folder, *more, code=0):
        return processes.run('-m', f'mingpt_nb.{command}', *arguments, f'--system.work_dir={folder}', '--trainer.lr_schedule=constant', '--trainer.device=cpu',
                             '--trainer.checkpoint_every=15', '--trainer.resume=auto', *more, cwd=tmp_path, code=code)
    whole, _ = run('whole', '--trainer.max_iters=40')
    run('parts', '--trainer.max_iters=20')
    parts, _ = run('parts', '--trainer.max_iters=40')
    for file in 'checkpoints/step-00000040/model.safetensors', 'model/model.safetensors':
        assert hashlib.sha256((tmp_path/'whole'/file).read_bytes()).digest() == hashlib.sha256((tmp_path/'parts'/file).read_bytes()).digest()
    assert parts.splitlines()[-2:] == [line.replace('whole', 'parts') for line in whole.splitlines()[-2:]]
    again, _ = run('parts', '--trainer.max_iters=40')               # complete
    assert again.splitlines()[-2:] == parts.splitlines()[-2:]
    _, refused = run('parts', '--trainer.max_iters=60', '--trainer.batch_size=9', '--trainer.resume=parts/checkpoints/step-00000040', code=1)
    assert refused.splitlines()[-1].startswith(f'mingpt-nb {command}: ') and 'batch_size is 9 here' in refused


class Rows:
    def __len__(self): return 100

    def __getitem__(self, i):
        seq = torch.arange(i, i + 9) % 11
        return seq[:-1], seq[1:]


def trainer(work_dir=None, data=None, model=None, evaluate=None, **kw):
    set_seed(1)
    c, t = GPT.get_default_config(), Trainer.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=11, block_size=8) | (model or {}))
    t.merge_from_dict(dict(device='cpu', max_iters=6, batch_size=4, work_dir=work_dir and str(work_dir), log_every=1, progress=False) | kw)
    return Trainer(t, GPT(c), data or Rows(), evaluate)


def flat(t): return torch.cat([p.detach().flatten() for p in t.model.parameters()])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    t = trainer(tmp_path_factory.mktemp('run'), checkpoint_every=2)
    t.run()
    return t


def truncate(p): p.write_bytes(p.read_bytes()[:-7])
def empty(p): p.write_bytes(b'')
def flip(p):
    raw = bytearray(p.read_bytes())
    raw[len(raw) // 2] ^= 4
    p.write_bytes(raw)


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'optimizer.pt', 'trainer.json', 'SHA256SUMS'])
@pytest.mark.parametrize('damage', [truncate, empty, flip, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, finished, name, damage):
    shutil.copytree(finished.config.work_dir, tmp_path/'run')
    newest = checkpoints(tmp_path/'run')[-1]
    damage(newest/name)
    t = trainer(tmp_path/'run', checkpoint_every=2, resume='auto')
    with pytest.warns(UserWarning, match='step-00000006 is .*Trying the one before') as caught: t.run()
    assert len(caught) == 1 and (name in str(caught[0].message) or name == 'SHA256SUMS')
    assert torch.equal(flat(t), flat(finished)) and t.history == finished.history
    check(newest)                                                   # written again
    assert [p.name for p in (tmp_path/'run'/'set-aside-1').iterdir()] == ['step-00000006']


def test_all_damaged_is_a_fresh_start(tmp_path, finished):
    shutil.copytree(finished.config.work_dir, tmp_path/'run')
    for p in checkpoints(tmp_path/'run'): flip(p/'optimizer.pt')
    t = trainer(tmp_path/'run', checkpoint_every=2, resume='auto')
    with pytest.warns(UserWarning) as caught: t.run()
    assert len(caught) == 3 and torch.equal(flat(t), flat(finished))
    assert [p.name for p in checkpoints(tmp_path/'run')] == ['step-00000002', 'step-00000004', 'step-00000006']


@pytest.mark.parametrize('other, says', [
    (dict(batch_size=5), 'batch_size is 5 here, and 4 in the checkpoint'), (dict(seed=2), 'seed is 2 here, and 1'), (dict(learning_rate=0.1), 'learning_rate'),
    (dict(lr_schedule='cosine'), 'lr_schedule'), (dict(betas=(0.9, 0.9)), 'betas'), (dict(grad_norm_clip=None), 'grad_norm_clip'),
    (dict(model=dict(block_size=9)), 'model.block_size is 9'), (dict(model=dict(resid_pdrop=0.)), 'model.resid_pdrop'),
    (dict(model=dict(vocab_size=12)), 'model.vocab_size'), (dict(data=[Rows()[0]] * 7), 'items is 7 here, and 100')])
def test_a_foreign_checkpoint_is_refused_and_changes_nothing(finished, other, says):
    t = trainer(**other)
    before, random_numbers = flat(t), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=says): t.load_checkpoint(finished.checkpoint)
    assert torch.equal(flat(t), before) and torch.equal(torch.get_rng_state(), random_numbers) and t.iter_num == 0


@pytest.mark.parametrize('other', [dict(num_workers=1), dict(log_every=2), dict(max_iters=100), dict(eval_every=3), dict(keep_last=1)])
def test_what_changes_no_number_is_free(finished, other):
    t = trainer(**other)
    t.load_checkpoint(finished.checkpoint)
    assert t.iter_num == 6 and torch.equal(flat(t), flat(finished))


@pytest.mark.parametrize('raw', [b'\x80\x02c__builtin__\nprint\n.', None])
def test_a_pickle_is_never_run(tmp_path, finished, raw):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'sprung'),)
    folder = tmp_path/'step-00000006'
    shutil.copytree(finished.checkpoint, folder)
    (folder/'optimizer.pt').write_bytes(raw or b'')
    if raw is None: torch.save(Trap(), folder/'optimizer.pt')
    sums = [f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n' for p in folder.iterdir() if p.name != 'SHA256SUMS']
    (folder/'SHA256SUMS').write_text(''.join(sums))                  # a forger would do that, too
    t = trainer()
    with pytest.raises(CheckpointError, match='optimizer.pt'): t.load_checkpoint(folder)
    assert not (tmp_path/'sprung').exists() and t.iter_num == 0


@posix
def test_a_worker_that_ends_while_the_last_checkpoint_is_saved_raises_nothing(tmp_path, monkeypatch):
    def of_torch(*_): raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated.')
    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGCHLD)
        return write_folder(*args, **kwargs)
    write_folder = mingpt_nb.checkpoints.write_folder
    monkeypatch.setattr(mingpt_nb.checkpoints, 'write_folder', slow)
    t = trainer(tmp_path)
    t.add_callback('on_batch_end', lambda t: t.iter_num == 2 and os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGCHLD, of_torch)
    try:
        with pytest.raises(SystemExit) as e: t.run()
        assert e.value.code == 143 and [p.name for p in checkpoints(tmp_path)] == ['step-00000003']
        assert signal.getsignal(signal.SIGCHLD) is of_torch
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_best_is_kept(tmp_path):
    losses = iter([3., 1., 2., 2.5, 2.6, 2.7])
    t = trainer(tmp_path, evaluate=Rows(), checkpoint_every=100, keep_last=1, eval_every=1)
    t.eval = lambda: next(losses)
    t.run()
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000002', 'step-00000006'] and find_model(tmp_path).name == 'step-00000002'


def test_divergence_names_the_last_checkpoint(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2)
    def spoil(t):
        if t.iter_num == 4: t.model.lm_head.weight.data[0, 0] = float('nan')
    t.add_callback('on_batch_end', spoil)
    with pytest.raises(TrainingDiverged, match='step 5: .*Last checkpoint: .*step-00000004'): t.run()
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000002', 'step-00000004']


def contents(folder): return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob('*')}


@pytest.mark.parametrize('made', [
    lambda f: (f/'thesis.txt').write_text('Chapter one'),           # somebody's work
    lambda f: (f/'SHA256SUMS').write_text(f'{"0" * 64}  config.json\n'),      # checksums, but not of a checkpoint
    lambda f: (f/'chapters').mkdir(), lambda f: (f/'SHA256SUMS').unlink(), lambda f: (f/'.hidden').touch()])
def test_nothing_but_a_checkpoint_is_replaced(tmp_path, made):
    folder, t = tmp_path/'results', trainer(max_iters=1)
    t.run()
    folder.mkdir()
    for _ in range(2): assert t.save_checkpoint(folder) == folder   # empty, and a checkpoint
    check(folder)
    made(folder)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match='results holds .* is no part of a checkpoint'): t.save_checkpoint(folder)
    assert contents(tmp_path) == before


def test_the_run_is_not_replaced_by_its_checkpoint(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2)
    t.run()
    before = contents(tmp_path)
    for target in tmp_path, tmp_path/'checkpoints', tmp_path/'metrics.jsonl', tmp_path/'metrics.jsonl'/'below':
        with pytest.raises(CheckpointError): t.save_checkpoint(target)
    assert contents(tmp_path) == before


class Broken(Rows):
    def __init__(self, how): self.how = how

    def __getitem__(self, i):
        if i > 60: self.how()
        return super().__getitem__(i)


def raise_error(): raise KeyError('no such file')
def die(): os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_data_error_names_item_and_worker(workers):
    with pytest.raises(DataError, match=r"train_dataset\[(6[1-9]|[789]\d)\]: KeyError: 'no such file'") as e:
        trainer(data=Broken(raise_error), num_workers=workers, max_iters=50).run()
    assert 'DataLoader worker process' in str(e.value) if workers else 'worker' not in str(e.value)
    with pytest.raises(DataError, match=r'eval_dataset\[61\]'): trainer(evaluate=Broken(raise_error)).eval()


@posix
def test_a_worker_that_dies_names_itself(tmp_path):
    t = trainer(tmp_path, data=Broken(die), num_workers=2, max_iters=50)
    with pytest.raises(RuntimeError, match=r'step \d+: a data worker died: (DataLoader worker \(pid|ConnectionR|EOFE).*\. If .*num_workers, now 2.*Last checkpoint: None'): t.run()


def test_quiet_is_quiet(capfd, tmp_path):
    trainer(tmp_path, checkpoint_every=2, evaluate=Rows(), eval_every=2).run()
    assert capfd.readouterr() == ('', '')
