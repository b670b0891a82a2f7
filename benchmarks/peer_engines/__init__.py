"""One module an engine for ``benchmarks/peers.py``.

Each runs as a process of its own, in the environment of its engine; only ``ours`` and ``source`` import this project.
"""
