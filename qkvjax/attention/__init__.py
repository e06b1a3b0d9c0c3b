"""The subject: which roles share a projection, what that costs, and how it is computed."""
