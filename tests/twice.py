"""twice.py NOTEBOOK ...: run all cells of each notebook, and then all of them again in the same
kernel, as 'Run all' does."""

import sys
import time
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.test import nb_test_cells


def run_twice(path):
    "The seconds of the first and of the second run. An error in a cell is raised."
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    wanted = {c.id for c in nb_test_cells(path, get_config().tst_flags.split())}
    shell, seconds = CaptureShell(path), []
    with working_directory(path.parent):
        for _ in range(2):
            start = time.perf_counter()
            shell.run_all(nb, exc_stop=True, preproc=lambda cell: cell.id not in wanted)
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        print(path.name, *(f'{s:.1f} s' for s in run_twice(path.resolve())), flush=True)
