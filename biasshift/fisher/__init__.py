"""The unit Fisher matrices of one layer, from samples of its incoming activations and errors.

`unit_fisher.UnitFisher` is what users see. Below it lie the sums that it reads (`moments` with
blocks of `packed` triangles, or `samples` and the linear maps of a `convolution`), and the solvers
for them: `cholesky` for blocks; `solver`, by `cg` or `woodbury`, for samples.
"""
