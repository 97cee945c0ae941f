"""Timing fastadam against other optimizers: what `fastadam bench` is made of.

`workloads` names the shapes and `peers` wraps the optimizers; neither imports
a peer, or makes an array, before it is asked to. `worker` is the child process
in which fastadam and one peer take turns, timed by `measure`; `session` starts
one such child per peer. `report` and `plot` show what came out.
"""
