"""The black-box checks, by number; see `support` for how they start their peers."""
