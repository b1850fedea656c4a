"""The comparisons of the paper, measurements of speed, and questions to a finished run."""
