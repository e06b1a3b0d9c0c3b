"""The results of a study: DataFrames, statistics, plots, and the report."""
