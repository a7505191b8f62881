"""Whoever runs a chapter again in the same kernel, after a change, starts from what the first run
has left behind.

All chapters take minutes: `make twice` runs them, and `make portable` does. The test suite tries
the quick ones, and looks for what has gone wrong before in the others."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from processes import STRICT

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / 'nbs').glob('*.ipynb'))


def twice(*paths):
    env = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'PYTHONWARNINGS': ','.join(STRICT),
        'OMP_NUM_THREADS': '1',
    }
    return subprocess.run(
        [sys.executable, ROOT / 'tests/twice.py', *paths],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_every_chapter_runs_twice_in_one_kernel(path):
    done = twice(path)
    assert done.returncode == 0, done.stderr


def test_quick_chapters_run_twice_in_one_kernel():
    done = twice(ROOT / 'nbs/90_utils.ipynb', ROOT / 'nbs/95_checks.ipynb')
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_cell_that_works_only_once_is_found(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(s)
        for s in ("assert 'left' not in globals(), 'left behind'", 'left = True')
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / 'once.ipynb')
    done = twice(tmp_path / 'once.ipynb')
    assert done.returncode == 1 and 'AssertionError: left behind' in done.stderr


def calls(source):
    """What a cell calls when it runs, in order, each written as in the cell; not what stands in
    functions and classes."""
    nodes = ast.parse(source).body[::-1]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node)
        nodes += list(ast.iter_child_nodes(node))[::-1]


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_that_ends_without_gradients_switches_them_on_where_it_trains(path):
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    found = [(call, source) for source in cells for call in calls(source)]
    on = not any(
        call == 'torch.set_grad_enabled(False)' for call, _ in found
    )  # else a second run starts without
    for call, source in found:
        if call.startswith('torch.set_grad_enabled('):
            on = call == 'torch.set_grad_enabled(True)'
        trains = call.split('(')[0].endswith('.backward')
        assert not trains or on or 'torch.enable_grad()' in source, (
            f'run again, this cell finds gradients off:\n{source}'
        )
