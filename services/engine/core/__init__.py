"""The engine core: scheduler, block pool, runner and sampler, with no network in it."""
