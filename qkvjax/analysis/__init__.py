"""Statistics, claims and the report of a study."""
