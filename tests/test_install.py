"""What a user gets from pip: every module imports with the runtime dependencies alone, and the
vocabulary is there."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import PYTHON

ROOT = Path(__file__).parents[1]

PROBE = '''
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    "Makes optional packages look as if they were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'transformers', 'matplotlib', 'nbdev', 'fastcore', 'execnb',
                                  'IPython', 'tiktoken', 'tokenizers'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
import mingpt_nb
assert mingpt_nb.__file__.startswith(sys.argv[1]), mingpt_nb.__file__
for m in pkgutil.iter_modules(mingpt_nb.__path__): importlib.import_module(f'mingpt_nb.{m.name}')
from mingpt_nb.bpe import get_encoder
assert get_encoder().encode('Hello world') == [15496, 995]
from mingpt_nb.book import subplots
try: subplots()
except ImportError as e: assert "pip install 'mingpt-nb[plot]'" in str(e), e
else: raise AssertionError('matplotlib was found')
'''


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "A folder with the package as its wheel installs it."
    tmp = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    subprocess.run(
        [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp.glob('*.whl')
    subprocess.run(
        [*pip, 'install', '--no-deps', '--target', tmp / 'site', wheel],
        check=True,
        capture_output=True,
    )
    return tmp / 'site'


def test_wheel_imports_without_extras(site, tmp_path):
    run = subprocess.run(
        [*PYTHON, '-c', PROBE, str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={'PYTHONPATH': str(site), 'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr


def test_metadata(site):
    (info,) = site.glob('mingpt_nb-*.dist-info')
    metadata = (info / 'METADATA').read_text(encoding='utf-8')
    assert 'Requires-Python: >=3.10' in metadata
    for extra in 'hf', 'plot', 'dev':
        assert f'Provides-Extra: {extra}' in metadata
    runtime = {
        line.split()[1].split('>')[0]
        for line in metadata.splitlines()
        if line.startswith('Requires-Dist') and 'extra ==' not in line
    }
    assert runtime == {'torch', 'numpy', 'regex', 'requests', 'tqdm', 'safetensors'}
    assert 'mingpt-nb = mingpt_nb.utils:cli' in (info / 'entry_points.txt').read_text(
        encoding='utf-8'
    )


def test_bpe_does_not_load_torch(site, tmp_path):
    code = "import sys, mingpt_nb.bpe; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        check=True,
        env={'PYTHONPATH': str(site), 'HOME': str(tmp_path)},
    )
