"""``align report``: what a run says, on one page."""
