"""How many tokens fit into a device's memory: fits a line to the peaks of a forward and backward at two sizes.

Knows devices and bytes; the caller gives the function to run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import release_memory

SHARE = 0.9  # of the free memory; the rest is for fragmentation, and documents that need more than the measured ones


def can_measure(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and Path("/proc/self/clear_refs").exists())


def fit_tokens(run: Callable[[int], None], small: int, large: int, device: torch.device, to_come: int) -> int:
    """The most tokens `run` can take at once on the device, by `peak = fixed + slope * tokens`.

    Args:
        run: a forward and backward of this many tokens. What it leaves allocated (gradients) counts as already there.
        small: tokens of the first size. It runs twice: the first time allocates gradients and workspaces.
        large: tokens of the second size. If either size runs out of memory, the result is `small`.
        device: CUDA, or the CPU under Linux.
        to_come: bytes allocated later, for the optimizer state.
    """
    peaks = []
    for tokens in (small, small, large):
        release_memory()
        try:
            peaks.append(_peak_above_start(run, tokens, device))
        except torch.OutOfMemoryError:
            return small
    del peaks[0]  # it allocated the gradients
    slope = max((peaks[1] - peaks[0]) / (large - small), 1.0)
    fixed = max(peaks[0] - slope * small, 0.0)
    room = SHARE * _free(device) - to_come - fixed
    return max(small, int(room / slope))


def _peak_above_start(run: Callable[[int], None], tokens: int, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run(tokens)
        return torch.cuda.max_memory_allocated(device) - start
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be reused, and the peak would not show it
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    start = _status("VmRSS")
    run(tokens)
    return _status("VmHWM") - start


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            free = min(free, int(text) - int(Path(used).read_text()))
    return free


def _status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
