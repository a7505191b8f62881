"""The notebooks as a book: every public name is asserted in its own chapter, and what is generated
is in step."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from mingpt_nb.book import BookPage, claims, out_of_range, printed, to_markdown, was_skipped

ROOT = Path(__file__).parents[1]
CHAPTERS = [
    p
    for p in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
    if 'default_exp' in p.read_text(encoding='utf-8')
]


def code_cells(path):
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def exported(source):
    return re.search(r'^#\| *exports?\b', source, re.M)


def public_names(sources):
    """Functions, classes and capital constants of exported cells, and their public methods, also
    those added by @patch."""
    for node in ast.parse('\n'.join(sources)).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (
                f.name
                for f in node.body
                if isinstance(f, ast.FunctionDef)
                and not f.name.startswith('_')
                and f.name != 'forward'
            )  # modules are called
        elif isinstance(node, ast.FunctionDef) and node.name != 'forward':
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name) and t.id.isupper())


def asserting(source):
    return re.search(
        r'\bassert\b|\btest_\w+\(|\bexpect_fail\(|\bcheck_\w+\(|\bsays\(|\bfails\(', source
    )


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_every_public_name_is_asserted_in_its_chapter(path):
    cells = code_cells(path)
    tested = '\n'.join(s for s in cells if not exported(s) and asserting(s))
    names = [n for n in public_names(filter(exported, cells)) if not n.startswith('_')]
    assert names, f'{path.name} exports nothing'
    bare = [n for n in names if not re.search(rf'\b{n}\b', tested)]
    assert not bare, f'{path.name}: exported, and asserted nowhere: {bare}'


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_no_definition_is_hidden_from_the_reader(path):
    hidden = [s for s in code_cells(path) if re.search(r'^#\| *export\b', s, re.M)]
    assert not hidden, f'use #| exports, which shows the source: {hidden[0]}'


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapters_import_from_earlier_ones_only(path):
    number = {
        re.search(r'#\| *default_exp (\w+)', '\n'.join(code_cells(p)))[1]: int(p.name[:2])
        for p in CHAPTERS
    }
    me = int(path.name[:2])
    program = path.stem in (
        '04_adder',
        '06_chargpt',
    )  # they take the trainer for real work, and fast
    for source in filter(exported, code_cells(path)):
        for module in re.findall(r'^from mingpt_nb\.(\w+) import', source, re.M):
            if program and module in ('scaling', 'speed'):
                continue
            assert number[module] < me or number[module] >= 90, (
                f'{path.name} imports mingpt_nb.{module}'
            )


@pytest.mark.parametrize('path', [*CHAPTERS, ROOT / 'nbs/index.ipynb'], ids=lambda p: p.stem)
def test_outputs_are_saved_and_hold_no_error(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    assert any(c.outputs for c in cells), f'{path.name} was not run: make outputs'
    assert not [o for c in cells for o in c.outputs if o.output_type == 'error']
    assert not [o for c in cells for o in c.outputs if o.get('name') == 'stderr'], (
        f'{path.name}: a warning on the page'
    )


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_pages_are_made_where_nothing_is_missing(path):
    skipped = [c.id for c in nbformat.read(path, 4).cells if was_skipped(c)]
    assert not skipped, "run 'make weights', then 'make outputs'"


def test_all_names_exist():
    for path in CHAPTERS:
        module = importlib.import_module(
            'mingpt_nb.' + re.search(r'#\| *default_exp (\w+)', '\n'.join(code_cells(path)))[1]
        )
        assert all(hasattr(module, n) for n in module.__all__)


def test_readme_is_the_front_page():
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == to_markdown(
        ROOT / 'nbs/index.ipynb'
    ), "run 'make readme'"


def test_the_minutes_on_the_map_are_those_of_the_chapters():
    rows = dict(
        re.findall(
            r'\]\((\d\d_\w+\.ipynb)\) \|.*\| (\d+) \|',
            (ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'),
        )
    )
    opening = {
        n: ' '.join(
            c.source
            for c in nbformat.read(ROOT / 'nbs' / n, 4).cells[:6]
            if c.cell_type == 'markdown'
        )
        for n in rows
    }
    assert set(rows) >= {p.name for p in CHAPTERS}
    assert rows == {n: re.search(r'(\d+) minutes', text)[1] for n, text in opening.items()}


def minutes(cells):
    "To read what is open: 200 words a minute, 4 seconds a line of code, 30 seconds a figure."
    words = lines = figures = 0
    for cell in cells:
        if cell.cell_type == 'markdown':
            words += len(re.findall(r"[A-Za-z0-9']+", cell.source))
        elif not re.search(r'^#\| *hide\b', cell.source, re.M):
            figures += sum('image/png' in o.get('data', {}) for o in cell.outputs)
            if 'code-fold' not in cell.source:
                lines += len(re.findall(r'^(?! *#\|).*\S', cell.source, re.M))
    return words / 200 + lines * 4 / 60 + figures / 2


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_promises_no_fewer_minutes_than_it_takes(path):
    cells = nbformat.read(path, 4).cells
    promised = re.search(r'\*\*Time\*\* (\d+) minutes', '\n'.join(c.source for c in cells[:6]))
    assert int(promised[1]) > 0.85 * minutes(cells), f'{path.name} takes {minutes(cells):.0f}'


# Each cell whose output another processor would make otherwise, and why.
VARIES = {
    '03_trainer a0000003': 'how often a training run clips',
    '03_trainer a0000004': 'norms and losses of three training runs',
    '02_model df85504b': 'five models trained for eighty steps',
    '04_adder 30c99c3a': 'a short training run',
    '04_adder be71d9c1': 'what that model and a fresh one get right',
    '02_model 8b3b9ead': 'models of two and of twelve layers, trained for sixty steps',
    '02_model 1ab014ee': 'what a trained head looks at',
    '04_adder 9748b8a4': 'the steps at which a training run reaches 80%',
    '04_adder 12ab56db': 'mistakes of a model in the middle of its training',
    '04_adder 6e129477': 'mistakes of a model in the middle of its training',
    '04_adder e272ed50': 'means over two training runs',
    '04_adder d9f3742f': 'mistakes of a model in the middle of its training',
    '04_adder 0a5caaee': 'what a model that learns by heart guesses',
    '07_checkpoints ba32080b': 'losses of two training runs',
    '07_checkpoints cdc4735e': 'how far training runs are apart',
    '07_checkpoints 7dfc916c': 'how far training runs are apart',
    '06_chargpt 4c7b926e': 'losses of a training run, and what the model writes',
    '06_chargpt 7881072b': 'the lowest loss of that run',
    '06_chargpt 61c4064e': 'what the trained model writes',
    '06_chargpt 16e7d51d': 'the share of words in what it writes',
    '06_chargpt 45b22e04': 'what the trained model writes',
    '06_chargpt 726b99f4': 'the gradient of a trained model',
    '06_chargpt 25a866b3': 'singular values of that gradient',
    '06_chargpt 0296f4ae': 'losses of two training runs',
    '06_chargpt 2d149b41': 'the best steps of two runs with Muon, in bfloat16 where fast',
    '06_chargpt 0be26fbd': 'losses of a run with Muon, in bfloat16 where fast',
    '08_scaling 48bf20e2': 'what rounding in small types does to logits',
    '08_scaling a0e6f0b4': 'four training runs',
    '09_speed 01f65ae0': 'which ways to multiply a processor likes',
    '09_speed d59f800f': 'which ways to multiply a processor likes',
    '12_chat 12c00521': 'what a model that was trained here gets right',
    '12_chat 12c00621': 'losses of a model that was trained here',
    '13_pixels 13b00026': 'the loss of a training run',
    '13_pixels 13b00035': 'what the trained model draws',
    '13_pixels 13b00039': 'what the trained model draws',
    '13_pixels 13b00042': 'what the trained model reads',
    '13_pixels 13b00053': 'what the trained model reads',
    '13_pixels 13b0005b': 'the losses of single pictures',
    '91_data 5c1d6399': 'the loss after twenty steps',
    '11_finetune 11b00112': 'a training run and what its model writes',
}


def test_cells_that_vary_are_listed_and_hold_the_page_to_their_ranges():
    found = {}
    for path in sorted((ROOT / 'nbs').glob('*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            said = claims(cell)
            if said is None:
                continue
            found[f'{path.stem} {cell.id}'] = cell
            text, wrong = out_of_range(printed(cell), said[1])
            assert not wrong, f'{path.name}, cell {cell.id}: {wrong}'
            assert asserting(cell.source), (
                f'{path.name}, cell {cell.id} states a range and asserts none'
            )
    assert set(found) == set(VARIES)


def has_link(path):
    "Does the page of a notebook offer to open it in Colab?"
    nb = nbformat.read(path, 4)
    nb.path_ = str(path)
    BookPage(nb).begin()
    return 'Open in Colab' in nb.cells[1].source


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_what_opens_in_colab_can_run_there(path):
    """Before the first import of a notebook with the link there is the cell that installs the book,
    the same in all."""
    if not has_link(path):
        return
    setup = next(s for s in code_cells(ROOT / 'nbs/00_bpe.ipynb') if 'google.colab' in s)
    first = next(s for s in code_cells(path) if not s.startswith('#| default_exp'))
    assert first == setup
