"""Random architectures, measured by the package and by an oracle that shares no code with it."""
