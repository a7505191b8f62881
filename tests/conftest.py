"The rendered site and a browser, for the tests that need them, and the order of the files."

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
LONGEST_FIRST = (
    'site',
    'bench',
    'scaling',
    'checkpoints',
    'tokens',
    'bpe',
    'gpt2',
    'playground',
    'chargpt',
    'adder',
)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that workers that run side by side end at about the same
    time."""
    place = {f'test_{name}': i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n 2`: a file is run by one worker, which makes what its tests share once. The slow
    tests share nothing, and are all in one file."""
    from xdist.scheduler import LoadFileScheduling, LoadScheduling

    config.option.loadscopereorder = False
    kind = LoadScheduling if config.option.markexpr == 'slow' else LoadFileScheduling
    return kind(config, log)


def once(tmp_path_factory, name, make):
    "The folder `name` that `make(folder)` fills, made by the first worker that asks for it."
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder = base / name
    with FileLock(base / f'{name}.lock'):
        if not folder.exists():
            make(part := tmp_path_factory.mktemp(name))
            part.rename(folder)
    return folder


@pytest.fixture(scope='session')
def docs(tmp_path_factory):
    "The folder of the site, rendered from a copy of the notebooks."
    smalldocs = pytest.importorskip('smalldocs.site', reason='smalldocs needs Python 3.11')
    from mingpt_nb.book import finish_site

    def render(tmp):
        shutil.copytree(ROOT / 'nbs', tmp / 'nbs', ignore=shutil.ignore_patterns('out', '.*'))
        shutil.copy(ROOT / 'pyproject.toml', tmp)
        subprocess.run(
            [sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs()'],
            cwd=tmp,
            check=True,
        )
        smalldocs.build(tmp / '_proc', quiet=True)
        finish_site(tmp / '_proc/_docs')

    return once(tmp_path_factory, 'rendered', render) / '_proc/_docs'


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass


@pytest.fixture(scope='session')
def site(docs):
    "The address of the site on this machine."
    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=docs)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='session')
def browser():
    "Chromium, driven by Playwright."
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    found = list(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome')))
    )
    if not found:
        pytest.skip('no Chromium is installed')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found[0], args=['--no-sandbox'])
        yield browser
        browser.close()
