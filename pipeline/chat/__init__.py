"""`rlhf chat`: a model that answers in the terminal or on a page."""
