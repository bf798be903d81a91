"""The NVIDIA driver of this machine, and whether it is new enough for the kernels of a build."""

from __future__ import annotations

import subprocess

# By major version of the CUDA runtime that is linked into the kernels (NVIDIA's release notes).
OLDEST_DRIVER = {12: 525, 13: 580}
_QUERY = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def driver_version() -> str | None:
    """Return the driver's version, or None where there is no driver or it does not answer."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), None)


def describe_driver(driver: str | None, cuda_version: str) -> str:
    """Say which driver there is, and what a build with this CUDA, or none (""), wants of it."""
    if driver is None:
        return "none found"
    major = cuda_version.split(".")[0]
    oldest = OLDEST_DRIVER.get(int(major)) if major.isdigit() else None
    number = driver.split(".")[0]
    if oldest is None or not number.isdigit() or int(number) >= oldest:
        return driver
    return (
        f"{driver}, too old: the kernels were built with CUDA {cuda_version}, for {oldest} or newer"
    )
