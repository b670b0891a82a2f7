"""How a compiled model generates: the cache, the decode loop, sampling, stopping. Knows engines, never graphs."""
