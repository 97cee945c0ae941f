"""The names model: a character-level transformer small enough to read.

`data` turns names into tokens, `model` is the transformer and its
gradient, `train` runs an optimizer on it, `figures` draws the loss.
Nothing here prints: ``fastadam train`` does. `model` needs autograd and
`figures.save_plot` needs matplotlib: ``pip install "fastadam[demo]"``.
"""
