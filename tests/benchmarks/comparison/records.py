"""What a measurement returns, and what was there when it did."""

import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias, TypeVar


LIBRARIES = ("llama-cpp-python", "mlx", "mlx-lm", "numpy", "torch", "transformers")

Record: TypeAlias = Mapping[str, Any]
"""One figure, what it is the figure of, and in what circumstances: text and numbers only."""
T = TypeVar("T")


def circumstances() -> str:
    """Return what makes a figure: the class of machine, which isn't named, and the versions."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{processor()}, {os.cpu_count()} cores, {gigabytes:.0f} GiB, {platform.system()}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    versions = [f"{name} {version(name)}" for name in ("inference-session", "attrs", *LIBRARIES)]
    return f"{machine}, with {', '.join([python, *versions])}"


def processor() -> str:
    """Return the model of the processor, or at least its kind."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def alone(work: Callable[..., T], *args: object) -> T:
    """Do something in a process of its own, where nothing else has been done before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()
