"""Tests by room; those of the paper's equations are in test_fedbcs.py."""
