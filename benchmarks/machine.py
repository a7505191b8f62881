"""What this machine can do at most: products of large matrices in float32 and bfloat16, and reading
memory.

    python benchmarks/machine.py [--threads 2]

The best of the rounds counts, since a peak is what can be reached; the median stands beside it.
"""

import statistics

import torch
from common import alternate, main


def peaks(rounds=5, n=2048, mib=512):
    "{name: [arithmetic operations or bytes per second, round by round]}"
    full = torch.rand(n, n)
    half, block = full.bfloat16(), torch.ones(mib * 2**18)
    jobs = dict(
        fp32=(lambda: full @ full, 2 * n**3),
        bf16=(lambda: half @ half, 2 * n**3),
        read=(block.sum, mib * 2**20),
    )
    times = alternate({name: f for name, (f, _) in jobs.items()}, rounds)
    return {name: [work / t for t in times[name]] for name, (_, work) in jobs.items()}


def rows(args):
    for name, rates in peaks(*(args.rounds, 256, 16) if args.tiny else (args.rounds,)).items():
        yield dict(
            what=name,
            peak=max(rates) / 1e9,
            median=statistics.median(rates) / 1e9,
            rounds=args.rounds,
            unit='GB/s' if name == 'read' else 'GFLOP/s',
        )


if __name__ == '__main__':
    main(__doc__, rows, rounds=9)
