"""mingpt_nb.data against a local server that misbehaves, in processes of its own: what a notebook
cell cannot show."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from processes import PYTHON

from mingpt_nb import data

TEXT = b''.join(b'%d bottles of beer on the wall\n' % i for i in range(40_000))
SUM = 'sha256:' + hashlib.sha256(TEXT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        super().__init__(('127.0.0.1', 0), Handler)

    url = property(lambda self: f'http://127.0.0.1:{self.server_port}/text')


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers['Range']))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.server.answer(self)

    def send(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k.replace('_', '-'), v)
        if length != 'unsaid':
            self.send_header('Content-Length', len(body) if length is None else length)
        self.end_headers()
        self.wfile.write(body)

    def honest(self, body=TEXT, slowly=0.0):
        start = int(r[6:-1]) if (r := self.headers['Range']) else 0
        if start >= len(body):
            return self.send(b'', 416)
        rest, rng = body[start:], f'bytes {start}-{len(body) - 1}/{len(body)}'
        self.send(rest[:1000] if slowly else rest, 206 if r else 200, len(rest), Content_Range=rng)
        for i in range(1000, len(rest) if slowly else 0, 10_000):
            time.sleep(slowly)
            self.wfile.write(rest[i : i + 10_000] if i > 1000 else rest[1000:11_000])
            self.wfile.flush()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('MINGPT_NB_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        todo = list(answers) or [Handler.honest]
        servers.append(Server(lambda h: (todo.pop(0) if len(todo) > 1 else todo[0])(h)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


N_BYTES = len(TEXT)
WIKI = data.File('wiki', N_BYTES, SUM)


def send(*args, **kw):
    return lambda h: h.send(*args, **kw)


def get(server, path, digest=SUM, size=N_BYTES, **kw):
    return data.download(server.url, path, digest, size, **{'wait': 0, 'timeout': (10, 10), **kw})


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if not p.name.endswith('.lock'))


def python(code, *args, **kw):
    command = [*PYTHON, '-c', code, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw
    )


FETCH = (
    'import sys; from mingpt_nb.data import download; '
    'print(download(sys.argv[1], sys.argv[2], sys.argv[3], wait=0))'
)

# ---- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'status, requests',
    [
        (500, 4),
        (502, 4),
        (503, 4),
        (504, 4),
        (429, 4),
        (408, 4),
        (400, 1),
        (401, 1),
        (403, 1),
        (404, 1),
        (410, 1),
        (451, 1),
    ],
)
def test_error_status(serve, cache, status, requests):
    server = serve(send(b'<html>no</html>', status))
    with pytest.raises(data.DownloadError) as e:
        get(server, cache / 'text')
    assert (
        str(status) in str(e.value)
        and server.url in str(e.value)
        and str(cache / 'text') in str(e.value)
    )
    assert len(server.asked) == requests and leftovers(cache / 'text') == []


@pytest.mark.parametrize('length', [None, 'unsaid'])
@pytest.mark.parametrize(
    'body', [b'', b'<html>Please log in</html>', TEXT[:-1], TEXT + b'x', b'x' + TEXT[1:], TEXT * 3]
)
def test_wrong_body(serve, cache, body, length):
    server = serve(send(body, length=length))
    with pytest.raises(ValueError) as e:
        get(server, cache / 'text')
    assert SUM in str(e.value) and 'got sha256:' in str(e.value) and server.url in str(e.value)
    assert leftovers(cache / 'text') == [] and len(server.asked) == 1


def test_body_that_never_ends(serve, cache):
    def pour(h):
        h.send(b'', length='unsaid')
        while True:
            h.wfile.write(TEXT)

    with pytest.raises(ValueError, match='expected sha256'):
        get(serve(pour), cache / 'text')
    assert leftovers(cache / 'text') == []


def test_short_body_every_time(serve, cache):
    server = serve(send(TEXT[:100_000], length=len(TEXT)))
    with pytest.raises(data.DownloadError):
        get(server, cache / 'text')
    assert len(server.asked) == 4 and not (cache / 'text').exists()


@pytest.mark.parametrize('pieces', [2, 3, 4])
def test_resume_across_short_bodies(serve, cache, pieces):
    def some(h):
        start = int(r[6:-1]) if (r := h.headers['Range']) else 0
        h.send(
            TEXT[start : start + len(TEXT) // pieces + 10_000],
            206 if r else 200,
            len(TEXT) - start,
            Content_Range=f'bytes {start}-{len(TEXT) - 1}/{len(TEXT)}',
        )

    server = serve(some)
    assert get(server, cache / 'text').read_bytes() == TEXT and len(server.asked) == pieces


def test_hang_before_and_in_the_body(serve, cache):
    def stall(h):
        h.send(TEXT[:500_000], length=len(TEXT))
        h.wfile.flush()
        time.sleep(3)

    for answer in (lambda h: time.sleep(3)), stall:
        server = serve(answer)
        with pytest.raises(data.DownloadError, match='timed out'):
            get(server, cache / 'text', tries=2, timeout=(10, 0.5))
        assert len(server.asked) == 2
    assert get(serve(stall, Handler.honest), cache / 'text', timeout=(10, 0.5)).read_bytes() == TEXT


def test_redirects(serve, cache):
    target = serve()
    assert (
        get(serve(lambda h: h.send(b'', 302, Location=target.url)), cache / 'text').read_bytes()
        == TEXT
    )
    assert len(target.asked) == 1
    with pytest.raises(data.DownloadError, match='redirects'):
        get(serve(send(b'', 301, Location='/text')), cache / 'b')


def test_compressed_in_transit(serve, cache):
    import gzip

    server = serve(send(gzip.compress(TEXT), Content_Encoding='gzip'))
    assert get(server, cache / 'text').read_bytes() == TEXT


@pytest.mark.parametrize(
    'part',
    [b'', TEXT[:1], TEXT[:500_000], TEXT, TEXT + b'and more', b'x' * 99_999, b'x' * len(TEXT) * 2],
)
@pytest.mark.parametrize('ranges', [True, False])
def test_any_part_from_yesterday(serve, cache, part, ranges):
    cache.mkdir()
    (cache / 'text.part').write_bytes(part)
    server = serve(Handler.honest if ranges else send(TEXT))
    assert get(server, cache / 'text').read_bytes() == TEXT
    assert leftovers(cache / 'text') == ['text'] and len(server.asked) <= 2


def test_file_that_changes_all_the_time(serve, cache):
    cache.mkdir()
    (cache / 'text.part').write_bytes(b'x' * 1000)
    server = serve(functools.partial(Handler.honest, body=b'y' * len(TEXT)))
    with pytest.raises(ValueError, match='expected sha256'):
        get(server, cache / 'text')
    assert len(server.asked) == 2 and leftovers(cache / 'text') == []


def test_offline(cache):
    server = Server(None)
    server.server_close()  # nobody listens there any more
    with pytest.raises(ConnectionError) as e:
        data.download(server.url, cache / 'text')
    assert server.url in str(e.value) and str(cache / 'text') in str(e.value)


def test_no_such_host(cache):
    with pytest.raises(ConnectionError, match='put that file at'):
        data.download('http://no.such.host.invalid/x', cache / 'text')


@pytest.mark.parametrize(
    'url', ['file:///etc/passwd', 'ftp://127.0.0.1/x', '/etc/passwd', 'http://']
)
def test_no_web_address(cache, url):
    with pytest.raises(data.DownloadError):
        data.download(url, cache / 'text')


def test_plain_http_server_asked_for_https(serve, cache):
    server = serve()
    with pytest.raises(data.DownloadError):
        data.download(server.url.replace('http:', 'https:'), cache / 'text')


# ---- several processes ---------------------------------------------------------------------------


def test_processes_at_once(serve, cache):
    server = serve(functools.partial(Handler.honest, slowly=0.01))
    jobs = [python(FETCH, server.url, cache / 'text', SUM) for _ in range(4)]
    for j in jobs:
        out, err = j.communicate(timeout=60)
        assert (j.returncode, out.strip(), err) == (0, str(cache / 'text'), '')
    assert (
        (cache / 'text').read_bytes() == TEXT
        and leftovers(cache / 'text') == ['text']
        and len(server.asked) == 1
    )


@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(serve, cache, how):
    server = serve(functools.partial(Handler.honest, slowly=0.05), Handler.honest)
    job, part = python(FETCH, server.url, cache / 'text', SUM), cache / 'text.part'
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 30_000):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(how)
    job.communicate(timeout=60)
    assert leftovers(part) == ['text.part']
    assert get(server, cache / 'text').read_bytes() == TEXT and leftovers(part) == ['text']
    first, second = server.asked
    assert first[1] is None and int(second[1][6:-1]) >= 30_000


def test_nothing_is_fetched_on_import(cache):
    job = python('import mingpt_nb.data as d; d.english()')
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and not err and not out and not cache.exists()


def test_english_is_the_same_in_every_process():
    code = (
        'import hashlib; from mingpt_nb.data import english; '
        'print(hashlib.sha256(english().encode()).hexdigest())'
    )
    jobs = [python(code, env={**os.environ, 'PYTHONHASHSEED': seed}) for seed in ('1', '2')]
    assert len({j.communicate(timeout=60)[0] for j in jobs}) == 1


# ---- the texts -----------------------------------------------------------------------------------


def zipped(**members):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, body in members.items():
            z.writestr(name, body)
    return f.getvalue()


@pytest.fixture
def wiki(serve, monkeypatch):
    def add(archive, member=WIKI, pinned=True):
        server = serve(functools.partial(Handler.honest, body=archive))
        digest = 'sha256:' + hashlib.sha256(archive).hexdigest() if pinned else None
        monkeypatch.setitem(
            data.SOURCES,
            'wiki',
            data.Source(server.url, data.File('wiki.zip', len(archive), digest), member),
        )
        return server

    return add


def test_zip(wiki, cache):
    server = wiki(zipped(**{'../../evil': b'x', '/evil': b'x', 'wiki': TEXT}))
    assert data.fetch('wiki') == cache / 'wiki' and (cache / 'wiki').read_bytes() == TEXT
    assert data.fetch('wiki') == cache / 'wiki' and len(server.asked) == 1
    assert leftovers(cache / 'wiki') == ['wiki'] and not list(cache.parent.rglob('evil'))


def lying(size):
    "A zip whose directory says that its member has another size than it has."
    raw = bytearray(zipped(wiki=TEXT))
    at = raw.rindex(b'PK\1\2')
    raw[at + 24 : at + 28] = size.to_bytes(4, 'little')
    return bytes(raw)


@pytest.mark.parametrize(
    'archive',
    [
        zipped(other=TEXT),
        zipped(wiki=TEXT[1:]),
        zipped(wiki=b'x' * len(TEXT)),
        zipped(wiki=b'\0' * 50_000_000),
        lying(10),
        zipped(wiki=TEXT)[:-100],
        zipped(),
        b'',
        b'<html>Please log in</html>',
    ],
)
@pytest.mark.parametrize('pinned', [True, False])
def test_bad_zip(wiki, cache, archive, pinned):
    server = wiki(archive, pinned=pinned)
    if not archive:
        server.answer = send(b'')
    with pytest.raises(ValueError, match='wiki'):
        data.fetch('wiki')
    assert leftovers(cache / 'wiki') == []


def test_zip_that_unpacks_to_more_than_it_says(wiki, cache):
    wiki(lying(100), data.File('wiki', 100, 'sha256:' + hashlib.sha256(TEXT[:100]).hexdigest()))
    with pytest.raises(ValueError):
        data.fetch('wiki')
    assert not (cache / 'wiki').exists()


def test_by_hand(wiki, cache):
    whole = zipped(wiki=TEXT)  # once: a zip holds the time
    server = wiki(whole)
    server.answer = send(b'', 404)
    cache.mkdir()
    with pytest.raises(data.DownloadError) as e:
        data.fetch('wiki')
    assert str(cache / 'wiki.zip') in str(e.value)
    (cache / 'wiki.zip').write_bytes(whole[:-1])
    with pytest.raises(ValueError, match='delete it'):
        data.fetch('wiki')
    (cache / 'wiki.zip').write_bytes(whole)
    assert data.fetch('wiki').read_bytes() == TEXT


def test_splits_stay_on_disk(cache, monkeypatch):
    cache.mkdir()
    size = 100_000_000
    with open(cache / 'text8', 'wb') as f:
        f.truncate(size)  # a sparse file of zeros, as large as the real one
    member = data.File('text8', size, data.file_digest(cache / 'text8'))
    monkeypatch.setitem(data.SOURCES, 'text8', data.SOURCES['text8']._replace(member=member))
    parts = [data.load_split('text8', p) for p in ('train', 'valid', 'test')]
    assert [len(p) for p in parts] == [90_000_000, 5_000_000, 5_000_000] and all(
        isinstance(p, np.memmap) for p in parts
    )


@pytest.mark.parametrize('seed', range(30))
def test_every_character_is_scored_once(seed):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 256, rng.integers(2, 300)).astype(np.uint8)
    block = int(rng.integers(1, 40))
    stride = int(rng.integers(1, block + 1))
    costs = rng.random(256)  # of each character: the sum must not depend on the windows
    got = data.evaluate(lambda x, y: costs[y], text, block, stride, int(rng.integers(1, 9)))
    assert got == pytest.approx(costs[text[1:]].mean() / np.log(2))


def test_the_recipe_for_a_gpt():
    "The cell of the chapter that needs a network and a GPU, with a small model on a small text."
    torch = pytest.importorskip('torch')
    from mingpt_nb.model import GPT

    nb = json.loads(
        (Path(__file__).parent.parent / 'nbs' / '91_data.ipynb').read_text(encoding='utf-8')
    )
    (cell,) = [s for c in nb['cells'] if 'def nats(x, y)' in (s := ''.join(c['source']))]
    config = GPT.get_default_config()
    config.merge_from_dict(
        dict(model_type=None, n_layer=2, n_head=2, n_embd=32, vocab_size=256, block_size=512)
    )
    torch.manual_seed(0)
    space = dict(
        model=GPT(config).eval(),
        device='cpu',
        evaluate=data.evaluate,
        load_split=lambda name, part: np.frombuffer(TEXT[:3000], dtype=np.uint8),
    )
    exec(cell.replace('evaluate(nats', 'bits = evaluate(nats'), space)
    assert 7.5 < space['bits'] < 8.5  # fresh weights: about log2(256)
