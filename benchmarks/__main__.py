"""Run all benchmarks on this machine, and write what they found.

    python benchmarks                    # `make bench`: under 20 minutes
    python benchmarks --only bpe start   # these alone; the rows of the others are kept
    python benchmarks --tiny --out DIR   # the smallest sizes: does it run?
    # beside other programs: processor time, no limits
    python benchmarks --only generate train --busy --rounds 3

Writes results/MACHINE.json, a table in results/MACHINE.md and pictures beside it. Each script has a
process of its own and a limit of time; the rows that it had written when the time was up count.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from mingpt_nb.book import cpu_name

HERE = Path(__file__).parent
PLAN = {
    'machine': ('machine.py', 60),
    'start': ('start.py', 200),
    'bpe': ('bpe.py --size 4000000', 200),
    'train': ('train.py', 260),
    'processes': ('train.py processes --rounds 5', 200),
    'generate': ('generate.py', 330),
    'llama': ('llama.py', 200),
    'products': ('products.py', 60),
    'bare': ('bare.py', 30),
    'scaling': ('scaling.py', 220),
    'chargpt': ('chargpt.py steps --rounds 7', 100),
    'adder': ('adder.py', 260),
}
LIBRARIES = 'mingpt-nb torch numpy transformers tokenizers tiktoken ctranslate2'.split()
TOTAL = 19 * 60  # seconds for all of them


def load():
    """Programs that ran or waited for a core, on average over the last minute; None where the
    system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def versions(*names):
    found = {'python': platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def machine():
    cpu, cores = cpu_name(), os.cpu_count()
    name = re.sub(
        '[^a-z0-9]+', '-', re.sub(r'\((R|TM)\)', '', f'{cpu} {cores} cores').lower()
    ).strip('-')
    return dict(
        name=name,
        cpu=cpu,
        cores=cores,
        system=f'{platform.system()} {platform.machine()}',
        versions=versions(*LIBRARIES),
    )


def run(name, tiny, deadline, busy=()):
    """
    The rows of one script, with its command, seconds and the load around it; `failed` says what
    went wrong. `busy`: options for a machine that others use too, where threads that wait must not
    spin, and no limit of time holds.
    """
    script, limit = PLAN[name]
    with tempfile.TemporaryDirectory() as folder:
        out, before, start = Path(folder, 'rows.json'), load(), time.perf_counter()
        argv = [
            sys.executable,
            '-W',
            'ignore',
            HERE / script.split()[0],
            *script.split()[1:],
            *busy,
            *['--tiny'] * tiny,
            '--json',
            out,
        ]
        rest, env = (
            max(1, min(limit, deadline - time.time())),
            os.environ | {'OMP_WAIT_POLICY': 'passive'} if busy else None,
        )
        try:
            failed = subprocess.run(argv, timeout=None if busy else rest, env=env).returncode
        except subprocess.TimeoutExpired as e:
            failed = f'stopped after {e.timeout:.0f} s'
        got = json.loads(out.read_text(encoding='utf-8')) if out.exists() else dict(rows=[])
    command = ' '.join(
        ['OMP_WAIT_POLICY=passive'] * bool(busy) + ['python', f'benchmarks/{script}', *busy]
    )
    note = dict(note='processor time of all threads, beside other programs') if busy else {}
    return dict(
        command=command,
        **note,
        seconds=round(time.perf_counter() - start, 1),
        load_before=before,
        load_after=load(),
        **dict(failed=failed) if failed else {},
        **got,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(PLAN),
        default=list(PLAN),
        metavar='NAME',
        help=', '.join(PLAN),
    )
    parser.add_argument('--tiny', action='store_true', help='the smallest sizes and two rounds')
    parser.add_argument(
        '--busy',
        nargs=argparse.REMAINDER,
        help='others use the machine too: processor time, no limits; '
        'options for the scripts may follow',
    )
    parser.add_argument(
        '--out', default=HERE / 'results', type=Path, help='folder for what is written'
    )
    args = parser.parse_args()
    busy = [] if args.busy is None else ['--processor-time', *args.busy]
    args.out.mkdir(exist_ok=True, parents=True)
    about, start, deadline = machine(), time.time(), time.time() + TOTAL
    path = args.out / f'{about["name"]}.json'
    runs = json.loads(path.read_text(encoding='utf-8'))['runs'] if path.exists() else {}
    for name in args.only:
        print(f'\n{name}: python benchmarks/{PLAN[name][0]}, load {load()}', flush=True)
        runs[name] = dict(
            date=datetime.date.today().isoformat(), **run(name, args.tiny, deadline, busy)
        )
        result = dict(
            machine=about,
            date=datetime.date.today().isoformat(),
            command='python benchmarks',
            seconds=round(time.time() - start),
            runs={n: runs[n] for n in PLAN if n in runs},
        )
        path.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    import draw

    draw.write(result, path)
    bad = [f'{n}: {r["failed"]}' for n, r in result['runs'].items() if 'failed' in r]
    print(f'\n{path} and what stands beside it, in {time.time() - start:.0f} s', *bad, sep='\n')
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
