"""The table and the pictures of a results file; chapter 14 draws with the same functions.

python benchmarks/draw.py benchmarks/results/MACHINE.json
"""

import json
import sys
from pathlib import Path

from mingpt_nb.book import COLORS, subplots
from mingpt_nb.data import bits_per_character
from mingpt_nb.utils import need


def read(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))


def picked(result, run, key='ratio', **fields):
    "The rows of a run that have `key` and these fields; a field may be a prefix of the text."
    rows = result['runs'].get(run, {}).get('rows', [])
    return [
        r
        for r in rows
        if key in r and all(str(r.get(k)).startswith(str(v)) for k, v in fields.items())
    ]


def markdown(result):
    "All ratios as Markdown tables, each under the command that made it."
    about, parts = result['machine'], []
    parts.append(
        f"{about['cpu']}, {about['cores']} cores, {result['date']}, "
        + ', '.join(f'{k} {v}' for k, v in about['versions'].items())
    )
    for name, run in result['runs'].items():
        parts.append(
            f"## {name}\n\n`{run['command']}`, {run.get('threads', '?')} thread(s), "
            f"{run['seconds']:.0f} s, "
            f"load {run['load_before']} before and {run['load_after']} after"
            + (f", {run['note']}" if 'note' in run else '')
            + (f", **{run['failed']}**" if 'failed' in run else '')
        )
        parts.append(tables(result, name))
    return '\n\n'.join(parts) + '\n'


def tables(result, name):
    "The tables of one run."
    kinds = dict(
        ratio=ratio_table,
        median=peak_table,
        exponent=lambda rows: scaling_table(picked(result, name, 'x'), rows),
    )
    return '\n\n'.join(
        f(picked(result, name, key)) for key, f in kinds.items() if picked(result, name, key)
    )


def table(head, rows):
    return '\n'.join(
        '| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---'] * len(head), *rows]
    )


def span(rows, key, form):
    "'14 to 16', or one number if all are the same."
    low, high = (format(f(r[key] for r in rows), form) for f in (min, max))
    return low if low == high else f'{low} to {high}'


def expectations(rows, names):
    "What `expect.py` measured, one line for each of `names`; several seeds make a range."
    lines = []
    for name in names:
        mine = [r for r in rows if r['what'] == name]
        lines.append(
            [
                name,
                f"{mine[0]['steps']} of {mine[0]['batch_size']}",
                span(mine, 'wall_s', '.0f'),
                span(mine, 'first_loss', '.1f'),
                span(mine, 'last_loss', '.4f'),
                span(mine, 'right', '.1%'),
                mine[0]['text'],
            ]
        )
    return table(
        ['', 'steps of a batch', 'seconds', 'loss at first', 'at the end', 'right', 'it writes'],
        lines,
    )


def character_steps(rows):
    "A step of chapter 06, each row with one change more than the row above it."
    lines = [['plain loop', number(rows[0]['theirs']), '']]
    for r in rows:
        what = r['what'].removeprefix('character step, ')
        lines.append([f'+ {what}', number(r['ours']), f"{r['ratio']:.2f}"])
    return table(['', 'ms per step', 'times as fast'], lines)


def character_losses(rows):
    "Whole runs of chapter 06: a plain loop, and Muon, with several seeds each."
    lines = []
    for what in 'plain loop', 'Muon':
        mine = [r for r in rows if r['what'] == what]
        seconds = ', '.join(f"{r['wall_s']:.0f}" for r in mine)
        losses = ', '.join(f"{r['held_loss']:.3f}" for r in mine)
        lines.append([what, mine[0]['lr'], mine[0]['steps'], seconds, losses])
    return table(['', 'learning rate', 'steps', 'seconds', 'held-out loss'], lines)


def character_sizes(rows):
    "What models of three sizes reach in the same steps, and a line that each writes."
    lines = []
    for r in rows:
        written = r['text'].removeprefix('ROMEO:').splitlines()
        loss, bits = r['held_loss'], bits_per_character(r['held_loss'])
        first = next(line for line in written if line.strip())
        size = f"{r['params']:,}", f"{r['cpu_s']:.0f}"
        lines.append([r['what'], *size, f'{loss:.3f}', f'{bits:.2f}', first])
    head = ['model', 'parameters', 'seconds', 'held-out loss', 'bits per character', 'it writes']
    return table(head, lines)


