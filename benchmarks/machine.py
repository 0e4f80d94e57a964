"""Where and with what something was measured: the head of every JSON file of the benchmarks. Imports no framework."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.task import usable_cores

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "libtpu")
_CUDA_LIBRARIES = {"CUDA": "nvidia-cuda-runtime", "cuDNN": "nvidia-cudnn"}  # the first part of the wheels' names


def about(benchmark: str, facts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The head of a JSON file: which benchmark, when, of which commit, on what, with which versions.

    Args:
        benchmark: its module in `benchmarks`.
        facts: what the sides told of themselves (`Program.facts`); goes before what is installed here.
    """
    gpus = _gpus()
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "system": platform.platform(terse=True),
        }
        | ({"gpus": gpus} if gpus else {}),
        "software": _versions(with_cuda=bool(gpus)) | dict(facts or {}),
    }


def _versions(*, with_cuda: bool) -> dict[str, str]:
    """Of Python and of the packages that are installed; of CUDA's libraries as jax and torch get them from wheels."""
    installed = {str(found.name): found.version for found in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in _PACKAGES if name in installed}
    for library, prefix in _CUDA_LIBRARIES.items() if with_cuda else ():
        # several where jax and torch were built for different ones
        several = sorted({version for name, version in installed.items() if name.startswith(prefix)})
        if several:
            versions[library] = ", ".join(several)
    return versions


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of each NVIDIA GPU."""
    told = _told("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (told or "").splitlines()]
    return [
        {"name": name, "memory_bytes": int(mebibytes) * 2**20, "driver": driver}
        for name, mebibytes, driver in (row for row in rows if len(row) == 3 and row[1].isdigit())
    ]


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if tracked files were changed since; None outside a git repository."""
    folder = str(Path(__file__).parent)
    return _told("git", "-C", folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


def _told(*command: str) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


# --- the same in words, for the line above a table ---


def where(*contents: Mapping[str, Any]) -> str:
    """What `described` says of JSON files that are alike, and when and of which commits they are."""
    return "; ".join(part for part in (described(contents[0]), dated(contents)) if part)


def described(content: Mapping[str, Any]) -> str:
    """Machine, versions and threads of a JSON file: where two files differ in any of them, so do these words."""
    machine, facts = content["machine"], content.get("software", {})
    devices = [_gpu_in_words(gpu) for gpu in machine.get("gpus", [])] or _told_devices(content)
    versions = [f"{name} {version}" for name, version in facts.items() if not name.endswith((" threads", " device"))]
    threads = [f"{name.removesuffix(' threads')} {count}" for name, count in facts.items() if name.endswith(" threads")]
    parts = [
        ", ".join([*devices, machine["cpu"], f"{machine['usable_cores']} of {machine['cores']} cores"]),
        ", ".join(versions),
        f"threads: {', '.join(threads)}" if threads else "",
    ]
    return "; ".join(part for part in parts if part)


def device_name(content: Mapping[str, Any], device: str) -> str:
    """What the maker calls the device of a JSON file's results, which is "cpu" or "gpu"."""
    if device == "cpu":
        return content["machine"]["cpu"]
    return next((gpu["name"] for gpu in content["machine"].get("gpus", [])), ", ".join(_told_devices(content)) or "GPU")


def dated(contents: Sequence[Mapping[str, Any]]) -> str:
    """Days and commits of JSON files, such as "2026-11-25, commit 0123456789ab"; empty for files that do not tell."""
    days = {content["date"][:10]: None for content in contents if content.get("date")}
    commits = {content["commit"]: None for content in contents if content.get("commit")}
    return ", ".join([*days, *(f"commit {commit}" for commit in commits)])


def _gpu_in_words(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']})"


def _told_devices(content: Mapping[str, Any]) -> list[str]:
    """What a side said that it runs on, if that is not the CPU: known without nvidia-smi too."""
    facts = content.get("software", {})
    told = (facts.get(f"{framework} device", "cpu") for framework in ("torch", "jax"))
    return [name for name in told if name != "cpu"][:1]
