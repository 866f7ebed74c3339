"""The paper's experiments, one protocol per file."""
