"""Work on many images in threads: numba, zlib and OpenCV release the interpreter's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from core.run.errors import NamesFile

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    title: str,
    total: int,
    done: int = 0,
    unit: str = "image",
) -> Iterator[Result]:
    """Results of `work` on every item, in the items' order, under a progress bar.

    The items are drawn while the threads work, and no more than a few wait: a network may make
    them, and memory does not grow with their number. The first error ends the whole.

    Args:
        work: of one item.
        items: drawn in the calling thread.
        workers: threads; 0 counts as 1.
        title, total, done, unit: of the progress bar; `total` includes those `done` before.
    """
    workers, named = max(1, workers), NamesFile(work)
    waiting: deque[Future] = deque()
    bar = tqdm(desc=title, total=total, initial=done, unit=unit)
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
            for future in waiting:
                future.cancel()
