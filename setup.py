"""Maps kernels/ to dali_diffusemix.kernels and builds the CPU library in it, if there is a compiler.

Everything else about the package stands in pyproject.toml. The library is plain C behind ctypes: it does not
touch Python's C interface, so one binary serves every Python. Where it cannot be built the installation goes
on and the NumPy definition does the work (`dali_diffusemix.base.native` says so once).
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "dali_diffusemix.kernels.libdali_diffusemix"
SOURCES = sorted(str(p) for p in Path("kernels").glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("kernels").glob("*.*h"))


class BuildLibrary(build_ext):
    """Builds a plain shared library: no Python version in its name, no init function."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["dali_diffusemix*"]), "dali_diffusemix.kernels"],
    package_dir={"dali_diffusemix.kernels": "kernels"},
    package_data={
        "dali_diffusemix": ["py.typed"],
        "dali_diffusemix.inspect": ["assets/*"],
        "dali_diffusemix.kernels": ["*.cuh", "*.cu", "*.h", "*.cpp"],
    },
    ext_modules=[
        Extension(
            LIBRARY,
            sources=SOURCES,
            depends=HEADERS,
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": AnyPythonWheel, "build_ext": BuildLibrary},
)
