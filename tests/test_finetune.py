"""Chapter 11 against PEFT and transformers, and runs that are cut off."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mingpt_nb import checks, finetune, weights
from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.finetune import (
    LoRALinear,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    without_lora,
)
from mingpt_nb.llama import Llama, load
from mingpt_nb.model import GPT
from mingpt_nb.runs import OtherRun
from mingpt_nb.scaling import Trainer
from mingpt_nb.speed import fast
from mingpt_nb.utils import CfgNode, ConfigError, cli, set_seed

# of peft's own reading of transformers
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')

IDS = torch.arange(24).view(2, 12)


def gpt():
    set_seed(1)
    return GPT(
        CfgNode(model_type='gpt-nano', vocab_size=40, block_size=16, tie_weights=True)
    ).eval()


def llama(kind='llama'):
    set_seed(1)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=40, block_size=16)
    return Llama(CfgNode(model_type=kind, tie_weights=True, **sizes)).eval()


MODELS = dict(gpt=gpt, llama=llama, qwen2=lambda: llama('qwen2'))


def learnt_something(model):
    "As if LoRA had learnt."
    torch.manual_seed(2)
    for m in weights.adapters(model).values():
        nn.init.normal_(m.lora_B, std=0.3)
    return model


@pytest.fixture(params=[*MODELS])
def make(request):
    return MODELS[request.param]


@torch.no_grad()
def test_the_first_output_is_the_old_one_and_merging_changes_no_logit(make):
    base, model = make(), add_lora(make(), r=4, alpha=8)
    assert torch.equal(base(IDS)[0], model(IDS)[0])
    learnt_something(model)
    now = model(IDS)[0]
    assert (now - base(IDS)[0]).abs().max() > 0.05
    with without_lora(model):
        assert torch.equal(model(IDS)[0], base(IDS)[0])
    merged = merge_lora(copy.deepcopy(model))
    assert (merged(IDS)[0] - now).abs().max() < 1e-5
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert all(type(m) is not LoRALinear for m in merged.modules())


@torch.no_grad()
def test_what_is_written_is_the_merged_model(make, tmp_path):
    import transformers

    model = learnt_something(add_lora(make()))
    want = model(IDS)[0]
    model.save_pretrained(tmp_path)
    assert (make().from_pretrained(tmp_path)(IDS)[0] - want).abs().max() < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (theirs(IDS).logits - want).abs().max() < 1e-4
    assert (model.to_hf()(IDS).logits - want).abs().max() < 1e-4
    assert weights.is_adapted(model)  # as it was
    for m in copy.deepcopy(model), fast(model, tune=False):
        assert torch.equal(m.generate(IDS, 6), model.generate(IDS, 6))


@torch.no_grad()
@pytest.mark.parametrize('targets', [None, 'ends', 'whole'])
def test_peft_loads_ours(make, targets, tmp_path):
    peft = pytest.importorskip('peft')
    base, model = make(), make()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = dict(ends=[linear[1].rpartition('.')[2]], whole=linear[2:4]).get(targets)
    learnt_something(add_lora(model, r=3, alpha=5, targets=names))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base.to_hf(), tmp_path).eval()
    assert (theirs(IDS).logits - model(IDS)[0]).abs().max() < 1e-4
    adapted = [n for n, m in theirs.named_modules() if n.endswith('.lora_A')]
    assert len(adapted) == len(weights.adapters(model))


@torch.no_grad()
@pytest.mark.parametrize('how', [{}, dict(use_rslora=True), dict(layers_to_transform=[1])])
def test_we_load_what_peft_writes(make, how, tmp_path):
    peft = pytest.importorskip('peft')
    base = make()
    names = ['c_attn', 'c_fc'] if type(base) is GPT else ['q_proj', 'down_proj']
    is_gpt = dict(fan_in_fan_out=type(base) is GPT)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=names, **is_gpt, **how)
    theirs = peft.get_peft_model(base.to_hf(), config).eval()
    torch.manual_seed(3)
    for n, p in theirs.named_parameters():
        if 'lora_B' in n:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(), tmp_path)
    assert (theirs(IDS).logits - ours(IDS)[0]).abs().max() < 1e-4
    assert (ours(IDS)[0] - base(IDS)[0]).abs().max() > 0.01
    save_adapter(ours, tmp_path / 'again')
    again = load_adapter(make(), tmp_path / 'again')
    assert (again(IDS)[0] - ours(IDS)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    'how, says',
    [
        (dict(use_dora=True), 'use_dora=True'),
        (dict(bias='all'), "bias='all'"),
        (dict(modules_to_save=['norm']), 'modules_to_save'),
    ],
)
def test_more_than_lora_is_refused(how, says, tmp_path):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, target_modules=['q_proj'], **how)
    peft.get_peft_model(llama().to_hf(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'adapter_config.json: {says}'.replace('[', r'\[')):
        load_adapter(llama(), tmp_path)


def data():
    x = torch.arange(200).view(-1, 10) * 7 % 40
    return [(row[:-1], row[1:]) for row in x]


def new_trainer(make, lora=True, **config):
    model = make()
    if lora:
        set_seed(5)
        add_lora(model, r=2, alpha=4)
    c = Trainer.get_default_config()
    c.merge_from_dict(dict(device='cpu', batch_size=4, max_iters=8, learning_rate=1e-2, seed=7))
    c.merge_from_dict(dict(progress=False, dtype='float32') | config)
    return Trainer(c, model, data())


def test_only_the_adapter_learns(make):
    trainer, base = new_trainer(make), make()
    trainer.run()
    given = [p for g in trainer.optimizer.param_groups for p in g['params']]
    assert len(given) == 2 * len(weights.adapters(trainer.model)) == len(trainer.optimizer.state)
    then, now = dict(base.named_parameters()), dict(trainer.model.named_parameters())
    assert all(torch.equal(then[n], now[n]) for n in then)
    assert all(p.abs().sum() > 0 for n, p in now.items() if 'lora_' in n)
    assert trainer.history[-1]['loss'] < trainer.history[0]['loss']


def test_a_run_that_is_cut_off_ends_with_the_same_bits(make, tmp_path):
    whole = new_trainer(make)
    whole.run()
    kept = dict(work_dir=tmp_path, checkpoint_every=3, lr_schedule='constant')
    first = new_trainer(make, **kept)
    first.add_callback('on_step_end', lambda t: setattr(t, 'stop', min(t.stop, 5)))
    first.run()
    folder = first.checkpoint
    assert sum(f.stat().st_size for f in folder.iterdir()) < 200_000
    assert all('.lora_' in n for n, _ in weights.read_tensors(folder / 'model.safetensors'))
    again = new_trainer(make, **kept, resume='auto')
    again.run()
    assert again.iter_num == 8
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_base_or_another_scale_is_another_run(tmp_path):
    first = new_trainer(gpt, work_dir=tmp_path, checkpoint_every=8)
    first.run()
    other = new_trainer(gpt, work_dir=tmp_path, resume='auto')
    other.model.transformer.wte.weight.data[3, 3] += 1
    with pytest.raises(OtherRun, match='base is'):
        other.run()
    other = new_trainer(gpt, work_dir=tmp_path, resume='auto')
    for m in weights.adapters(other.model).values():
        m.scale = 7
    with pytest.raises(OtherRun, match='beside is'):
        other.run()
    with pytest.raises(OtherRun, match='beside is|base is'):
        new_trainer(gpt, lora=False, work_dir=tmp_path, resume='auto').run()


def test_a_model_with_lora_is_not_cut_in_slices():
    with pytest.raises(ConfigError, match="parallel='fsdp' takes no model with LoRA"):
        new_trainer(gpt, parallel='fsdp')


def test_in_bfloat16_the_adapter_stays_in_float32():
    trainer = new_trainer(llama, dtype='bfloat16')
    trainer.run()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    half = add_lora(llama().bfloat16(), r=2, alpha=4)
    assert {p.dtype for n, p in half.named_parameters() if 'lora_' in n} == {torch.float32}
    assert half(IDS)[0].dtype == torch.bfloat16
    assert half.generate(IDS, 3).shape == (2, 15)


def test_an_adapter_says_what_is_wrong_with_it(tmp_path):
    model = learnt_something(add_lora(gpt()))
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match='is for another model: this one has no layer transformer'):
        load_adapter(llama(), tmp_path)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config | dict(r=4)))
    with pytest.raises(ValueError, match='and adapter_config.json has r=4'):
        load_adapter(gpt(), tmp_path)
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
    raw = (tmp_path / 'adapter_model.safetensors').read_bytes()
    (tmp_path / 'adapter_model.safetensors').write_bytes(raw[:-5])
    with pytest.raises(ValueError, match='is damaged or incomplete'):
        load_adapter(gpt(), tmp_path)


BARD = Path(__file__).parents[1] / 'nbs/playground/chargpt'
TEXT = 'to be or not to be that is the question\n' * 60


def command(tmp_path, *args, text=TEXT, model=BARD, **more):
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    how = [f'--model={model}', f'--system.work_dir={tmp_path / "out"}', '--data.block_size=16']
    how += ['--trainer.device=cpu', '--trainer.progress=false', '--trainer.batch_size=4']
    how += ['--trainer.max_iters=12', '--trainer.eval_every=4', '--sample.length=5']
    return finetune.main([str(tmp_path / 'my.txt'), *how, *args])


def losses(trainer):
    before = next(r['before'] for r in trainer.history if 'before' in r)
    return before, min(r['eval_loss'] for r in trainer.history if 'eval_loss' in r)


WAYS = [[], ['--lora.r=0'], ['--replay=0.25'], ['--lora.targets=c_attn,c_fc']]
WAYS.append(['--system.recompute=true', '--trainer.dtype=bfloat16'])


@pytest.mark.parametrize('how', WAYS, ids=str)
def test_the_command_teaches_a_text(how, tmp_path, capsys):
    trainer = command(tmp_path, '--trainer.learning_rate=3e-3', *how)
    before, best = losses(trainer)
    assert best < before - 0.3
    said = capsys.readouterr().out
    assert 'nats per token' in said and 'bits per byte' in said and 'after 12 steps' in said
    model, tokenizer = load(tmp_path / 'out/model', 'cpu')
    held = trainer.eval_dataset
    c = Trainer.get_default_config()
    c.merge_from_dict(dict(device='cpu', dtype=trainer.config.dtype, batch_size=4, eval_batches=8))
    assert Trainer(c, model, held).eval(held) == pytest.approx(best, abs=0.02)
    assert (tmp_path / 'out/adapter').exists() == ('--lora.r=0' not in how)
    assert load(tmp_path / 'out', 'cpu')[0].lm_head.weight.equal(model.lm_head.weight)


def test_the_command_teaches_a_llama_and_transformers_opens_it(tmp_path):
    import transformers

    tokenizer = CharTokenizer.from_text(TEXT)
    sizes = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, block_size=32)
    set_seed(1)
    Llama(CfgNode(**sizes)).save_pretrained(tmp_path / 'base', tokenizer)
    trainer = command(tmp_path, '--trainer.learning_rate=3e-2', model=tmp_path / 'base')
    before, best = losses(trainer)
    assert best < before - 0.1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out/model')
    x = torch.arange(10)[None]
    ours = load(tmp_path / 'out/model', 'cpu')[0]
    with torch.no_grad():
        assert (theirs(x).logits - ours(x)[0]).abs().max() < 1e-4
    peft = pytest.importorskip('peft')
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    peft.PeftModel.from_pretrained(base, tmp_path / 'out/adapter')


@pytest.mark.parametrize('lora', [8, 0])
def test_a_killed_finetuning_goes_on_to_the_same_bits(lora, tmp_path):
    "The process is killed after a checkpoint, in the middle of a step."
    kept = ['--trainer.checkpoint_every=5', f'--lora.r={lora}', '--replay=0.2']
    (tmp_path / 'whole').mkdir()
    whole = command(tmp_path / 'whole', *kept)
    program = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mingpt_nb import finetune
import test_finetune
def step(self, x, y, step=finetune.Tuner.step):
    if self.iter_num == 7:
        os.kill(os.getpid(), 9)
    step(self, x, y)
finetune.Tuner.step = step
test_finetune.command(Path({str(tmp_path)!r}), *{kept!r})
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    trainer = command(tmp_path, *kept, '--trainer.resume=auto')
    assert trainer.iter_num == 12 and [r for r in trainer.history if 'before' in r]
    theirs = whole.model.state_dict()
    for name, t in trainer.model.state_dict().items():
        assert torch.equal(t, theirs[name]), name
    a, b = (
        dict(weights.read_tensors(p / 'out/model/model.safetensors'))
        for p in (tmp_path, tmp_path / 'whole')
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_checkpoint_of_lora_holds_only_what_learns(tmp_path):
    command(tmp_path, '--trainer.checkpoint_every=12', '--lora.r=2')
    folder = weights.checkpoints(tmp_path / 'out')[-1]
    size = (folder / 'model.safetensors').stat().st_size
    assert size < (BARD / 'model.safetensors').stat().st_size / 20
    with pytest.raises(ValueError):
        load(folder, 'cpu')


@pytest.mark.parametrize(
    'text, args, says',
    [
        ('', [], 'my.txt is empty'),
        (
            'to be',
            [],
            'has 5 tokens, too few for data.block_size=16: a tenth is held out, so it takes 19',
        ),
        (TEXT, ['--data.block_size=65'], 'data.block_size=65 is more than the 64 of the model'),
        (
            TEXT,
            ['--lora.targets=q_proj'],
            "is called 'q_proj'; there are: c_attn, c_fc, c_proj, lm_head",
        ),
        (TEXT, ['--lora.r=-1'], 'r must be'),
        (TEXT, ['--lora.alpha=-1'], 'alpha must be'),
        (TEXT, ['--replay=1'], 'share must be from 0 to below 1, got 1'),
        (TEXT, ['--replay=-0.5'], 'share must be'),
        (TEXT, ['--sample.temperature=-1'], 'temperature'),
        (TEXT, ['--lora.rank=4'], 'rank'),
        (TEXT, ['other.txt'], "'other.txt' is a second one"),
        (TEXT, ['--model=nowhere/at/all'], 'no folder'),
        ('ééé' * 99, [], "'é'"),
    ],
)
def test_bad_input_is_one_line(text, args, says, tmp_path):
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    how = [f'--model={BARD}', f'--system.work_dir={tmp_path / "out"}', '--data.block_size=16']
    with pytest.raises(SystemExit) as e:
        cli(['finetune', str(tmp_path / 'my.txt'), *how, '--trainer.progress=false', *args])
    assert says in e.value.code and '\n' not in e.value.code, e.value.code
    assert e.value.code.startswith('mingpt-nb finetune: ')


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / 'latin.txt').write_bytes('für'.encode('latin1') * 99)
    for words, says in (
        ([], 'which text? as in: mingpt-nb finetune my.txt'),
        ([tmp_path / 'latin.txt'], 'is not UTF-8: byte 0xfc at offset 1'),
        ([tmp_path / 'gone.txt'], 'No such file'),
        ([tmp_path], 'Is a directory'),
    ):
        with pytest.raises(SystemExit, match='mingpt-nb finetune: ') as e:
            how = [f'--model={BARD}', f'--system.work_dir={tmp_path / "out"}']
            cli(['finetune', *map(str, words), *how])
        assert says in e.value.code and '\n' not in e.value.code, e.value.code


def test_without_weights_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, 'smollm2', lambda: None)
    with pytest.raises(ConfigError, match='`mingpt-nb weights` fetches a small one'):
        finetune.main([str(tmp_path), f'--system.work_dir={tmp_path / "out"}'])


def test_nan_stops_the_run_before_the_weights_are_spoilt(tmp_path):
    with pytest.raises(checks.TrainingDiverged, match='learning rate'):
        command(
            tmp_path,
            '--trainer.learning_rate=1e30',
            '--trainer.grad_norm_clip=None',
            '--trainer.warmup_iters=0',
        )


def test_no_step_leaves_nothing(tmp_path, capsys):
    command(tmp_path, '--trainer.max_iters=0')
    assert capsys.readouterr().out.endswith('no step was taken, so nothing is kept\n')
    assert not (tmp_path / 'out/model/model.safetensors').exists()


def test_a_finished_run_that_is_resumed_trains_nothing_more(tmp_path):
    command(tmp_path, '--trainer.checkpoint_every=4')
    first = (tmp_path / 'out/model/model.safetensors').read_bytes()
    trainer = command(tmp_path, '--trainer.checkpoint_every=4', '--trainer.resume=auto')
    assert trainer.iter_num == 12
    assert (tmp_path / 'out/model/model.safetensors').read_bytes() == first
