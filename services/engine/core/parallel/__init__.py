"""One model on several ranks: tensor parallelism within a layer, pipeline parallelism over layers.

A rank is a process with a device of its own. Rank 0 is the engine core, with scheduler and runner;
the others follow its steps.
"""
