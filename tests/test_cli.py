"""Odd command lines, most of them in this process: each ends with one line and status 1, or runs.
And terminals that show little, or go away."""

import contextlib
import io
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import processes
import pytest

from mingpt_nb import adder, chargpt
from mingpt_nb.bpe import CharTokenizer
from mingpt_nb.gpt2 import load
from mingpt_nb.model import GPT
from mingpt_nb.utils import ConfigError, cli
from mingpt_nb.weights import checkpoints, find_model

ROOT = Path(__file__).parent.parent
TEXT = 'It was the best of times, it was the worst of times. Ça alors! ' * 40
SHORT = [
    '--trainer.max_iters=2',
    '--trainer.batch_size=4',
    '--trainer.device=cpu',
    '--trainer.eval_batches=1',
    '--system.threads=1',
    '--system.work_dir=out',
]
ADDER = ['adder', '--data.ndigit=1', *SHORT]
CHARGPT = [
    'chargpt',
    '--model.model_type=gpt-nano',
    '--data.block_size=16',
    '--trainer.eval_every=1',
    '--sample.length=20',
    *SHORT,
]
GENERATE = ['generate', '--model=model', '--device=cpu', '--max_new_tokens=5', 'to be']


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, with a home, a text and a model; no pictures, which take a
    second each."""
    monkeypatch.chdir(tmp_path)
    for name in 'HOME', 'USERPROFILE':
        monkeypatch.setenv(name, str(tmp_path / 'home'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')

    def no_plot(*args, **kw):
        raise ImportError('no pictures in this test')

    monkeypatch.setattr('mingpt_nb.trainer.Trainer.plot', no_plot)
    (tmp_path / 'home').mkdir()
    (tmp_path / 't.txt').write_text(TEXT, encoding='utf-8')
    return tmp_path


def small_model(folder):
    tokenizer = CharTokenizer.from_text('to be, or not ☃')
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=tokenizer.vocab_size, block_size=8))
    GPT(c).save_pretrained(folder, tokenizer)


def refused(args, says):
    "The command ends with one line that says this."
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(io.StringIO()):
        cli(args)
    assert isinstance(e.value.code, str), e.value.code  # Python prints it and ends with 1
    assert e.value.code.startswith(f'mingpt-nb {args[0]}: ') and '\n' not in e.value.code
    assert says in e.value.code


NOT_NONE = {
    'adder': 'system.seed system.work_dir data.ndigit model.embd_pdrop model.resid_pdrop '
    'model.attn_pdrop model.tie_weights model.activation model.layer_norm_epsilon trainer.device '
    'trainer.num_workers trainer.learning_rate trainer.betas trainer.weight_decay '
    'trainer.lr_schedule trainer.warmup_iters trainer.min_lr trainer.log_every '
    'trainer.check_alignment trainer.keep_last trainer.keep_best trainer.dtype '
    'trainer.accumulate trainer.compile trainer.parallel',
    'chargpt': 'system.seed system.work_dir system.muon text.map_above data.block_size '
    'sample.prompt sample.length sample.temperature trainer.batch_size',
    'generate': 'model prompt num_samples max_new_tokens temperature device',
    'chat': 'temperature max_new_tokens device',
    'finetune': 'system.recompute data.block_size lora.r lora.alpha replay sample.prompt '
    'sample.length',
}


@pytest.mark.parametrize(
    'command, name',
    [(command, name) for command, names in NOT_NONE.items() for name in names.split()],
)
def test_none_where_it_cannot_be(command, name, here):
    refused([command, f'--{name}=None'], f'--{name}: it must not be None')
    assert sorted(p.name for p in here.iterdir()) == ['home', 't.txt']


MAY_BE_NONE = {
    'adder': 'system.threads model.model_type model.n_layer model.n_head model.n_embd '
    'model.vocab_size model.block_size model.n_inner trainer.max_iters trainer.batch_size '
    'trainer.grad_norm_clip trainer.seed trainer.eval_every trainer.eval_batches '
    'trainer.progress trainer.work_dir '
    'trainer.checkpoint_every trainer.resume',
    'chargpt': 'system.threads text.file sample.top_k sample.top_p trainer.eval_every',
    'generate': 'top_k top_p seed bits',
    'chat': 'model adder system top_k top_p context seed bits',
    'finetune': 'text.file lora.targets sample.top_p trainer.learning_rate',
}


def test_none_where_it_can_be():
    from mingpt_nb import chat, finetune, speed

    for command, names in MAY_BE_NONE.items():
        modules = dict(adder=adder, chargpt=chargpt, generate=speed, finetune=finetune, chat=chat)
        config = modules[command].get_config()
        config.merge_from_args([f'--{name}=None' for name in names.split()])


@pytest.mark.parametrize(
    'args, says',
    [
        (['--trainer.max_iters=2.5'], "expected int or None, got '2.5'"),
        (['--trainer.eval_batches=2.5'], 'expected int or None'),
        (['--trainer.progress=maybe'], 'expected true or false'),
        (['--system.threads=2.5'], 'expected int or None'),
        (['--model.n_layer=two'], 'expected int or None'),
        (['--system.seed=-1'], 'seed must be an integer from 0'),
        (['--system.seed=1e10'], 'seed must be an integer from 0'),
        (['--data.ndigit=1000000'], 'ndigit must be 1000 or less'),
        (['--data.ndigit=1e30'], 'ndigit must be 1000 or less'),
        (['--model.vocab_size=-5'], 'vocab_size follows from the data: it is 10, not -5'),
        (['--model.vocab_size=7'], 'vocab_size follows from the data'),
        (['--model.block_size=0'], 'block_size follows from the data: it is 3, not 0'),
        (['--system.work_dir=t.txt'], "cannot write into work_dir='t.txt': File exists"),
        (['--system.work_dir=t.txt/x'], "cannot write into work_dir='t.txt/x'"),
        (['--trainer.work_dir=t.txt'], "cannot write into trainer.work_dir='t.txt'"),
        (['--system.work_dir='], 'is a variable not set?'),
        (['--trainer.work_dir', ''], 'is a variable not set?'),
        (['--trainer.resume='], 'is a variable not set?'),
        ([''], "expected --name=value, got ''"),
        pytest.param(
            ['--system.work_dir=/dev/null'],
            "cannot write into work_dir='/dev/null'",
            marks=pytest.mark.skipif(os.name == 'nt', reason='no /dev'),
        ),
        pytest.param(
            ['--trainer.work_dir=/dev/null'],
            "cannot write into trainer.work_dir='/dev/null'",
            marks=pytest.mark.skipif(os.name == 'nt', reason='no /dev'),
        ),
    ],
)
def test_the_adder_refuses(args, says, here):
    refused([*ADDER, *args], says)


@pytest.mark.parametrize(
    'args, says',
    [
        (['t.txt', '--sample.top_k=2.5'], 'expected int or None'),
        (['t.txt', '--sample.top_p=high'], 'expected float or None'),
        (['t.txt', '--sample.length=2.5'], 'expected int'),
        (['t.txt', '--sample.temperature=-1'], 'temperature must be 0'),
        ([''], 'is a variable not set?'),
        (['--text.file='], 'is a variable not set?'),
        (['t.txt', 't.txt'], "'t.txt' is a second one"),
        (['t.txt', '--text.file=u.txt'], "'u.txt' is a second one"),
        (['t.txt', '--model.vocab_size=7'], 'vocab_size follows from the data'),
        (['~/none.txt'], 'none.txt: No such file'),
        (['t.txt', '--system.muon', 'u.txt'], "'u.txt' is a second one"),
        (['home'], 'home'),
        pytest.param(
            ['/dev/zero'],
            '/dev/zero is a device',
            marks=pytest.mark.skipif(not Path('/dev/zero').exists(), reason='no such device'),
        ),
        pytest.param(
            ['/dev/null'],
            '/dev/null is a device',
            marks=pytest.mark.skipif(not Path('/dev/null').exists(), reason='no such device'),
        ),
    ],
)
def test_chargpt_refuses(args, says, here):
    refused([*CHARGPT, *args], says)
    assert not (here / 'out' / 'model').exists()


@pytest.mark.parametrize(
    'args, says',
    [
        (['--model='], 'is a variable not set?'),
        (['--model=~/none'], 'no folder'),
        (['--model=~nobody at all/none'], 'no folder'),
        (['--top_k=2.5'], 'expected int or None'),
        (['--seed=1.5'], 'expected int or None'),
        (['--seed=99999999999999999999'], 'seed must be an integer below'),
        (['--num_samples=0'], 'num_samples must be 1'),
    ],
)
def test_generate_refuses(args, says, here):
    refused([*GENERATE, *args], says)


def test_what_would_stop_the_run_at_its_end_is_found_before_it(here, monkeypatch):
    def train(trainer):
        raise AssertionError('it has started')

    monkeypatch.setattr('mingpt_nb.trainer.Trainer.run', train)
    (here / 'out').mkdir()
    (here / 'out' / 'model').write_text('a file')
    for args in ADDER, [*CHARGPT, 't.txt']:
        refused(args, f'{Path("out", "model")} is in the way')
    (here / 'out' / 'model').unlink()
    (here / 'out' / 'training.png').mkdir()
    refused(ADDER, f'{Path("out", "training.png")} is in the way')


@pytest.mark.parametrize(
    'args',
    [
        ['t.txt'],
        ['--sample.top_k', '5', 't.txt'],
        ['--system.muon', 't.txt'],
        ['--trainer.check_alignment', 'no', '--', 't.txt'],
        ['~/mine.txt'],
        ['--text.file=~/mine.txt'],
    ],
)
def test_the_text_may_stand_anywhere(args, here, capsys):
    (here / 't.txt').rename(here / 'home' / 'mine.txt') if '~' in args[0] else None
    trainer = chargpt.main([*CHARGPT[1:], *args])
    assert len(trainer.train_dataset.data) == len(TEXT) * 9 // 10 and load('out/model')[
        1
    ].chars == sorted(set(TEXT))


def test_home(here, capsys):
    cli(
        [
            *ADDER,
            '--system.work_dir=~/run',
            '--trainer.work_dir',
            '~/more',
            '--trainer.checkpoint_every=1',
        ]
    )
    assert (
        (here / 'home' / 'run' / 'model' / 'config.json').exists()
        and (here / 'home' / 'more' / 'checkpoints').exists()
        and not (here / '~').exists()
    )
    assert f'model: {here / "home" / "run" / "model"}' in capsys.readouterr().out
    small_model(here / 'home' / 'model')
    cli(['generate', '--model=~/model', '--max_new_tokens=3', 'to be'])
    assert capsys.readouterr().out.startswith('to be')


def test_home_in_a_program(here):
    "What reads and writes a path knows where ~ is."
    from mingpt_nb.bpe import load_tokenizer
    from mingpt_nb.data import TokenDataset, TokenFile, write_tokens

    small_model('~/model')
    model, tokenizer = load('~/model')
    assert load_tokenizer('~/model').chars == tokenizer.chars
    model.save_pretrained('~/theirs', tokenizer)
    assert GPT.from_pretrained('~/theirs').config.vocab_size == tokenizer.vocab_size
    write_tokens('~/t.bin', Path('~/model/vocab.json'), CharTokenizer(map(chr, range(10000))))
    assert len(TokenFile('~/t.bin')) == len(TokenDataset('~/t.bin', 4)) + 4
    c = adder.get_config()
    c.trainer.work_dir, c.system.work_dir = '~/a', Path('~/b')
    assert (c.trainer.work_dir, c.system.work_dir) == (
        str(here / 'home' / 'a'),
        here / 'home' / 'b',
    )
    assert not (here / '~').exists() and sorted(p.name for p in (here / 'home').iterdir()) == [
        'model',
        't.bin',
        'theirs',
    ]


def test_any_folder_of_a_run_writes(here, capsys):
    "The work folder of chargpt, its checkpoints, its model."
    cli([*CHARGPT, 't.txt', '--trainer.checkpoint_every=1', '--trainer.work_dir=out'])
    newest = checkpoints("out")[-1]
    for folder in 'out', newest, Path('out', 'model'):
        capsys.readouterr()
        cli(['generate', f'--model={folder}', '--max_new_tokens=3', 'to be'])
        assert capsys.readouterr().out.startswith('to be')
    for folder, says in ('', 'is a variable not set?'), ('~/none', 'no folder'):
        refused(['generate', f'--model={folder}', 'x'], says)


def test_checkpoints_at_home(here, capsys):
    cli([*ADDER, '--trainer.checkpoint_every=1', '--trainer.work_dir=~/run'])
    config = adder.get_config()
    config.merge_from_args([*ADDER[1:], '--trainer.work_dir=~/again'])
    trainer = adder.build(config)
    trainer.load_checkpoint('~/run/checkpoints/step-00000001')
    assert (
        trainer.save_checkpoint('~/copy') == here / 'home' / 'copy'
        and find_model('~/run')
        and (here / 'home' / 'copy' / 'SHA256SUMS').exists()
    )
    for wrong in 5, ['a']:
        with pytest.raises(ConfigError, match='expected the path of a file or a folder'):
            trainer.config.work_dir = wrong
    trainer.config.work_dir = 't.txt'
    with pytest.raises(ConfigError, match="cannot write into work_dir='t.txt'"):
        trainer.run()
    assert not (here / '~').exists()


def test_a_value_that_the_data_give_too(here, capsys):
    cli([*ADDER, '--model.vocab_size=10', '--model.block_size=3'])
    assert 'model: out' in capsys.readouterr().out


# ---- terminals -----------------------------------------------------------------------------------

SHOWS = 'Ça va? Привет ☃ 中 ' * 60


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'latin-1'])
def test_a_terminal_that_is_not_utf8(encoding, here, monkeypatch):
    (here / 't.txt').write_text(SHOWS, encoding='utf-8')
    small_model(here / 'model')
    for args in [*CHARGPT, 't.txt', '--sample.prompt=Привет ☃'], [*GENERATE, '☃']:
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr('sys.stdout', out)
        cli(args)
        said = out.buffer.getvalue().decode(encoding)
        assert ('?????? ?' if args[0] == 'chargpt' else 'to be ?') in said
    assert load('out/model')[1].chars == sorted(set(SHOWS))


@pytest.fixture
def gone():
    "An output whose reader has gone away."
    read, write = os.pipe()
    os.close(read)
    with open(write, 'w', encoding='utf-8') as f:
        yield f


def test_a_reader_that_goes_away(here, gone, monkeypatch):
    small_model(here / 'model')
    monkeypatch.setattr('sys.stdout', gone)
    monkeypatch.setattr('sys.stderr', gone)
    cli([*CHARGPT, 't.txt', '--trainer.progress=true'])
    assert load(here / 'out' / 'model')[1].chars == sorted(set(TEXT))


def test_a_writer_ends_when_nobody_reads(here, gone, monkeypatch):
    small_model(here / 'model')
    monkeypatch.setattr('sys.stdout', gone)
    with pytest.raises(SystemExit) as e:
        cli([*GENERATE, '--max_new_tokens=300000'])
    assert e.value.code == 141


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no such device')
def test_an_output_that_is_full(here, monkeypatch, caplog):
    small_model(here / 'model')
    for args in [*CHARGPT, 't.txt'], GENERATE:
        with open('/dev/full', 'w') as full:
            monkeypatch.setattr('sys.stdout', full)
            with (
                pytest.raises(SystemExit, match='mingpt-nb generate: .*No space left on device')
                if args is GENERATE
                else contextlib.nullcontext()
            ):
                cli(args)
    assert 'cannot write to the standard output: [Errno 28] No space left on device' in caplog.text
    assert (here / 'out' / 'model' / 'config.json').exists()


@pytest.mark.skipif(not Path('/dev/fd').exists(), reason='no such folder')
def test_a_text_from_a_pipe(here, capsys):
    read, write = os.pipe()  # as <(cat t.txt t.txt) makes it

    def pour():
        with open(write, 'w', encoding='utf-8') as f:
            f.write(TEXT * 2)

    writer = threading.Thread(target=pour)
    writer.start()
    trainer = chargpt.main([*CHARGPT[1:], f'/dev/fd/{read}'])
    os.close(read)
    writer.join()
    assert len(trainer.train_dataset.data) == len(TEXT) * 2 * 9 // 10 and load('out/model')[
        1
    ].chars == sorted(set(TEXT))


@pytest.mark.skipif(os.name == 'nt', reason='pipes and locales of POSIX')
def test_in_a_process_of_its_own(here):
    """Nobody reads, the locale knows no letters, the name of the text is not UTF-8: the run ends
    well, and says nothing at Python's end."""
    name = os.fsencode(here) + b'/caf\xe9.txt'
    with open(name, 'wb') as f:
        f.write(SHOWS.encode())
    env = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        'MPLBACKEND': 'agg',
        'LC_ALL': 'C',
        'PYTHONUTF8': '0',
        'PYTHONCOERCECLOCALE': '0',
    }
    job = subprocess.Popen(
        [sys.executable, '-m', 'mingpt_nb.chargpt', *CHARGPT[1:], '--trainer.progress=true', name],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    job.stdout.read(1)
    job.stdout.close()
    assert job.wait(300) == 0
    assert (
        'caf\\udce9.txt' in (here / 'out' / 'args.txt').read_text(encoding='utf-8')
        and (here / 'out' / 'training.png').exists()
    )
    small_model(here / 'model')
    job = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'from mingpt_nb.utils import cli; cli()',
            *GENERATE,
            '--max_new_tokens=300000',
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    job.stdout.read(1)
    job.stdout.close()
    assert (job.communicate(timeout=300)[1], job.returncode) == (b'', 141)


def test_utf16_without_a_mark_gets_a_warning(here, capsys):
    (here / 't.txt').write_bytes((TEXT.replace('Ç', 'C') * 2).encode('utf-16-le'))
    with pytest.warns(
        UserWarning,
        match='50% of the characters in t.txt are NUL.* iconv -f utf-16le -t utf-8 t.txt',
    ):
        chargpt.main([*CHARGPT[1:], 't.txt'])


# ---- warnings ------------------------------------------------------------------------------------

OF_OTHERS = [
    'Guards may run slower on Python 3.13.0. Consider upgrading to Python 3.13.1+.',
    'Skipping overload body check due to a known CPython 3.13.8 bug (https://github.com/python/cpython/issues/139783).',
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).",
    "Can't initialize NVML",
]


@pytest.mark.parametrize('text', OF_OTHERS)
def test_what_other_libraries_say_of_this_machine_is_no_failure(text):
    with warnings.catch_warnings(record=True) as said:
        for kind in RuntimeWarning, UserWarning:
            warnings.warn(text, kind, stacklevel=1)
    assert [str(w.message) for w in said] == [text] * 2
    with pytest.raises(UserWarning):
        warnings.warn('a warning of ours', stacklevel=1)


def test_nor_is_it_in_a_process_of_its_own():
    code = f'import warnings\nfor text in {OF_OTHERS!r}: warnings.warn(text, RuntimeWarning)'
    assert all(text in processes.run('-c', code, plain=True)[1] for text in OF_OTHERS)
    processes.run('-c', 'import warnings; warnings.warn("a warning of ours")', plain=True, code=1)


def test_chapters_and_tests_have_the_same_filters_of_warnings():
    for name in 'Makefile', '.github/workflows/test.yaml':
        assert ','.join(processes.STRICT) in (ROOT / name).read_text(encoding='utf-8')