def number(v):
    return f'{v:,.0f}' if v >= 100 else f'{v:.3g}'


def verdict(goal, reached):
    return '' if not goal else f'{goal:g}: ' + ('reached' if reached >= goal else '**missed**')


def ratio_table(rows):
    "Medians, the ratio with its extremes, and the goal."
    return table(
        ['what', 'against', 'ours', 'theirs', 'unit', 'ratio', 'from', 'to', 'goal'],
        [
            [
                r['what'],
                r['peer'],
                number(r['ours']),
                number(r['theirs']),
                r['unit'],
                *(f'{r[k]:.2f}' for k in ('ratio', 'low', 'high')),
                verdict(r.get('goal'), r['ratio']),
            ]
            for r in rows
        ],
    )


def machines(folder):
    "The results of all machines in a folder."
    found = [read(path) for path in sorted(Path(folder).glob('*-cores.json'))]
    return [result for result in found if 'machine' in result]


def side_by_side(results, run):
    """A run on several machines: a line for each comparison, and for each machine the ratio, with
    its extremes; empty where it was not measured."""
    lines = {}
    for place, result in enumerate(results):
        for r in picked(result, run):
            line = lines.setdefault((r['what'], r['peer']), [''] * len(results))
            line[place] = f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
    names = [result['machine']['cpu'] for result in results]
    return table(['what', 'against', *names], [[*key, *line] for key, line in lines.items()])


def scaling_table(rows, exponents):
    "One line for each axis: its ends, the exponents, the bound."
    lines = []
    for e in exponents:
        a, *_, b = [r for r in rows if r['axis'] == e['axis']]
        slopes = [
            f'{e[k]:.2f}' if k in e else ''
            for k in ('exponent', 'exponent_end', 'memory_exponent_end')
        ]
        ends = [f'{number(a[k])} to {number(b[k])}' for k in ('ms', 'mib')]
        lines.append(
            [
                e['axis'],
                f"{a['x']:,} to {b['x']:,}",
                *ends,
                *slopes,
                b.get('bound', ''),
                f"{b['share']:.0%}" if 'share' in b else '',
            ]
        )
    return table(
        [
            'axis',
            'sizes',
            'ms',
            'MiB',
            'exponent',
            'at the end',
            'of memory',
            'bound',
            'share of it',
        ],
        lines,
    )


def peak_table(rows):
    return table(
        ['what', 'peak', 'median', 'unit'],
        [[r['what'], number(r['peak']), number(r['median']), r['unit']] for r in rows],
    )


