"""Is the optimized model what it is said to be? Checks with targets, each naming what is to blame for a miss."""
