"""The claims of the theory, one file per subject."""
