"""Every benchmark runs with its smallest sizes, and writes a file, a table and pictures. No time is asserted."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HALVES = ('start', 'bpe', 'chargpt', 'train'), ('machine', 'generate', 'scaling', 'adder')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "The folders of two runs side by side."
    pytest.importorskip('transformers')
    folders = [tmp_path_factory.mktemp('results') for _ in HALVES]
    runs = [subprocess.Popen([sys.executable, ROOT/'benchmarks', '--tiny', '--out', folder, '--only', *names], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for folder, names in zip(folders, HALVES)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], '\n'.join(said)
    return folders


def test_rows_say_how_they_were_measured(results):
    for folder, names in zip(results, HALVES):
        file, = folder.glob('*.json')
        result = json.loads(file.read_text(encoding='utf-8'))
        assert set(result['machine']) == {'name', 'cpu', 'cores', 'system', 'versions'} and set(result['runs']) == set(names)
        for run in result['runs'].values():
            assert run['rows'] and {'command', 'seconds', 'load_before', 'load_after', 'threads', 'date'} <= set(run)
            assert all(0 < row['low'] <= row['ratio'] <= row['high'] for row in run['rows'] if 'ratio' in row)


def test_table_and_pictures_are_written(results):
    for folder, names in zip(results, HALVES):
        file, = folder.glob('*.json')
        table = file.with_suffix('.md').read_text(encoding='utf-8')
        assert table.count('\n## ') == len(names) and '| tiktoken |' in table or 'GFLOP/s' in table
    pictures = {p.stem.split('-')[-1] for folder in results for p in folder.glob('*.png')}
    assert pictures == {'start', 'bpe', 'chargpt', 'train', 'generate', 'adder', 'time', 'memory', 'shares'}


def test_expectations_come_from_the_chapters_cells(tmp_path):
    out = tmp_path/'expect.json'
    subprocess.run([sys.executable, ROOT/'benchmarks'/'expect.py', '--tiny', '--seeds', '1', '--json', out], check=True, capture_output=True)
    rows = json.loads(out.read_text(encoding='utf-8'))['rows']
    assert [r['what'] for r in rows] == ['sorting', '2 digits', '3 digits'] and all(r['steps'] == 5 and r['wall_s'] > 0 and 0 <= r['right'] < 1 for r in rows)
