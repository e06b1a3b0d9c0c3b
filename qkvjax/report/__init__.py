"""What a study found: results as DataFrames, statistics, plots, and the report."""
