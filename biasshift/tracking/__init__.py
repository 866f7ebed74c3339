"""`biasshift.instrument`: measurements during somebody's training, as one tidy table."""
