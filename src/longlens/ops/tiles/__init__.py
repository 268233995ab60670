"""The engine: tiles of the attention matrix, their scores, the softmax over them, and its recomputed backward pass.

`index` numbers rows and keys, `grid` says what a tile is and how large, `mask` which of its pairs attend, `dense` makes
the tiles of a pattern that leaves most pairs, `kernel` computes one tile, `forward` and `backward` all of them, and
`engine` joins the two for autograd. `weights` makes those of any tile where the log-sum-exp is already known.
"""
