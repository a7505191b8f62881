"""Training across processes: the same batches everywhere, and files that are whole or not there."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import torch

from mingpt_nb.model import GPT
from mingpt_nb.trainer import Trainer, batch_indices, load_model, save_model
from mingpt_nb.utils import set_seed


def in_another_process(code, **env):
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_batches_are_the_same_in_every_process():
    code = 'import json; from mingpt_nb.trainer import batch_indices; print(json.dumps([batch_indices(7, s, 10**12, 8) for s in (0, 1, 99)]))'
    want = [batch_indices(7, s, 10**12, 8) for s in (0, 1, 99)]
    for seed in '0', '1':
        assert in_another_process(code, PYTHONHASHSEED=seed) == want


class Squares:
    "Items made one by one, in the worker."
    def __len__(self): return 50

    def __getitem__(self, i):
        seq = torch.arange(i, i + 7) ** 2 % 11
        return seq[:-1], seq[1:]


def weights_hash(workers, device='cpu'):
    set_seed(1)
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=11, block_size=6))
    t = Trainer.get_default_config()
    t.merge_from_dict(dict(device=device, max_iters=8, batch_size=6, num_workers=workers, learning_rate=1e-3))
    trainer = Trainer(t, GPT(c), Squares())
    trainer.run()
    return hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()


def test_workers_change_nothing():
    assert weights_hash(0) == weights_hash(2)       # bit for bit, with dropout


def test_a_kill_while_saving_leaves_a_whole_model(tmp_path):
    code = f'''
from mingpt_nb.model import GPT
from mingpt_nb.trainer import save_model
c = GPT.get_default_config(); c.merge_from_dict(dict(model_type='gpt-mini', vocab_size=500, block_size=64))
model = GPT(c)
while True: save_model(model, {str(tmp_path)!r}); print('saved', flush=True)
'''
    for delay in (0., 0.01, 0.03):
        process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'saved\n'
        time.sleep(delay)
        process.send_signal(signal.SIGKILL if hasattr(signal, 'SIGKILL') else signal.SIGTERM)
        process.wait()
        process.stdout.close()
        model, tokenizer = load_model(tmp_path)
        assert model.config.vocab_size == 500 and tokenizer is None
    save_model(model, tmp_path)
