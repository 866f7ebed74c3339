"""The claims of the theory, one file per subject: statements beside their effects."""
