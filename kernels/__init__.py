"""Kernels, installed as ``ryzen_compile.kernels``; ``cpu`` holds the native operators for ONNX Runtime.

The directory stands at the top of the repository, where people look for kernels. The import name ``kernels`` however
belongs to another package: nothing imports it so, and no installed distribution of this project provides it.
"""
