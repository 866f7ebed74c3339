"""`biasshift.check`: every layer measured a second time by `torch.func`, and compared."""
