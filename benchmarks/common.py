"""What the benchmarks share: turns, ratios with their spread, memory, and one command line.

A script defines `rows(args)`, which yields a dict for each figure, and ends with `main(__doc__,
rows)`; a script with several things to measure passes a dict of such functions, and the first
argument picks one. Functions that are compared take turns in one process; each round gives one
ratio, of which the row holds the median and the extremes. A ratio above 1 means that mingpt_nb is
the faster one.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager

OURS = 'mingpt_nb'
CLOCK = time.perf_counter


def seconds(f, clock=None):
    """Of the clock of this run: elapsed time, or with --processor-time that of all threads of the
    process."""
    clock = clock or CLOCK
    start = clock()
    f()
    return clock() - start


def alternate(functions, rounds, clock=None, warm=1):
    """{name: [seconds in each round]}; the functions take turns, after `warm` calls that do not
    count."""
    for f in functions.values():
        for _ in range(warm):
            f()
    times = [[seconds(f, clock) for f in functions.values()] for _ in range(rounds)]
    return dict(zip(functions, map(list, zip(*times))))


def ratios(what, times, per=1e-3, unit='ms', goal=None, **more):
    """A row for each peer: median times in `unit`, which is `per` seconds; median and extremes of
    peer / ours, round by round."""
    ours = times[OURS]
    for peer in times:
        if peer == OURS:
            continue
        r = [t / o for t, o in zip(times[peer], ours)]
        yield dict(
            what=what,
            peer=peer,
            unit=unit,
            ours=statistics.median(ours) / per,
            theirs=statistics.median(times[peer]) / per,
            ratio=statistics.median(r),
            low=min(r),
            high=max(r),
            rounds=len(r),
            goal=(goal or {}).get(peer),
            **more,
        )


def peak_memory():
    "The most memory that this process has held so far, in MiB; 0 where Python cannot tell."
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if platform.system() == 'Darwin' else 2**10
    )


@contextmanager
def fresh(preload, threads):
    "A pool whose every call gets a process of its own, with the modules `preload` imported before."
    servers = 'forkserver' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if servers else 'spawn')
    os.environ['OMP_NUM_THREADS'] = str(threads)
    if servers:
        context.set_forkserver_preload(list(preload))
    pool = context.Pool(1, maxtasksperchild=1)
    try:
        yield pool
    finally:
        pool.close()
        pool.join()


def show(row):
    if 'ratio' in row:
        text = (
            f"{row['peer']:18} {row['ours']:9.2f} against {row['theirs']:9.2f} {row['unit']}   "
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        )
    else:
        text = '  '.join(
            f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
            for k, v in row.items()
            if k != 'what' and v is not None
        )
    print(f"{row['what']:34} {text}", flush=True)


def main(doc, rows, threads=2, rounds=5, **options):
    """Read the command line, show each row as it comes, and write them all with --json. `options`:
    name=(default, help)."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if isinstance(rows, dict):
        parser.add_argument('what', choices=list(rows), nargs='?', default=next(iter(rows)))
    parser.add_argument('--threads', type=int, default=threads, help=f'of torch ({threads})')
    parser.add_argument('--rounds', type=int, default=rounds, help=f'({rounds})')
    parser.add_argument(
        '--tiny', action='store_true', help='the smallest sizes and two rounds, to see that it runs'
    )
    parser.add_argument(
        '--processor-time',
        action='store_true',
        help='of all threads, instead of elapsed time: on a machine that others use too',
    )
    parser.add_argument('--json', help='write the rows to this file')
    for name, (default, text) in options.items():
        kind = (
            dict(action='store_true')
            if default is False
            else dict(type=type(default), default=default)
        )
        parser.add_argument('--' + name.replace('_', '-'), help=text, **kind)
    args = parser.parse_args()
    if args.processor_time:
        global CLOCK
        CLOCK = time.process_time
    if args.tiny:
        args.rounds, args.threads = 2, 1
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(args.threads)
    done = []
    for row in (rows[args.what] if isinstance(rows, dict) else rows)(args):
        show(row)
        done.append(row)
        if args.json:
            with open(args.json, 'w', encoding='utf-8') as f:
                json.dump(dict(threads=args.threads, rows=done), f, indent=1)
