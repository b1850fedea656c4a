"""The files of a hospital: which they are, what is in them, and sites that are generated."""
