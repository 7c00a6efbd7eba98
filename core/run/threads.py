"""Work on many images in threads: numba, zlib and OpenCV release the interpreter's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from core.run.errors import NamesFile, UserError

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    title: str,
    total: int,
    done: int = 0,
) -> Iterator[Result]:
    """Results of `work` on every item, in the order of the items, with a progress bar.

    Items are drawn in the calling thread while the threads work. Only a few are kept waiting, so
    memory does not grow with their number. The first error stops everything. 0 `workers` count
    as 1. `total` is the number of all steps of the progress bar, including those already `done`.
    """
    workers, named = max(1, workers), NamesFile(work)
    waiting: deque[Future] = deque()
    bar = tqdm(desc=title, total=total, initial=done, unit="image")
    with ThreadPoolExecutor(workers) as pool, bar:
        try:
            for item in items:
                waiting.append(pool.submit(named, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def try_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str
) -> tuple[dict[int, Result], dict[int, str]]:
    """Results of `work`, and the messages of its `UserError`s, each by the index of the item."""

    def attempt(item: Item) -> tuple[Result | None, str]:
        try:
            return work(item), ""
        except UserError as error:
            return None, str(error)

    done = [*in_threads(attempt, items, workers, title, len(items))]
    results = {k: result for k, (result, problem) in enumerate(done) if not problem}
    return results, {k: problem for k, (_, problem) in enumerate(done) if problem}


def make_missing(
    paths: Sequence[Path],
    work: Callable[[Item], None],
    workers: int,
    title: str,
    items: Callable[[list[int]], Iterable[Item]] = iter,
) -> None:
    """Makes this process's share of the missing files, in threads; then waits for the others.

    `items` takes the places of these files in `paths` to inputs of `work`, which makes one file of
    each; by default they are the places themselves.
    """
    from core.run import distributed  # imports torch, which some tools do without

    todo = distributed.my_share(paths)
    for _ in in_threads(work, items(todo), workers, title, len(paths), len(paths) - len(todo)):
        pass
    distributed.barrier()
