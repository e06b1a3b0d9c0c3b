"""A study: its grid, its runs and the processes that train them."""
