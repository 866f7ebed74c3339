"""The unit Fisher matrices of one layer, from samples of its incoming activations and errors.

`unit_fisher.UnitFisher` is what users see. It reads sums: of `moments` with blocks of `packed`
triangles, or of `samples`, also as the linear maps of a `convolution`. Blocks are solved with by
`cholesky`, samples by `solver`, which chooses between `cg` and `woodbury`. What is read as
measured stands in `expectations`, what takes an inverse in `inverses`; `held` has the samples that
come first.
"""
