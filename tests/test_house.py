"""The house: who may import whom, and what stands where. `ast` reads the modules; none is imported.

From the ground up: the appendices in the order of `GROUND`, then the chapters by their numbers. A
module imports what stands below it, at its top, where a reader sees it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
GROUND = '99', '90', '92', '94', '95', '96', '91', '97', '98'
# minGPT's `GPT.from_pretrained` is a method of chapter 02 and the work of chapter 05.
DOORS = {('model', door, 'gpt2') for door in ('from_pretrained', 'save_pretrained')}
# Imports by name: of another library that may be missing, and of a command when it is called.
BY_NAME = {('utils', 'need'), ('utils', '_run')}


def modules():
    "{module: its place in the house}, from the notebooks that export one."
    found = {}
    for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        name = re.search(r'#\| *default_exp (\w+)', path.read_text(encoding='utf-8'))
        if name:
            number = path.name[:2]
            found[name[1]] = (0, GROUND.index(number)) if number in GROUND else (1, int(number))
    return found


def own_imports(node, package='mingpt_nb'):
    "The modules of this package that an import statement names."
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif node.level:
        names = [f'{package}.{node.module or a.name}' for a in node.names]
    elif node.module == package:
        names = [f'{package}.{a.name}' for a in node.names]
    else:
        names = [node.module]
    parts = (name.split('.') for name in names)
    return {p[1] for p in parts if p[0] == package and len(p) > 1} - {'__version__'}


def is_text(node):
    "Is the expression a text, or one of two?"
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    return isinstance(node, ast.Constant)


def faults(module, source, place):
    "What the module does that the house forbids, one sentence each."
    found = set()

    def visit(node, function=None):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for other in own_imports(node):
                if function and other == module:
                    continue  # itself, for the processes that a notebook starts
                if function and (module, function, other) not in DOORS:
                    found.add(f'{module}.{function} imports {other} inside')
                elif not function and place[other] >= place[module]:
                    found.add(f'{module} imports {other}, which stands above it')
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            by_name = called.split('.')[-1] in ('import_module', '__import__', 'find_spec')
            if by_name and not is_text(node.args[0]) and (module, function) not in BY_NAME:
                found.add(f'{module}.{function} imports by name')
        elif isinstance(node, ast.Constant) and re.fullmatch(r'mingpt_nb\.\w+', str(node.value)):
            found.add(f'{module}.{function} names the module {node.value} in a text')
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source))
    return found


def test_what_stands_below_knows_nothing_of_what_stands_above():
    place = modules()
    found = set()
    for module in place:
        source = (ROOT / f'mingpt_nb/{module}.py').read_text(encoding='utf-8')
        found |= faults(module, source, place)
    assert found == PROGRAMS, sorted(found ^ PROGRAMS)


# Chapters 04 and 06 end in programs, and these take the trainer for real work, of chapter 08, and
# write with what chapter 09 makes of a model.
PROGRAMS = {
    f'{program} imports {module}, which stands above it'
    for program in ('adder', 'chargpt')
    for module in ('scaling', 'speed')
}


@pytest.mark.parametrize(
    'module, source, fault',
    [
        ('utils', 'import mingpt_nb.data', 'utils imports data, which stands above it'),
        ('utils', 'from . import data', 'utils imports data, which stands above it'),
        ('utils', 'from .model import GPT', 'utils imports model, which stands above it'),
        ('model', 'from mingpt_nb.model import GPT', 'model imports model, which stands above it'),
        ('model', 'def f(): from mingpt_nb import gpt2', 'model.f imports gpt2 inside'),
        ('gpt2', 'class A:\n def f(): import mingpt_nb.bpe', 'gpt2.f imports bpe inside'),
        ('data', "m = importlib.import_module('mingpt_nb.bpe')", None),
        ('data', 'def f(n): return __import__(n)', 'data.f imports by name'),
    ],
)
def test_a_fault_in_the_house_is_found(module, source, fault):
    found = faults(module, source, modules())
    assert found == {fault or 'data.None names the module mingpt_nb.bpe in a text'}


@pytest.mark.parametrize(
    'module, source',
    [
        ('data', 'from mingpt_nb.utils import need'),
        ('gpt2', 'from .model import GPT\nimport mingpt_nb.data'),
        ('model', 'class GPT:\n def save_pretrained(self): from mingpt_nb.gpt2 import save'),
        ('data', "m = import_module('msvcrt' if os.name == 'nt' else 'fcntl')"),
        ('data', 'def f(): from mingpt_nb import data'),
        ('data', "topics = importlib.import_module('pydoc_data.topics')"),
        ('bpe', 'def f(): import torch'),
        ('utils', 'def need(module): return importlib.import_module(module)'),
    ],
)
def test_what_the_house_allows(module, source):
    assert not faults(module, source, modules())


def test_the_settings_of_the_site_are_those_at_the_top_level():
    "nbdev looks for them beside the notebooks; `make docs` copies them there."
    top, copy = ((ROOT / p).read_text(encoding='utf-8') for p in ('_quarto.yml', 'nbs/_quarto.yml'))
    assert copy == top, "run 'make docs', or cp _quarto.yml nbs"
    pages = sorted(p.name for p in (ROOT / 'nbs').glob('*.ipynb'))
    assert sorted(re.findall(r'[\w]+\.ipynb', top)) == pages


def test_hooks_run_the_tools_that_are_installed():
    yaml = pytest.importorskip('yaml')
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
    tools = [hook['entry'].split()[0] for repo in config['repos'] for hook in repo['hooks']]
    assert tools == ['ruff', 'ruff', 'nbdev-clean', 'nbdev-export']
    assert not [tool for tool in tools if not shutil.which(tool, path=search_path())]


def search_path():
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])


def commands():
    "The lines of the first block of shell commands in CONTRIBUTING.md that change a chapter."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    block = re.search(r'## Five commands.*?```sh\n(.*?)```', text, re.S)[1]
    return [line.split('  #')[0].strip() for line in block.splitlines()]


def test_a_chapter_is_changed_with_five_commands(tmp_path):
    "In a copy of the repository: a new definition, its assert, and the commands as written."
    assert len(commands()) == 5
    for name in 'nbs', 'mingpt_nb', 'tests', 'benchmarks':
        skipped = shutil.ignore_patterns('out', '.*', '__pycache__')
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    for name in 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md', '_quarto.yml':
        shutil.copy(ROOT / name, tmp_path)
    notebook, module = tmp_path / 'nbs/95_checks.ipynb', tmp_path / 'mingpt_nb/checks.py'
    nb = nbformat.read(notebook, 4)
    new = "#| exports\ndef new( ):  return 'new'", "assert new() == 'new'"
    place = next(i for i, c in enumerate(nb.cells) if 'def as_integer' in c.source)
    nb.cells[place:place] = [nbformat.v4.new_code_cell(source) for source in new]
    nbformat.write(nb, notebook)
    env = os.environ | dict(PYTHONPATH=str(tmp_path), PATH=search_path(), OMP_NUM_THREADS='1')
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    assert "def new():\n    return 'new'\n" in module.read_text(encoding='utf-8')
