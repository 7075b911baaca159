"""Studies on a cohort: in this process, or its people shared out among several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace

import torch
from tqdm import tqdm

from convlora.cpu import prepare_cpu
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.studies import ALL
from convlora.integrations.eg3d.studies.cohort import Cohort
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Results


def run_studies(names: Sequence[str], cohort: Cohort, effort: Effort, jobs: int = 1) -> list[Results]:
    """Measure what is not on disk yet, and return the studies `names` over the whole cohort.

    People share nothing, so `jobs` > 1 processes learn them side by side, each with its part of the CPU's threads.
    Raises:
        ConvloraError: an unknown study, jobs below 1 or more than one on an accelerator, a folder with something else.
    """
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise ConvloraError(f"no study {', '.join(unknown)}; there are {', '.join(ALL)}, all or companions")
    if jobs < 1 or (jobs > 1 and cohort.device != "cpu"):
        raise ConvloraError(f"jobs={jobs} must be at least 1, and 1 on {cohort.device}")
    jobs = min(jobs, cohort.identities)
    with cohort.opened():
        if jobs > 1 and cohort.subjects:  # what is wrong with albums is said before anybody begins
            _side_by_side(names, cohort, effort, jobs)
        return [ALL[name](cohort, effort) for name in names]


def _side_by_side(names: Sequence[str], cohort: Cohort, effort: Effort, jobs: int) -> None:
    spawn = multiprocessing.get_context("spawn")  # a forked process has the threads' locks but not the threads
    threads = max(1, torch.get_num_threads() // jobs)
    total = cohort.identities * cohort.seeds * len(names)
    with (
        ProcessPoolExecutor(jobs, spawn, _start, (threads,)) as pool,
        tqdm(total=total, desc="studies × people", disable=not cohort.progress) as bar,
    ):
        parts = [replace(cohort, only=person, progress=False) for person in range(cohort.identities)]
        running = {pool.submit(_measure, list(names), part, effort) for part in parts}
        failed = False
        while running and not failed:
            done, running = wait(running, 5, FIRST_EXCEPTION)
            bar.update(_finished(names, cohort) - bar.n)
            failed = any(future.exception() is not None for future in done)
            if failed:
                pool.shutdown(cancel_futures=True)
            for future in done:
                future.result()


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    prepare_cpu()


def _measure(names: Sequence[str], cohort: Cohort, effort: Effort) -> None:
    for name in names:
        ALL[name](cohort, effort)


def _finished(names: Sequence[str], cohort: Cohort) -> int:
    return sum(len(list(cohort.out.glob(f"*/seed_*/values/{name}.json"))) for name in names)
