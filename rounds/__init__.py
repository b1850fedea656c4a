"""What surrounds a round: the run folder, sites that fail, and what is printed."""
