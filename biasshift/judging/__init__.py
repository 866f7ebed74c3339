"""From runs to verdicts: one module per idea of the paper, one statistics for all of them."""
