"""What the checks and downloads of data sets have in common."""

from __future__ import annotations

import http.client
import shutil
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ['Progress', 'fetch', 'few', 'print_progress', 'spread', 'unpack', 'unreadable']

Item = TypeVar('Item')
Progress = Callable[[int, int], object]


def few(names: Sequence[str], shown: int = 5) -> str:
    """The first of ``names`` and the number of the others, for a message."""
    more = f' and {len(names) - shown} more' if len(names) > shown else ''
    return ', '.join(names[:shown]) + more


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of ``items``, the first and the last among them, evenly spread; all where there are no more."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[index] for index in chosen]


def unreadable(path: Path) -> str | None:
    """One sentence where the image cannot be decoded to its end, else None."""
    try:
        with Image.open(path) as file:
            file.convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # Pillow raises each for damaged files
        return f'{path} ({path.stat().st_size:,} bytes) cannot be read: {error}' if path.exists() else f'{path} is gone'
    return None


def print_progress(done: int, total: int) -> None:
    """Show on one line how many of ``total`` bytes (0: not known) are there."""
    share = f' of {total / 1e6:.0f} MB, {100 * done / total:.1f} %' if total else ' MB'
    print(f'\r{done / 1e6:.0f}{share}', end='', flush=True)  # noqa: T201 (a tool's progress, not a log)


def fetch(
    urls: Sequence[str], target: Path, size: str, then: str, progress: Progress | None = None, timeout: float = 30.0
) -> None:
    """Fetch ``target``, unless it is there already. It appears whole or not at all.

    A download that breaks off goes on where it stopped at the next call.

    Args:
        urls: where to fetch from; each is tried until one works.
        target: file to write.
        size: how large it is, for the message.
        then: what running this again does when the file is there, for the message.
        progress: called with (bytes done, bytes in all; 0 if the server does not say).
        timeout: longest silence of the server, in seconds.

    Raises:
        ConnectionError: no URL works; the message says what to do without a network.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, None] = {}  # a set that keeps the order
    for url in urls:
        try:
            _fetch(url, target, progress, timeout)
            return
        except (OSError, http.client.HTTPException) as error:
            reasons[str(getattr(error, 'reason', error))] = None
    raise ConnectionError(
        f'{target.name} could not be fetched ({"; ".join(reasons)}): get it ({size}) from {urls[0]} where there is a '
        f'network, put it at {target}, and run this again to {then}'
    )


def _fetch(url: str, target: Path, progress: Progress | None, timeout: float) -> None:
    partial = target.with_name(f'{target.name}.part')
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    try:
        reply = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": there is nothing after what we have
            raise
        if error.headers.get('Content-Range', '').rpartition('/')[2] != str(start):
            partial.unlink()
            raise OSError(f'what {partial} held is no part of it and is deleted; run this again') from error
        partial.rename(target)
        return
    with reply:
        resumes = reply.status == 206 and reply.headers.get('Content-Range', '').startswith(f'bytes {start}-')
        done = start if resumes else 0
        length = reply.headers.get('Content-Length')
        total = done + int(length) if length else 0
        with partial.open('ab' if resumes else 'wb') as file:
            while block := reply.read(1 << 20):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    if total and done != total:
        raise OSError(f'the connection ended after {done} of {total} bytes; run this again to go on')
    partial.rename(target)


def unpack(archive: Path, target: Path, find: Callable[[Path], Path | None], expected: str) -> None:
    """Unpack ``archive`` so that one folder in it becomes ``target``, whole or not at all.

    Args:
        archive: zip file.
        target: folder to make; it may be there if it is empty.
        find: gives that folder among what was unpacked, or None.
        expected: what the archive should hold, for the message.

    Raises:
        ValueError: the archive is damaged or holds something else.
    """
    folder = target.with_name(f'.{target.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        inner = find(folder)
        if inner is None:
            raise ValueError(f'{archive} has no folder {expected}')
        if target.exists():
            target.rmdir()
        inner.rename(target)
    except zipfile.BadZipFile as error:
        raise ValueError(f'{archive} is damaged ({error}); delete it and fetch it again') from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
