"""Hand the build to CMake, which owns sources, flags and options; metadata lives in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Build both native artefacts into the package folder."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("fedkd_fast._C")).parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        if (
            self.inplace
        ):  # kept between builds; one folder per environment, whose tools its cache names
            build = (
                ROOT
                / "build"
                / f"{sys.implementation.cache_tag}-{zlib.crc32(sys.prefix.encode()):08x}"
            )
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=WARNING"),
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFEDKD_FAST_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        steps = [configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]]
        for step in steps:
            # Installing has nothing to say but what is up to date.
            quiet = subprocess.DEVNULL if step is steps[-1] else None
            subprocess.run(step, check=True, stdout=quiet, env=os.environ | {"PATH": tools})


setup(ext_modules=[Extension("fedkd_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
