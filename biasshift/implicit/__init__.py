"""Unit Fisher matrices without blocks: the samples are kept, and what takes an inverse comes by iteration or from a few factors."""
