"""One file for each raw data set."""
