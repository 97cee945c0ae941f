"""Timing fastadam against other optimizers: what `fastadam bench` is made of.

`peers` is the table of who is compared: to add one, edit that file alone. The
classes there and in `contenders` keep their numbers in the `arrays` of a
library, and update them, on the CPU or a CUDA device. `workloads` names the
shapes. `worker` is the child process in which fastadam and one peer take
turns, timed by `measure`; `session` starts one such `child` per peer, and
`load` measures beside busy processes. `report` turns what came out into JSON,
`tables` and `plot` show it.
"""
