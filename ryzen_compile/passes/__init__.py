"""Graph passes: one file each, every one a function from Program to Program that says what it did and what it left.

The order they run in, with the reason for each place, is in ``ryzen_compile.pipeline``.
"""
