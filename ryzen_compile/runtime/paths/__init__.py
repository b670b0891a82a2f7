"""Several paths from one prompt: sampled in one batch, verified, pruned and forked, voted on, stopped early."""