def log_ticks(axis, low, high, at_most=6):
    "A logarithmic axis with 1, 2 and 5 times powers of ten written out."
    found = [
        f'{m}e{k}' for k in range(-4, 9) for m in (1, 2, 5) if low <= float(f'{m}e{k}') <= high
    ]
    found = found[:: max(1, -(-len(found) // at_most))]
    found = list(map(float, found))
    axis.set_ticks(
        found,
        [f'{v:g}' if v < 1e4 else f'{v / 1e3:g}k' if v < 1e6 else f'{v / 1e6:g}M' for v in found],
    )
    axis.set_minor_locator(need('matplotlib.ticker', 'plot').NullLocator())


def bars(ax, rows, title):
    """Horizontal bars of ratios with their extremes; a dashed line where both are equally fast, a
    diamond at each goal."""
    color = {peer: COLORS[i] for i, peer in enumerate(dict.fromkeys(r['peer'] for r in rows))}
    for i, r in enumerate(rows):
        first = not any(q['peer'] == r['peer'] for q in rows[:i])
        ax.barh(
            i,
            r['ratio'] - 1,
            left=1,
            color=color[r['peer']],
            height=0.7,
            label=f"against {r['peer']}" if first else None,
        )
        ax.plot([r['low'], r['high']], [i, i], color='black', lw=1)
        ax.annotate(
            f"{r['ratio']:.2f}",
            (max(r['high'], r.get('goal') or 1, 1), i),
            (6, 0),
            textcoords='offset points',
            va='center',
            fontsize=8,
        )
        if r.get('goal'):
            ax.plot(r['goal'], i, 'D', color='white', mec='black', ms=5)
    ax.set_yticks(range(len(rows)), [r['what'] for r in rows], fontsize=8)
    ax.axvline(1, color='black', ls='--', lw=1)
    ax.set(
        xscale='log',
        xlabel='theirs / ours: right of the line, ours is faster or smaller',
        title=title,
    )
    ax.invert_yaxis()
    ax.grid(axis='y', visible=False)
    ax.margins(x=0.12)
    log_ticks(ax.xaxis, *ax.get_xlim(), at_most=9)
    ax.figure.legend(loc='outside lower center', ncol=3, fontsize=8)


def ratio_bars(result, name):
    "A figure of the `bars` of a run, tall enough for its rows; none if there are no rows."
    rows = picked(result, name)
    if not rows:
        return
    fig, ax = subplots(height=1.2 + 0.24 * len(rows))
    bars(ax, rows, result['runs'][name]['command'])
    return fig


def lines(result, y='ms', label='ms'):
    "Every axis of `scaling` on logarithmic axes, with its exponent between the two largest sizes."
    exponents = picked(result, 'scaling', 'exponent')
    if not exponents:
        return
    fig, axes = subplots(2, 4, width=9, height=4.6, squeeze=False)
    for ax, e in zip(axes.flat, exponents):
        rows = picked(result, 'scaling', 'x', axis=e['axis'])
        ax.loglog([r['x'] for r in rows], [r[y] for r in rows], 'o-', ms=4)
        if y == 'ms':
            ax.fill_between(
                [r['x'] for r in rows],
                [r['low'] for r in rows],
                [r['high'] for r in rows],
                alpha=0.25,
            )
        p = e.get('exponent_end' if y == 'ms' else 'memory_exponent_end')
        ax.set_title(
            e['axis'].replace(', ', '\n') + ('' if p is None else f'\nends as size$^{{{p:.2f}}}$'),
            fontsize=9,
        )
        ax.margins(0.15)
        log_ticks(ax.xaxis, *ax.get_xlim(), at_most=3)
        log_ticks(ax.yaxis, *ax.get_ylim(), at_most=4)
        ax.tick_params(labelsize=8)
    for ax in axes.flat[len(exponents) :]:
        ax.axis('off')
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    return fig


def shares(result):
    "For each training step of `scaling`, the share of its time that the bound explains."
    rows = picked(result, 'scaling', 'share')
    if not rows:
        return
    axes = list(dict.fromkeys(r['axis'] for r in rows))
    fig, ax = subplots(height=3)
    for i, axis in enumerate(axes):
        mine = [r for r in rows if r['axis'] == axis]
        for k, r in enumerate(mine):
            ax.plot(
                k, 100 * r['share'], 's' if r['bound'] == 'memory' else 'o', color=COLORS[i], ms=6
            )
        ax.plot(range(len(mine)), [100 * r['share'] for r in mine], color=COLORS[i], label=axis)
    ax.set(
        title='Share of the bound that holds',
        xlabel='from the smallest size to the largest (squares: bound by memory)',
        ylabel='per cent',
        ylim=(0, 100),
    )
    ax.set_xticks([])
    ax.legend(ncol=5, fontsize=8)
    return fig


def write(result, path):
    "MACHINE.md and the pictures beside MACHINE.json."
    path = Path(path)
    pictures = {name: ratio_bars(result, name) for name in result['runs']}
    pictures |= dict(time=lines(result), memory=lines(result, 'mib', 'MiB'), shares=shares(result))
    text = markdown(result)
    for name, fig in pictures.items():
        if not fig:
            continue
        picture = path.with_name(f'{path.stem}-{name}.png')
        fig.savefig(picture, dpi=110)
        text += f'\n![{name}]({picture.name})\n'
    path.with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    write(read(sys.argv[1]), sys.argv[1])
