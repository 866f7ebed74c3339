"""Measurements of a model on a probe: Fisher matrices, gradient gap, bias shift and activation
moments of every layer.
"""
