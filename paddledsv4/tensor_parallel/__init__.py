"""Weights split over the ranks of a tensor group, and what these ranks exchange."""
