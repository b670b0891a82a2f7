"""Triton kernels, installed as ``ryzen_compile.kernels``: one file per noun, each attached to its op from outside.

The directory stands at the top of the repository, where people look for kernels. The import name ``kernels`` however
belongs to another package: nothing imports it so, and no installed distribution of this project provides it.
"""
