"""Build hook only: metadata is in pyproject.toml, the C extension in vhostsock/_build_core.py."""

from setuptools import setup

setup(cffi_modules=["vhostsock/_build_core.py:ffibuilder"])
