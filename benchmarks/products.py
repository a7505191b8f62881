"""Ways to multiply few rows by a weight matrix, as a model does that writes text token by token,
against `F.linear`.

    # all products of a token: GPT-2 124M, and 6 layers 192 wide
    python benchmarks/products.py
    python benchmarks/products.py shapes --only small # each shape of weights by itself

Every way computes what `F.linear` computes, up to rounding, and nothing wins everywhere: which is
the fastest depends on the processor, the shape, the number of rows and the type. The package
therefore uses `F.linear`; whoever wants more speed has to measure on the machine at hand, as this
command does. A ratio below 1 means that the other way is the faster one.
"""

import platform

import torch
from common import OURS, alternate, main, ratios
from torch.nn import functional as F

from mingpt_nb.book import cpu_name


def stored_in_out(x, weight, bias=None):
    """`F.linear` on a weight that `lay_in_out` has laid out in memory as (in, out), as Hugging
    Face's Conv1D keeps it.

    Won: one row in float32, 124M, on two processors (24 ms for all products instead of 33, and 17
    instead of 19). Lost: it needs the weights in another order, or twice.
    """
    return F.linear(x, weight, bias)


def rows_turned(x, weight, bias=None):
    """`weight @ rows.T` in parts of at most 4 rows; a single row is copied, since a product with
    one column is another routine.

    Won: large weights in float32, up to 8 rows, on an AMD EPYC with MKL: 15 ms for all products of
    the 124M model instead of 33. Lost: on an Intel Xeon the same took 39 ms instead of 19; bfloat16
    anywhere.
    """
    rows = x.reshape(-1, weight.shape[1])
    n = len(rows)
    if n == 1:
        rows = rows.repeat(2, 1)
    parts = rows.chunk(-(-len(rows) // 4))
    y = torch.cat([(weight @ part.T).T for part in parts])[
        :n
    ]  # (n, out), one row after the other in memory
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def multiplied_and_summed(x, weight, bias=None):
    """`(weight * x).sum(-1)` without the table between, which PyTorch spreads over its threads. For
    one row, not for more.

    Won: weights of 32,000 to 260,000 numbers in float32 on two threads of an AMD EPYC, by 4% to
    40%. Lost: with one thread (0.6 to 0.8 of the speed), and for large weights.
    """
    y = torch.linalg.vecdot(weight, x.unsqueeze(-2))
    return y if bias is None else y + bias


def without_onednn(x, weight, bias=None):
    """`F.linear` with oneDNN switched off, so that PyTorch's own product of a matrix and a vector
    runs.

    Won: one row in bfloat16 on an AMD EPYC, 6.7 ms for all products of the 124M model instead of
    14.6. Lost: more than one row (51 ms instead of 18 with eight); in float32 there is no
    difference.
    """
    onednn = torch.backends.mkldnn
    was, onednn.enabled = onednn.enabled, False
    try:
        return F.linear(x, weight, bias)
    finally:
        onednn.enabled = was


def lay_in_out(weight):
    "The same matrix (out, in), in another order in memory: as (in, out)."
    return weight.t().contiguous().t()


WAYS = dict(
    stored_in_out=stored_in_out,
    rows_turned=rows_turned,
    multiplied_and_summed=multiplied_and_summed,
    without_onednn=without_onednn,
)


def useful(way, n, dtype):
    """Whether a way is worth a measurement with `n` rows: one that is for a single row, or for
    bfloat16, is not tried elsewhere."""
    single, half = n == 1, dtype == torch.bfloat16
    return dict(
        stored_in_out=True,
        rows_turned=not half,
        multiplied_and_summed=single and not half,
        without_onednn=single and half,
    )[way]


def shapes(layers, C, vocab):
    "{(out, in): how many a GPT has}, in the order of their use."
    return {
        (3 * C, C): layers,
        (C, C): layers,
        (4 * C, C): layers,
        (C, 4 * C): layers,
        (vocab, C): 1,
    }


SHAPES = {'124M': shapes(12, 768, 50257), 'small': shapes(6, 192, 65)}
TINY = {'tiny': shapes(2, 16, 20)}


def compare(what, counts, n, dtype, rounds):
    "A row for each way: all these products with `n` rows, one after the other, against `F.linear`."
    torch.manual_seed(0)
    weights = [
        torch.randn(shape, dtype=dtype) / shape[1] ** 0.5
        for shape, count in counts.items()
        for _ in range(count)
    ]
    inputs = {size: torch.randn(n, size, dtype=dtype) for _, size in counts}
    ways = {name: way for name, way in WAYS.items() if useful(name, n, dtype)}
    laid_out = [lay_in_out(w) for w in weights]

    def all_products(way, weights):
        return [way(inputs[w.shape[1]], w) for w in weights]

    jobs = {OURS: lambda: all_products(F.linear, weights)}
    for name, way in ways.items():
        mine = laid_out if name == 'stored_in_out' else weights
        jobs[name] = lambda way=way, mine=mine: all_products(way, mine)
        for y, right in zip(jobs[name](), jobs[OURS]()):
            torch.testing.assert_close(
                y, right, atol=3e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0
            )
    yield from ratios(f'{what} {str(dtype)[6:]}, {n} row{"s" * (n > 1)}', alternate(jobs, rounds))


def measured(args, split):
    print(f'{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {platform.machine()}')
    for name, counts in (TINY if args.tiny else SHAPES).items():
        if args.only not in name:
            continue
        parts = (
            {f'{name} {out}x{size}': {(out, size): count} for (out, size), count in counts.items()}
            if split
            else {name: counts}
        )
        for what, mine in parts.items():
            for dtype in torch.float32, torch.bfloat16:
                for n in 1, 8:
                    yield from compare(what, mine, n, dtype, args.rounds)


if __name__ == '__main__':
    main(
        __doc__,
        dict(models=lambda args: measured(args, False), shapes=lambda args: measured(args, True)),
        rounds=9,
        only=('', 'part of a model name'),
    )
