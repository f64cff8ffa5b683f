"""Builds the native kernel, a plain shared library. Everything else is in pyproject.toml.

Without a C compiler, or where the build fails, the package installs all the same and runs in plain torch.
`python setup.py build_ext --inplace` builds it in a checkout.
"""

import os

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "spikedistill.neurons.kernels"
# No -march: the file chooses its instructions at run time. No contraction, no fast maths: spikes are equal to the bit.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


class Library(build_ext):
    """The extension is no Python module, so it has one name for every Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"


class AnyPython(bdist_wheel):
    """And one wheel."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


FOLDER = KERNELS.replace(".", "/")
native = Extension(
    f"{KERNELS}.libnative",
    [f"{FOLDER}/native.c", f"{FOLDER}/sparse.c"],
    depends=[f"{FOLDER}/native.h"],
    extra_compile_args=FLAGS,
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": Library, "bdist_wheel": AnyPython})
