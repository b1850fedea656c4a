"""What a prediction is worth: scores, statistics of the norm layers, tables and pictures."""
