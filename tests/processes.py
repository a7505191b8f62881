"""Programs in processes of their own, most of them started without importing torch again, which
takes three seconds.

On Linux a server, one for each process that runs tests, has imported torch and nothing of ours; for
each program it forks. The program has its own folder, environment, arguments, pipes and exit code,
and is killed and signalled as any other. It shares with the other programs of that server the
hashes of strings and what a module read from the environment when it was imported. So `plain=True`
starts a new interpreter: for one of the two where two processes must agree, where memory is
measured, and where such a variable is what the test is about.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
STRICT = re.findall(
    '"(error|default:.*)",', (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
)  # filters of warnings
PYTHON = [sys.executable, *(word for filter in STRICT for word in ('-W', filter))]
#: what a command that trains leaves in its folder
LEFT = ['args.txt', 'config.json', 'metrics.jsonl', 'model', 'training.png']
ENV = {
    'OMP_NUM_THREADS': '1',
    'MPLBACKEND': 'agg',
    'PYTHONPATH': str(ROOT),
    'PYTHONIOENCODING': 'utf-8',
}


def start(*args, cwd=None, env=None, plain=False, start_new_session=False):
    """`python -W error ARGS`, where ARGS are `-c CODE`, `-m MODULE` or a file, and what follows;
    with pipes for its output, as text."""
    early = any(
        name.startswith('PYTHON') and name != 'PYTHONPATH' for name in env or {}
    )  # what the interpreter reads when it starts
    args, env = [str(a) for a in args], {**os.environ, **ENV, **(env or {})}
    if plain or early or sys.platform != 'linux':
        return subprocess.Popen(
            [*PYTHON, *args],
            cwd=cwd,
            env=env,
            text=True,
            encoding='utf-8',
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=start_new_session,
        )
    return Program(
        dict(args=args, cwd=os.path.abspath(cwd or '.'), env=env, session=start_new_session)
    )


def finish(process, code=0, timeout=300):
    "What it says, once it has ended with this exit code."
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def run(*args, code=0, **kwargs):
    "Standard output and errors of a program that ends with this exit code."
    return finish(start(*args, **kwargs), code)


class Program:
    "What the tests use of subprocess.Popen, for a process that the server forks."

    def __init__(self, request):
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(server(), [json.dumps(request).encode()], [w for _, w in pipes])
        for _, w in pipes:
            os.close(w)
        self.stdout, self.stderr, self.status = (open(r, encoding='utf-8') for r, _ in pipes)
        self.pid, self.returncode, self.lock = int(self.status.readline()), None, threading.Lock()

    def wait(self):
        with self.lock:
            if self.returncode is None:
                self.returncode = int(self.status.readline())
                self.status.close()
        return self.returncode

    def communicate(self, timeout):
        alarm = threading.Timer(timeout, self.kill)
        alarm.start()
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda pipe: pipe.read(), (self.stdout, self.stderr)))
        self.wait()
        alarm.cancel()
        self.stdout.close()
        self.stderr.close()
        return said

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def server():
    "The socket on which the server takes requests; it ends when the socket closes."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {k: v for k, v in {**os.environ, **ENV}.items() if k != 'PYTHONPATH'}
    process = subprocess.Popen(
        [*PYTHON, __file__, str(theirs.fileno())],
        env=env,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def serve(requests):
    """Fork for each request, for ever; returns the arguments of the program, in the process that is
    to be it."""
    while True:
        message, pipes, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            break
        for fd in pipes:
            os.close(fd)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    out, err, status = pipes
    if pid := os.fork():  # this one waits, and tells
        os.close(out)
        os.close(err)
        os.write(status, b'%d\n' % pid)
        os.write(status, b'%d\n' % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    request = json.loads(message)
    for old, new in (out, 1), (err, 2):
        os.dup2(old, new)
    for fd in pipes:
        os.close(fd)
    if request['session']:
        os.setsid()
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    return request['args']


def become(kind, *rest):
    "Run `-c CODE`, `-m MODULE` or a file as this process's program, as the interpreter does."
    folder = {'-c': '', '-m': os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[0:1] = [folder, *os.environ['PYTHONPATH'].split(os.pathsep)]
    sys.argv = [kind, *rest]
    if kind == '-c':
        del sys.argv[1]
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(rest[0], '<string>', 'exec'), sys.modules['__main__'].__dict__)
    elif kind == '-m':
        del sys.argv[0]
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(kind, run_name='__main__')


def end(error):
    """Leave with this exception, or None, as the interpreter does, except that it would also take
    torch apart, piece by piece."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and error.code != code:
            print(error.code, file=sys.stderr)
    elif error:
        what = sys.last_type, sys.last_value, sys.last_traceback = (
            type(error),
            error,
            error.__traceback__,
        )
        sys.excepthook(*what)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


if __name__ == '__main__':
    for name in 'requests', 'torch._dynamo', 'torch.distributed.fsdp':
        importlib.import_module(name)
    gc.freeze()
    program = serve(socket.socket(fileno=int(sys.argv[1])))
    error = None
    try:
        become(*program)
    except BaseException as e:
        error = e
    end(error)
